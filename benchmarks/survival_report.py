"""The table and the picture of the benchmark of survival."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.training import header, row

NAMES = ("atlas", "counterfact")
EDITS = {"atlas": 32, "counterfact": 100}
"""Number of edits of the configs, which results of earlier versions do not tell."""


def tables(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, with those of earlier versions, which do not tell their weights, apart."""
    own = [result for result in results if "weights" in result]
    parts = [("", own), ("Of other weights, trained before on another machine:", [r for r in results if r not in own])]
    return "\n\n".join("\n\n".join(filter(None, (title, table(part)))) for title, part in parts if part)


def table(results: list[dict[str, Any]]) -> str:
    """Format results as Markdown: means over seeds, with 95 % intervals of the edits that are generated."""
    names = ("model", "edits", "continuation", "condition", "seeds", "generated after the edit", "at the end",
             "generalization", "neighbours retained", "training loss", "perplexity", "step time")  # fmt: skip
    lines = header(names)
    groups: dict[tuple[str, int, str, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["model"], edits_of(result), result["continuation"], result["condition"])
        groups.setdefault(key, []).append(result)
    for key, own in sorted(groups.items()):
        *case, condition = key
        base, never = (groups.get((*case, other), []) for other in ("nothing", "never edited"))  # type: ignore[arg-type]
        is_edited = condition != "never edited"
        end = [r["end"]["efficacy_accuracy"] for r in own] if is_edited else []
        shown = f"{interval(end)}" if end else "-"
        if is_edited and own[0]["contradicted"] is not None:
            parts = [statistics.mean(r[group] for r in own) for group in ("contradicted", "others")]
            shown += f" (contradicted {parts[0]:.2f}, others {parts[1]:.2f})"
        times = ratios(own, base, "seconds", "processor")
        lines.append(
            row(
                (
                    *key, len(own),
                    f"{mean_of(own, 'after', 'efficacy_accuracy'):.2f}" if is_edited else "-",
                    shown,
                    f"{mean_of(own, 'after', 'generalization'):.2f} to {mean_of(own, 'end', 'generalization'):.2f}"
                    if is_edited else "-",
                    f"{mean_of(own, 'end', 'specificity_retained'):.3f}" if is_edited else "-",
                    percent(ratios(own, base, "train_loss")), percent(ratios(own, never, "perplexity")),
                    f"{statistics.mean(times):.2f}" if times else "-",
                )
            )
        )  # fmt: skip
    return "\n".join(lines)


def ratios(
    own: list[dict[str, Any]], others: list[dict[str, Any]], quantity: str, equal: str | None = None
) -> list[float]:
    """Divide a quantity of runs by that of others with the same seed, where they are equal in ``equal``, too."""
    by_seed = {result["seed"]: result for result in others}
    pairs = [(result, by_seed[result["seed"]]) for result in own if result["seed"] in by_seed]
    return [mine[quantity] / its[quantity] for mine, its in pairs if equal is None or mine.get(equal) == its.get(equal)]


def percent(ratios: list[float]) -> str:
    """Format the mean of ratios as what it is above or below 1."""
    return f"{100 * (statistics.mean(ratios) - 1):+.2f} %" if ratios else "-"


def draw(results: list[dict[str, Any]], path: Path, continuations: Sequence[str], conditions: Sequence[str]) -> None:
    """Draw the share of edits that are generated at the end: a dot for each run, and a bar for their mean.

    Results of earlier versions are left out where there are others.

    Args:
        results: of all runs.
        path: of the picture.
        continuations: all of them, from the left to the right.
        conditions: likewise, from the top to the bottom.
    """
    edited = [result for result in results if "end" in result]
    models = sorted({(NAMES.index(result["model"]), edits_of(result)) for result in edited})
    then = [c for c in continuations if any(result["continuation"] == c for result in edited)]
    shown = [c for c in conditions if any(result["condition"] == c for result in edited)][::-1]
    if not edited:
        return
    size = (2.6 * len(then) + 2.2, (0.32 * len(shown) + 0.8) * len(models) + 0.5)
    figure, axes = plt.subplots(
        len(models), len(then), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for own, (index, edits) in zip(axes, models, strict=True):
        for axis, continuation in zip(own, then, strict=True):
            axis.set_title(f"{NAMES[index]}, {edits} edits, {continuation}", fontsize=9)
            axis.axvline(0.97, color="0.6", linewidth=0.8, linestyle=":")
            for place, condition in enumerate(shown):
                here = (NAMES[index], edits, continuation, condition)
                found = [r for r in edited if (r["model"], edits_of(r), r["continuation"], r["condition"]) == here]
                found = [r for r in found if "weights" in r] or found
                shares = [r["end"]["efficacy_accuracy"] for r in found]
                if shares:
                    color = "C7" if condition.startswith("nothing") else "C0"
                    axis.barh(place, statistics.mean(shares), color=color, alpha=0.45, height=0.7)
                    axis.plot(shares, [place] * len(shares), "o", color=color, markersize=3.5)
    for axis in axes[:, 1:].flat:
        axis.set_visible(bool(axis.patches))
    axes[0][0].set_yticks(range(len(shown)), shown)
    for axis in axes.flat:
        axis.tick_params(labelsize=8)
    axes[0][0].set_xlim(0, 1.03)
    figure.supxlabel("share of the edits that are generated at the end; dotted: 0.97", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def edits_of(result: Mapping[str, Any]) -> int:
    """Return the number of edits of a run."""
    number: int = result.get("edits", EDITS[result["model"]])
    return number


def mean_of(results: list[dict[str, Any]], moment: str, metric: str) -> float:
    """Return the mean of a metric over seeds."""
    return statistics.mean(result[moment][metric] for result in results)


def interval(values: list[float]) -> str:
    """Format a mean with its 95 % interval over seeds (Student's t; none for one)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)
    return f"{mean:.2f} ± {t * statistics.stdev(values) / len(values) ** 0.5:.2f}"
