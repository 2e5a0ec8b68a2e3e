"""Solvers of the edit problem at the sizes of three large models: objective, time, memory, growth, forms of Woodbury.

Run from the root of the repository, with the package and matplotlib installed; each part can be run by itself:

    python -m benchmarks.solvers Qwen3-30B-A3B GPT-OSS-20B Qwen3.6-35B-A3B growth published forms

Results of parts run before are kept: ``solvers.json``, ``solvers.md`` and ``solvers.png`` in ``benchmarks/results``
show the last run of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit_memory import peak
from benchmarks.published_bcd import Published
from benchmarks.solver_problems import (
    BASE,
    BLOCKS,
    EDITS,
    FORMS,
    GROWTH,
    MODELS,
    PASSES,
    make,
    optimum,
    tucker_ranks,
)
from benchmarks.solver_report import SIZE, draw, report
from lit_moeedit.precision import full_precision
from lit_moeedit.solvers import (
    BlockCoordinateDescent,
    EditProblem,
    PerExpertRidge,
    Solver,
    Tucker,
    TuckerFactors,
    Woodbury,
)
from lit_moeedit.solvers.woodbury import _dual, _primal

ROOT = Path(__file__).resolve().parents[1]


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


def random_factors(problem: EditProblem) -> TuckerFactors:
    """Orthonormal factors of :func:`tucker_ranks`, of no weights: what they cost does not depend on it."""
    generator = torch.Generator().manual_seed(0)
    shape = (problem.num_experts, problem.residuals.shape[1], problem.features.shape[1])
    ranks = zip(shape, tucker_ranks(*shape), strict=True)
    expert, output, inner = (torch.linalg.qr(torch.randn(n, r, generator=generator)).Q for n, r in ranks)
    return TuckerFactors(expert, output, inner, energy=(1.0, 1.0, 1.0))


def solvers(problem: EditProblem) -> dict[str, Solver]:
    return {
        "Woodbury": Woodbury(),
        f"BCD, {PASSES} passes": BlockCoordinateDescent(passes=PASSES),
        "PerExpertRidge": PerExpertRidge(),
        "Tucker": Tucker().with_factors(random_factors(problem)),
    }


def model(name: str) -> list[dict[str, Any]]:
    """Every solver at the sizes of one model."""
    size, rows = MODELS[name], []
    for edits in EDITS:
        problem = make(edits, *size)
        best = optimum(problem)
        for solver_name, solver in solvers(problem).items():
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


def growth() -> list[dict[str, Any]]:
    """Times as one of T, E and k (that is, N = k T) grows, the others as in ``BASE``."""
    rows = []
    for axis, values in GROWTH.items():
        for value in values:
            at = BASE | {axis: value}
            problem = make(at["T"], at["E"], at["k"], 768, 2048)
            row: dict[str, Any] = {"axis": axis, "value": value}
            for name in ("Woodbury", f"BCD, {PASSES} passes"):
                row[name] = seconds(solvers(problem)[name].solve, problem)
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


def forms() -> list[dict[str, Any]]:
    """Both forms of ``Woodbury``, around the size where it changes from one to the other."""
    rows = []
    for size in FORMS:
        for ratio in (0.7, 0.95, 1.05, 1.5, 2, 4):
            edits = round(ratio * size[0] * size[2])
            for ridge in (1.0, 1e-3) if edits <= 3200 else ():
                problem = make(edits, *size, ridge=ridge)
                dimensions = len(problem.experts()) * size[2]
                row: dict[str, Any] = {SIZE: size, "D": dimensions, "T": edits, "ridge": ridge}
                for name, form in (("primal", _primal), ("dual", _dual)):
                    same = {dtype: problem for dtype in (torch.float32, torch.float64)}
                    work = full_precision()(partial(form, problem, same.__getitem__, torch.float32))
                    row[name] = seconds(work, budget=0.3)
                    row[f"{name}, excess"] = problem.objective(work()) / optimum(problem) - 1
                taken, other = ("primal", "dual") if dimensions < edits else ("dual", "primal")
                rows.append(row | {"ratio": row[taken] / row[other]})
        progress(str(size))
    return rows


PARTS: dict[str, Callable[[], Any]] = {
    **{name: partial(model, name) for name in MODELS},
    "growth": growth,
    "published": published,
    "forms": forms,
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
