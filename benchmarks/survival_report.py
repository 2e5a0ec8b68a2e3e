"""The table and the picture of the benchmark of survival."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.training import STANDIN, header, row
from benchmarks.training import mean_of as by_fact

NAMES = ("atlas", "counterfact", STANDIN)
PICTURED = NAMES[:2]
EDITS = {"atlas": 32, "counterfact": 100, STANDIN: 100}
"""Number of edits of the configs, which results of earlier versions do not tell."""
CALM = ("1x", "3x", "10x", "adapters")
"""Continuations in the picture: those without contradictions that all seeds have."""
DRAWN = {
    "nothing": "no protection",
    "replay 5 %": "replay",
    "replay 5 %, renewed at the end": "replay, renewed at the end",
}
"""Conditions in the picture, and their names there."""
MEASURED = {"efficacy_accuracy": "prompts", "generalization_accuracy": "paraphrases"}
"""Metrics in the picture, and their names there."""


def tables(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown, with those of earlier versions apart, which do not tell so much of a run."""
    now = [result for result in results if is_of_now(result)]
    own = [result for result in results if "weights" in result and result not in now]
    parts = [
        ("", now),
        ("With some of the neighbours' prompts in the preserved text:", own),
        ("Likewise, of other weights, trained before on another machine:", [r for r in results if r not in own + now]),
    ]
    return "\n\n".join("\n\n".join(filter(None, (title, table(part)))) for title, part in parts if part)


def table(results: list[dict[str, Any]]) -> str:
    """Format results as Markdown: means over seeds, with 95 % intervals."""
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
        shown = at_end(own, "efficacy_accuracy") if is_edited else "-"
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
                    generalization(own) if is_edited else "-",
                    at_end(own, "specificity_retained") if is_edited else "-",
                    percent(ratios(own, base, "train_loss")), percent(ratios(own, never, "perplexity")),
                    f"{statistics.mean(times):.2f}" if times else "-",
                )
            )
        )  # fmt: skip
    return "\n".join(lines)


def at_end(own: list[dict[str, Any]], metric: str) -> str:
    """Format a metric at the end: its mean, with its interval over the facts if all runs tell it of each fact.

    Otherwise the share of the edits that are generated has an interval over the seeds, and other metrics have none.
    """
    if all(metric in r.get("by_fact", ()) for r in own):
        return by_fact([{**r["end"], "by_fact": r["by_fact"]} for r in own], metric)
    if metric == "efficacy_accuracy":
        return interval([r["end"][metric] for r in own])
    return f"{mean_of(own, 'end', metric):.{2 if metric == 'generalization' else 3}f}"


def generalization(own: list[dict[str, Any]]) -> str:
    """Format generalization after the edit and at the end; that of paraphrases that are not stated, if some are."""
    shown = f"{mean_of(own, 'after', 'generalization'):.2f} to {at_end(own, 'generalization')}"
    if "paraphrases" not in own[0]["condition"] or any(result["unstated"]["end"] is None for result in own):
        return shown
    others = " to ".join(f"{mean_of(own, 'unstated', moment):.2f}" for moment in ("after", "end"))
    return f"{shown} (others than the stated, generated, {others})"


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


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw what is left of the edits at the end, without protection and with: a dot for each run, a bar for the mean.

    Shown are the continuations without contradictions, with as many edits as the configs have. Results that do not tell
    their weights are left out. Runs that preserve no neighbour's prompt are shown where there is one of every case of
    the others, so that all bars are of the same kind.

    Args:
        results: of all runs.
        path: of the picture.
    """
    known = [r for r in results if "end" in r and "weights" in r and edits_of(r) == EDITS[r["model"]]]
    now, before = ([r for r in known if is_drawn(r) and is_of_now(r) == is_now] for is_now in (True, False))
    of_now, of_before = (
        {(r["model"], r["seed"], r["continuation"], r["condition"]) for r in part} for part in (now, before)
    )
    shown = now if of_now >= of_before else before
    figure, grid = plt.subplots(2, 2, figsize=(10, 6), sharex=True, sharey="col", layout="constrained")
    width = 0.8 / len(DRAWN)
    for axes_row, name in zip(grid, PICTURED, strict=True):
        for axes, (metric, title) in zip(axes_row, MEASURED.items(), strict=True):
            own = [r for r in shown if r["model"] == name]
            for series, (condition, label) in enumerate(DRAWN.items()):
                for place, continuation in enumerate(CALM):
                    here = [r for r in own if r["continuation"] == continuation and r["condition"] == condition]
                    shares, x = [r["end"][metric] for r in here], place + (series - 1) * width
                    if shares:
                        axes.bar(x, statistics.mean(shares), width, color=f"C{series}", alpha=0.5)
                        axes.plot([x] * len(shares), shares, "o", color=f"C{series}", markersize=3)
                axes.bar(0, 0, color=f"C{series}", alpha=0.5, label=label)
            if own:
                after = statistics.mean(result["after"][metric] for result in own)
                axes.axhline(after, color="0.3", linewidth=1, linestyle=":", label="right after the edit")
            axes.set_title(f"{name}, {EDITS[name]} edits: {title}", fontsize=10)
            axes.set_xticks(range(len(CALM)), CALM)
            axes.set_ylim(0, 1.03)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle("Share that is left of the edits after further training (learning rate, or adapters alone)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def is_of_now(result: Mapping[str, Any]) -> bool:
    """Tell if a run preserved no neighbour's prompt; those of earlier versions do not tell, and did."""
    return not result.get("neighbours_preserved", True)


def is_drawn(result: Mapping[str, Any]) -> bool:
    """Tell if a run is of a case in the picture."""
    return result["model"] in PICTURED and result["continuation"] in CALM and result["condition"] in DRAWN


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
