"""Solvers of the edit problem at the sizes of three large models: objective, time, memory, growth, and Auto's choice.

Run from the root of the repository, with the package and matplotlib installed; each part can be run by itself:

    python -m benchmarks.solvers Qwen3-30B-A3B GPT-OSS-20B Qwen3.6-35B-A3B growth published choice costs

The last measures the constants of ``lit_moeedit.solvers.auto`` on this machine. Results of parts run before are kept:
``solvers.json``, ``solvers.md`` and ``solvers.png`` in ``benchmarks/results`` show the last run of each.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.commit_memory import peak
from benchmarks.published_bcd import Published
from lit_moeedit.solvers import (
    Auto,
    BlockCoordinateDescent,
    ConjugateGradients,
    EditProblem,
    NormalEquations,
    Solver,
    Woodbury,
)
from lit_moeedit.solvers.problem import solve_factored

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "Qwen3-30B-A3B": (128, 8, 768, 2048),
    "GPT-OSS-20B": (32, 4, 2880, 2880),
    "Qwen3.6-35B-A3B": (256, 8, 512, 2048),
}
"""Experts, experts per token, ``d_hidden``, ``d_model``."""
EDITS = (1, 10, 100, 1000, 4000)
PASSES = 4
BLOCKS = 2
"""How many blocks of the published form are timed where all of them would take too long."""
LATENT = 32


def make(edits: int, experts: int, active: int, d_hidden: int, d_model: int, ridge: float = 1.0) -> EditProblem:
    """Edits that resemble each other: keys, routing and residuals are low rank plus as much noise.

    A key has a squared norm of about 10; gates are a softmax over the active experts, as in Qwen3.
    """
    generator = torch.Generator().manual_seed(edits)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latent = (normal(edits, LATENT) + normal(LATENT)) / math.sqrt(2 * LATENT)
    logits = latent @ normal(LATENT, experts) + normal(edits, experts)
    best, expert = logits.topk(active, dim=1)
    gate, expert = best.softmax(1).flatten(), expert.flatten()
    edit = torch.arange(edits).repeat_interleave(active)
    features = normal(len(edit), d_hidden)
    for j in range(experts):
        pairs = (expert == j).nonzero()[:, 0]
        features[pairs] += latent[edit[pairs]] @ normal(LATENT, d_hidden)
    features *= math.sqrt(5 / d_hidden) * gate[:, None]
    residuals = latent @ normal(LATENT, d_model) + normal(edits, d_model)
    return EditProblem(edit, expert, features, residuals, experts, ridge)


def optimum(problem: EditProblem) -> float:
    """The least objective, ``λ tr(Rᵀ (G + λ I)⁻¹ R)``, in float64."""
    system = problem.ridge * torch.eye(problem.num_edits, dtype=torch.float64)
    for j in range(problem.num_experts):
        pairs = (problem.expert_index == j).nonzero()[:, 0]
        edits, features = problem.edit_index[pairs], problem.features[pairs].double()
        system[edits[:, None], edits] += features @ features.T
    residuals = problem.residuals.double()
    left = torch.cholesky_solve(residuals, torch.linalg.cholesky(system))
    return problem.ridge * float((residuals * left).sum())


def seconds(work: Callable[..., Any], *arguments: Any, budget: float = 1.0) -> float:
    """Least time of a call, over as many calls as fit into ``budget`` seconds, up to 200."""
    times: list[float] = []
    while not times or (len(times) < 200 and sum(times) + min(times) < budget):
        start = time.perf_counter()
        work(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def extra_memory(work: Callable[..., Any], *arguments: Any) -> int:
    """Most bytes that ``work`` held at a time, result included, beyond what was there."""
    with torch.profiler.profile(profile_memory=True) as profile:
        held = work(*arguments)
    del held
    return peak(profile)


def solve_all_dense(solver: Solver, problem: EditProblem) -> Tensor:
    """One layer's deltas ``[E, d_model, d_hidden]``, filled expert by expert."""
    deltas = solver.solve(problem)
    layer = torch.empty(deltas.num_experts, *deltas.shape)
    for expert in range(deltas.num_experts):
        layer[expert] = deltas.dense(expert)
    return layer


