"""Tables and pictures of what was measured of solvers."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.solver_problems import BASE, BLOCKS, FORMS, GROWTH, MODELS, PASSES

MODELS_NOTE = f"""\
Times of the published forms are those of {BLOCKS} blocks times experts and {PASSES} passes. They are left out for 4000
edits, where their features with the zeros would be 2 GB.
PerExpertRidge solves each expert by itself for its share of each residual, and Tucker seeks changes of its form only,
with random factors of a quarter of each mode. Their objectives are not meant to be the joint optimum, only times and
memory compare.
"""
PUBLISHED_HEADER = [
    "T, E, k, d_hidden, d_model",
    "BCD, seconds",
    "published, seconds",
    "published, routed pairs only, seconds",
    "BCD, objective above the least",
    "published, objective: (it - BCD) / BCD",
    "routed pairs only, objective: (it - BCD) / BCD",
]
PUBLISHED_NOTE = f"""\
All with {PASSES} passes in the same order. Objectives differ by the rounding of float32.
"""
SIZE = "E, k, d_hidden, d_model"
FORMS_NOTE = """\
`ratio` is the time of the form that Woodbury takes, primal where the dimensions D of the visited experts are fewer than
the edits T, over that of the other. ConjugateGradients and Auto, in tables of earlier versions, have been removed: the
first was never the fastest, and the second slower than Woodbury in most cases.
"""


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
        parts.append(MODELS_NOTE)
    if "published" in results:
        parts += [table(PUBLISHED_HEADER, published_rows(results["published"])), PUBLISHED_NOTE]
    if "growth" in results:
        parts.append(table(["axis", "solver", "measured exponent", "expected exponent"], slopes(results["growth"])))
    if "forms" in results:
        header = list(results["forms"][0])
        parts += [table(header, [[row[key] for key in header] for row in results["forms"]]), FORMS_NOTE]
    return "\n".join(parts)


def published_rows(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Seconds of the three forms; the objective of ours above the least, and how far the others' are from ours."""
    sizes, ours = "T, E, k, d_hidden, d_model", "BCD, objective"
    return [
        [
            *(row[key] for key in (sizes, "BCD", "published", "routed")),
            row[ours] - 1,
            *((row[f"{name}, objective"] - row[ours]) / row[ours] for name in ("published", "routed")),
        ]
        for row in rows
    ]


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
    """Time over T for each model, growth in T, E and k with its exponents, and the choice between two forms."""
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
        some = [row for row in results.get("forms", ()) if row["ridge"] == ridge]
        for shape in FORMS:
            points = [(row["T"] / row["D"], row["ratio"]) for row in some if tuple(row[SIZE]) == shape]
            if points:
                axis.loglog(*zip(*points, strict=True), "o-", label=str(shape))
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=f"Woodbury, ridge {ridge:g}", xlabel="T / D", ylabel="time over that of the other form")
        if some:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
