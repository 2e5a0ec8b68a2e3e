"""Figures of ``summary.json``, and their table on the console."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_moeedit.text import printable

MOMENTS = ("before", "after", "after_training")
_SHOWN = (
    "efficacy",
    "efficacy_accuracy",
    "generalization",
    "generalization_accuracy",
    "specificity",
    "specificity_accuracy",
    "specificity_retained",
    "score",
    "utility",
    "truth_recalled",
)
_SHOWN_OF_EACH = ("efficacy", "generalization", "specificity_retained", "score")


def mean_metrics(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Average metrics over parts of the facts.

    Args:
        parts: number of facts and their metrics; a part for which nothing was counted (NaN) has no weight.

    Example:
        >>> mean_metrics([(1, {"efficacy": 1.0, "score": float("nan")}), (3, {"efficacy": 0.0, "score": 0.5})])
        {'efficacy': 0.25, 'score': 0.5}
    """
    means = {}
    for name in dict.fromkeys(name for _, metrics in parts for name in metrics):
        counted = [(facts, metrics[name]) for facts, metrics in parts if not math.isnan(metrics.get(name, math.nan))]
        total = sum(facts for facts, _ in counted)
        means[name] = sum(facts / total * value for facts, value in counted) if total else math.nan
    return means


def summarize_routing(shift: Mapping[str, float]) -> dict[str, Any]:
    """Select from the routing metrics of an edit, ``None`` for those that were not measured."""
    layers = {k.rpartition("_")[2]: value for k, value in shift.items() if k.startswith("similarity/layer")}
    return {"similarity": shift.get("similarity/mean"), "kl": shift.get("kl/mean"), "per_layer": layers}


def without_nan(value: Any) -> Any:
    """Replace every number that is not finite, which JSON does not know, by ``None``."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_table(summary: Mapping[str, Any]) -> Table:
    """Make the table of a summary: all edits, then a section for each editor if there are several."""
    seconds = summary["seconds"]
    renewed = f", renewed {summary['renewals']} times" if summary["renewals"] else ""
    table = Table(
        title=f"{summary['edits']} edits with {summary['solver']} in {seconds['edit']:.1f} s{renewed}",
        caption="routing similarity by layer: "
        + ", ".join(f"{layer}: {_number(value)}" for layer, value in summary["routing"]["per_layer"].items()),
    )
    for column in ("", "before", "after the edit", "at the end"):
        table.add_column(column, justify="left" if not column else "right")
    groups = sorted(name for name in summary["after"] if name.startswith("specificity_retained_"))
    _add_rows(table, summary, (*_SHOWN, *groups))
    table.add_row("perplexity", *(_number(summary["perplexity"][moment]) for moment in MOMENTS))
    for label, editor in summary.get("editors", {}).items():
        table.add_section()
        table.add_row(escape(printable(f"{label}: {editor['edits']} edits with {editor['solver']}")))
        _add_rows(table, editor, _SHOWN_OF_EACH)
    return table


def _add_rows(table: Table, found: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        # a facts file may call a group of neighbours anything
        shown = escape(printable(name.replace("_", " ")))
        table.add_row(shown, *(_number((found[moment] or {}).get(name)) for moment in MOMENTS))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