def solvers() -> dict[str, Solver]:
    return {
        "Woodbury": Woodbury(),
        "ConjugateGradients": ConjugateGradients(),
        "Auto": Auto(),
        f"BCD, {PASSES} passes": BlockCoordinateDescent(passes=PASSES),
    }


def model(name: str) -> list[dict[str, Any]]:
    """Every solver at the sizes of one model."""
    size, rows = MODELS[name], []
    for edits in EDITS:
        problem = make(edits, *size)
        best = optimum(problem)
        for solver_name, solver in solvers().items():
            if solver_name == "ConjugateGradients" and edits > 1000:  # minutes, at 25 times Woodbury's time
                continue
            row = {"T": edits, "solver": solver_name, "seconds": seconds(solver.solve, problem)}
            row["excess"] = problem.objective(solver.solve(problem)) / best - 1
            row["low rank"] = extra_memory(solver.solve, problem)
            row["dense"] = extra_memory(solve_all_dense, solver, problem) if edits == 1000 else None
            rows.append(row)
        for form_name, routed in (("published BCD", False), ("published BCD, routed pairs only", True)):
            if edits <= 1000:  # features of 4000 edits with their zeros are 2 GB
                form = Published(problem, routed)
                times = [seconds(form.block, j, budget=0) for j in range(BLOCKS)]
                total = statistics.mean(times) * size[0] * PASSES
                rows.append({"T": edits, "solver": form_name, "seconds": total})
        progress(f"{name}, T={edits}")
    return rows


def progress(text: str) -> None:
    sys.stderr.write(text + "\n")


def operations(name: str, problem: EditProblem) -> float:
    """Floating-point operations that a solver should need, where no edit count exceeds ``d_hidden``."""
    edits, d_model = problem.residuals.shape
    d_hidden, experts = problem.features.shape[1], problem.num_experts
    counts = [len(pairs) for _, pairs in problem.experts()]
    gram = 2 * d_hidden * sum(count**2 for count in counts)
    if name == "Woodbury":
        return gram + edits**3 / 3 + 2 * edits**2 * d_model
    if name.startswith("BCD"):
        return gram + sum(count**3 for count in counts) + PASSES * 2 * d_model * sum(count**2 for count in counts)
    return PASSES * experts * (2 * experts * edits * d_hidden * d_model + 2 / 3 * d_hidden**3)


BASE = {"T": 1000, "E": 128, "k": 8}
GROWTH = {"T": (250, 500, 1000, 2000, 4000), "E": (32, 64, 128, 256, 512), "k": (1, 2, 4, 8, 16)}


def growth() -> list[dict[str, Any]]:
    """Times as one of T, E and k (that is, N = k T) grows, the others as in ``BASE``."""
    rows = []
    for axis, values in GROWTH.items():
        for value in values:
            at = BASE | {axis: value}
            problem = make(at["T"], at["E"], at["k"], 768, 2048)
            row: dict[str, Any] = {"axis": axis, "value": value}
            for name in ("Woodbury", f"BCD, {PASSES} passes"):
                row[name] = seconds(solvers()[name].solve, problem)
                row[f"{name}, operations"] = operations(name, problem)
            if at["T"] <= 1000 and at["E"] <= 256:
                row["published BCD"] = seconds(Published(problem).block, 0, budget=0) * at["E"] * PASSES
                row["published BCD, operations"] = operations("published", problem)
            rows.append(row)
            progress(f"{axis}={value}")
    return rows


def published() -> list[dict[str, Any]]:
    """Both forms of BCD through all passes, where that can be waited for."""
    rows = []
    for size in ((250, 32, 4, 192, 256), (500, 64, 8, 384, 1024)):
        problem = make(*size)
        best, solver = optimum(problem), BlockCoordinateDescent(passes=PASSES)
        row = {"T, E, k, d_hidden, d_model": size, "BCD": seconds(solver.solve, problem)}
        for name, routed in (("published", False), ("routed", True)):
            form = Published(problem, routed)
            row[name] = seconds(form.solve, PASSES, budget=0)
            row[f"{name}, objective"] = form.objective() / best
        rows.append(row | {"BCD, objective": problem.objective(solver.solve(problem)) / best})
        progress(str(size))
    return rows


