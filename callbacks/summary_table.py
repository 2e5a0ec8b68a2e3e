"""The table of ``summary.json`` on the console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lit_moeedit.callbacks.summary import COSTS, MOMENTS
from lit_moeedit.reports.meanings import MEANINGS
from lit_moeedit.text import printable

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
)
_SHOWN_OF_EACH = ("efficacy", "generalization", "specificity_retained", "score")


def make_table(summary: Mapping[str, Any]) -> Table:
    """Make the table of a summary: all edits, then a section for each editor if there are several."""
    total = sum(summary["seconds"][phase] for phase in COSTS)
    times = summary["renewals"]
    renewed = f", renewed {'once' if times == 1 else f'{times} times'}" if times else ""
    routing = ", ".join(f"{layer}: {_number(value)}" for layer, value in summary["routing"]["per_layer"].items())
    table = Table(
        title=f"{summary['edits']} edits with {summary['solver']} in {total:.1f} s{renewed}",
        caption=f"routing similarity by layer: {routing}" if routing else None,
    )
    for column in ("", "before", "after the edit", "at the end"):
        table.add_column(column, justify="left" if not column else "right")
    groups = sorted(name for name in summary["after"] if name.startswith("specificity_retained_"))
    further = [name for name in MEANINGS if name in summary["after"] and name not in _SHOWN]
    _add_rows(table, summary, (*_SHOWN, *groups, *further))
    _add_row(table, "perplexity", [summary["perplexity"][moment] for moment in MOMENTS])
    for label, editor in summary.get("editors", {}).items():
        table.add_section()
        table.add_row(escape(printable(f"{label}: {editor['edits']} edits with {editor['solver']}")))
        _add_rows(table, editor, _SHOWN_OF_EACH)
    return table


def _add_rows(table: Table, found: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        # a facts file may call a group of neighbours anything
        shown = escape(printable(name.replace("_", " ")))
        _add_row(table, shown, [(found[moment] or {}).get(name) for moment in MOMENTS])


def _add_row(table: Table, title: str, values: Sequence[float | None]) -> None:
    if any(value is not None for value in values):
        table.add_row(title, *map(_number, values))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
