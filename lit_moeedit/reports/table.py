"""The facts of a report as a table of plain values, for the console, for loggers and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lit_moeedit.reports.outcomes import WORDS, latest, outcome_of, worst_first
from lit_moeedit.reports.rows import FactRow, Moment
from lit_moeedit.text import printable

Cell = str | float | None

COLUMNS: dict[str, Callable[[FactRow], Cell]] = {
    "outcome": lambda row: WORDS[outcome_of(row)],
    "prompt": lambda row: row.prompt,
    "old": lambda row: row.target_true,
    "new": lambda row: row.target_new,
    "before": lambda row: _generated(row, "before"),
    "after": lambda row: _generated(row, "after"),
    "end": lambda row: _generated(row, "end"),
    "p(new)": lambda row: None if (now := latest(row)) is None else now.p_new,
    "p(old)": lambda row: None if (now := latest(row)) is None else now.p_true,
    "paraphrases": lambda row: _held(None if (now := latest(row)) is None else now.paraphrases),
    "neighbours": lambda row: _held(None if (now := latest(row)) is None else now.neighbours),
    "reason": lambda row: row.reason,
    "editor": lambda row: row.name,
    "edit": lambda row: row.edit,
    "epoch": lambda row: row.epoch,
    "step": lambda row: row.step,
}
"""Cell of each column of a fact. Probabilities and counts are those of the last measured moment."""


def facts_table(rows: Sequence[FactRow]) -> tuple[list[str], list[list[Cell]]]:
    """Make the table of facts, the failed ones first.

    Returns:
        The names of the columns, without those that are empty for every fact, and the cells row by row. A probability
        that was not measured is ``None``.
    """
    ordered = worst_first(rows)
    columns = {name: [_without_nan(cell(row)) for row in ordered] for name, cell in COLUMNS.items()}
    filled = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    return list(filled), [list(cells) for cells in zip(*filled.values(), strict=True)]


def markdown(rows: Sequence[FactRow], max_rows: int = 200) -> str:
    """Format the table of facts as Markdown; texts of facts are escaped.

    Args:
        rows: The facts.
        max_rows: Maximum number of rows; a line gives the number of the others.
    """
    names, table = facts_table(rows)
    if not table:
        return "No fact has been edited.\n"
    lines = [names, ["---"] * len(names), *([_markdown(cell) for cell in cells] for cells in table[:max_rows])]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + (f"\nand {len(table) - max_rows:,} more\n" if len(table) > max_rows else "")


def cut(text: str, length: int) -> str:
    """Cut a text to a number of characters, and escape what would harm a terminal or a page.

    Example:
        >>> cut("The capital of France is", 12)
        'The capital…'
    """
    # longer than needed, as an escape is longer than its character
    shown = printable(text[: length + 1])
    return shown if len(shown) <= length else f"{shown[: length - 1].rstrip()}…"


def _generated(row: FactRow, moment: Moment) -> str | None:
    measured = row.measured.get(moment)
    return None if measured is None else measured.generated.strip()


def _held(counts: tuple[int, int] | None) -> str | None:
    return None if counts is None or not counts[1] else f"{counts[0]}/{counts[1]}"


def _without_nan(cell: Cell) -> Cell:
    return None if isinstance(cell, float) and math.isnan(cell) else cell


def _markdown(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    # letters and digits need no escape, and whatever else might mean something gets one
    return "".join(
        c if c.isalnum() or c in " .,/()" or not c.isascii() else f"&#{ord(c)};"
        for c in cut("" if cell is None else str(cell), 200)
    )