SHAPES = {  # experts, experts per token, d_hidden, d_model
    "Qwen3-30B-A3B": (128, 8, 768, 2048),
    "many small experts": (512, 8, 64, 512),
    "small model": (16, 4, 128, 256),
    "one of many experts": (256, 1, 64, 1024),
    "few narrow experts": (8, 2, 64, 256),
    "one narrow expert": (1, 1, 64, 64),
}


def choice() -> list[dict[str, Any]]:
    """``Auto`` against each of the three that it picks from."""
    rows = []
    for shape, size in SHAPES.items():
        for edits in (1, 10, 100, 500, 1000, 2000, 4000):
            for ridge in (1.0, 1e-3):
                problem = make(edits, *size, ridge=ridge)
                best = optimum(problem)
                names: dict[str, Solver] = {"Auto": Auto(), "Woodbury": Woodbury()}
                if len(problem.experts()) * size[2] <= min(2 * edits + 500, 5000):
                    names["NormalEquations"] = NormalEquations()
                if edits * size[3] < 4e6:
                    names["ConjugateGradients"] = ConjugateGradients()
                row: dict[str, Any] = {"shape": shape, "T": edits, "ridge": ridge}
                for name, solver in names.items():
                    row[f"{name}, excess"] = problem.objective(solver.solve(problem)) / best - 1
                    row[name] = seconds(solver.solve, problem, budget=0.3)
                row["ratio"] = row["Auto"] / min(row[name] for name in names if name != "Auto")
                rows.append(row)
        progress(shape)
    return rows


def costs() -> dict[str, float]:
    """The constants of the cost model, in the order in which ``auto.py`` has them."""
    problem = make(2000, 128, 8, 768, 2048)
    features = torch.randn(32, 128, 768)
    system = torch.randn(2000, 2000)
    system = system @ system.T + 2000 * torch.eye(2000)
    factor, columns = torch.linalg.cholesky(system), problem.residuals
    index = problem.edit_index
    narrow = make(64, 64, 2, 4, 8)
    gathered = columns[index]

    def gather() -> Tensor:
        return columns[index]

    def scatter() -> Tensor:
        return columns.index_add_(0, index, gathered)

    return {
        "PRODUCT": 2 * 32 * 128**2 * 768 / seconds(torch.matmul, features, features.mT),
        "CHOLESKY": 2000**3 / 3 / seconds(torch.linalg.cholesky_ex, system),
        "SOLVE": 2 * 2000**2 * 2048 / seconds(solve_factored, factor, columns),
        "MOVE": (seconds(gather) + seconds(scatter)) / (2 * len(index) * 2048),
        "STEP": seconds(NormalEquations().solve, narrow) / 64,
    }


def exponent(values: list[float], times: list[float]) -> float:
    """Slope of a line through the points on log axes."""
    return statistics.linear_regression([math.log(v) for v in values], [math.log(t) for t in times]).slope


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""

    def cell(value: Any) -> str:
        if value is None:
            return "–"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def report(results: dict[str, Any]) -> str:
    """All tables."""
    parts = []
    for name in MODELS:
        if name in results:
            parts.append(f"{name}, {dict(zip(('E', 'k', 'd_hidden', 'd_model'), MODELS[name], strict=True))}:\n")
            published = {row["T"]: row["seconds"] for row in results[name] if row["solver"] == "published BCD"}
            rows = [
                [
                    *(row.get(key) for key in ("T", "solver", "seconds", "excess")),
                    *(row[key] / 2**20 if row.get(key) else None for key in ("low rank", "dense")),
                    published[row["T"]] / row["seconds"] if row["T"] in published else None,
                ]
                for row in results[name]
            ]
            header = ["T", "solver", "seconds", "objective above the least", "extra MiB", "extra MiB, all dense"]
            parts.append(table([*header, "times as fast as published"], rows))
    if set(MODELS) & set(results):
        parts.append(f"Times of the published forms are those of {BLOCKS} blocks times experts and {PASSES} passes.\n")
    if "published" in results:
        header = list(results["published"][0])
        parts.append(table(header, [[row[key] for key in header] for row in results["published"]]))
    if "growth" in results:
        parts.append(table(["axis", "solver", "measured exponent", "expected exponent"], slopes(results["growth"])))
    if "choice" in results:
        header = ["shape", "T", "ridge", "Auto", "Woodbury", "NormalEquations", "ConjugateGradients", "ratio"]
        header += [f"{name}, excess" for name in header[3:7]]
        parts.append(table(header, [[row.get(key) for key in header] for row in results["choice"]]))
    if "costs" in results:
        parts.append(table(["constant", "value"], [[name, float(value)] for name, value in results["costs"].items()]))
    return "\n".join(parts)


def slopes(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Measured exponents, and those of the operations at the same sizes."""
    found = []
    for axis in GROWTH:
        for name in ("Woodbury", f"BCD, {PASSES} passes", "published BCD"):
            some = [row for row in rows if row["axis"] == axis and name in row]
            values = [row["value"] for row in some]
            pair = [exponent(values, [row[key] for row in some]) for key in (name, f"{name}, operations")]
            found.append([axis, name, *pair])
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Time over T for each model, growth in T, E and k with its exponents, and what Auto loses."""
    figure, axes = plt.subplots(2, 4, figsize=(20, 9), layout="constrained")
    for axis, name in zip(axes[0], MODELS, strict=False):
        some = results.get(name, ())
        for solver in dict.fromkeys(row["solver"] for row in some):
            points = [(row["T"], row["seconds"]) for row in some if row["solver"] == solver]
            axis.loglog(*zip(*points, strict=True), "o-", label=solver)
        axis.set(title=name, xlabel="edits T", ylabel="seconds")
        if some:
            axis.legend(fontsize=8)
    slope = {(axis, name): pair for axis, name, *pair in slopes(results["growth"])} if "growth" in results else {}
    for axes_, axis in zip(axes[1], GROWTH, strict=False):
        some = [row for row in results.get("growth", ()) if row["axis"] == axis]
        for name in ("Woodbury", f"BCD, {PASSES} passes", "published BCD") if some else ():
            points = [(row["value"], row[name], row[f"{name}, operations"]) for row in some if name in row]
            values, times, work = zip(*points, strict=True)
            measured, expected = slope[axis, name]
            (line,) = axes_.loglog(values, times, "o-", label=f"{name}: {measured:.2f} (expected {expected:.2f})")
            scale = times[-1] / work[-1]
            axes_.loglog(values, [scale * one for one in work], ":", color=line.get_color())
        others = ", ".join(f"{key}={value}" for key, value in BASE.items() if key != axis)
        names = {"T": "edits T", "E": "experts E", "k": "experts per edit k = N / T"}
        axes_.set(title=f"exponents at {others}", xlabel=names[axis], ylabel="seconds (dotted: operations)")
        if some:
            axes_.legend(fontsize=8)
    for axis, ridge in ((axes[0, 3], 1.0), (axes[1, 3], 1e-3)):
        some = [row for row in results.get("choice", ()) if row["ridge"] == ridge]
        for shape in SHAPES:
            points = [(row["T"], row["ratio"]) for row in some if row["shape"] == shape]
            if points:
                axis.semilogx(*zip(*points, strict=True), "o-", label=shape)
        axis.axhline(1.3, color="black", linewidth=0.8)
        axis.set(title=f"Auto, ridge {ridge:g}", xlabel="edits T", ylabel="time over that of the best", ylim=(0.5, 2))
        if some:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)


PARTS: dict[str, Callable[[], Any]] = {
    **{name: partial(model, name) for name in MODELS},
    "growth": growth,
    "published": published,
    "choice": choice,
    "costs": costs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--threads", type=int, default=1, help="one is not disturbed by what else runs on the machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "solvers.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in arguments.parts:
        results[part] = PARTS[part]()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = report(results)
    parts = " ".join(part for part in PARTS if part in results)
    command = f"`python -m benchmarks.solvers {parts} --threads {arguments.threads}`"
    (arguments.output / "solvers.md").write_text(f"{command}\n\n{text}", encoding="utf-8")
    draw(results, arguments.output / "solvers.png")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
