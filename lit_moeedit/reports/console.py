"""A report on the console: a short table, and the reasons of the edits that failed."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from lit_moeedit.reports.outcomes import MARKS, Outcome, Totals, outcome_of, worst_first
from lit_moeedit.reports.report import Report
from lit_moeedit.reports.rows import FactRow
from lit_moeedit.reports.table import COLUMNS, Cell, cut

STYLES: dict[Outcome, str] = {
    "failed": "red",
    "lost": "red",
    "undone": "yellow",
    "unmeasured": "",
    "replaced": "",
    "holds": "green",
}
_MAX_WIDTH = 160
_MAX_SENTENCE = 500
_MIN_WIDTH = 4
_MARK = 2
_TEXTS = {"prompt": 1.8, "old → new": 1.7, "before": 1.0, "after": 1.0, "end": 1.0}
"""Columns of texts, which are cut to the room that there is, and the weights of their shares of it."""

_COUNTS = {"p(new)": "p(new)", "paraphrases": "para", "neighbours": "near"}
"""Columns of counts and their headings."""


class ConsoleReport:
    """A report that :meth:`rich.console.Console.print` shows, in 80 columns and in more.

    Texts of facts are cut, and nothing in them is interpreted, neither as markup nor as a control sequence.

    Args:
        report: The report.
        max_rows: Maximum number of facts in the table, and of reasons; the failed ones come first.
    """

    def __init__(self, report: Report, max_rows: int = 20) -> None:
        self.report, self.max_rows = report, max_rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = self.report.rows
        shown = worst_first(rows)[: self.max_rows]
        if shown:
            yield _table(shown, min(options.max_width, _MAX_WIDTH))
            if len(rows) > len(shown):
                yield Text(f"  and {len(rows) - len(shown):,} more", style="dim")
        yield from self._reasons()
        yield _listed([("!", "yellow", Text(cut(warning, _MAX_SENTENCE))) for warning in self.report.warnings])
        for name, left in self.report.survivors.items():
            yield Text(cut(f"{name}: {left}" if name else str(left), _MAX_SENTENCE))
        for name, replayed in self.report.replay.items():
            yield Text(cut(f"Replay {name}: {replayed}" if name else f"Replay: {replayed}", _MAX_SENTENCE))
        for name, held in self.report.hold.items():
            yield Text(cut(f"Hold {name}: {held}" if name else f"Hold: {held}", _MAX_SENTENCE))
        totals = Totals.of(rows)
        style = "bold green" if totals.number == totals.facts["holds"] else "bold"
        yield Text(totals.headline, style=style)

    def _reasons(self) -> RenderResult:
        given = [row for row in worst_first(self.report.rows) if row.reason]
        lines = []
        for row in given[: self.max_rows]:
            outcome = outcome_of(row)
            about = (f"{cut(row.prompt, 60)} → {cut(row.target_new, 30)}: ", "bold")
            lines.append((MARKS[outcome], STYLES[outcome], Text.assemble(about, cut(row.reason or "", _MAX_SENTENCE))))
        yield _listed(lines)
        if len(given) > self.max_rows:
            yield Text(f"   and {len(given) - self.max_rows:,} more reasons", style="dim")


def _listed(lines: list[tuple[str, str, Text]]) -> Table:
    """Put marks before texts that may take several lines."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=_MARK, justify="right")
    grid.add_column()
    for mark, style, text in lines:
        grid.add_row(Text(mark, style=style), text)
    return grid


def _table(rows: list[FactRow], width: int) -> Table:
    """Make a table of exactly ``width`` columns at most, in which no cell wraps."""
    cells = {name: [_text(name, row) for row in rows] for name in (*_TEXTS, *_COUNTS)}
    filled = {name: texts for name, texts in cells.items() if any(texts)}
    widths = {name: max(cell_len(text) for text in (_COUNTS.get(name, name), *texts)) for name, texts in filled.items()}
    room = width - _MARK - len(widths)
    while sum(widths.values()) > room:
        widest = max(_TEXTS, key=lambda name: widths.get(name, 0) / _TEXTS[name])
        if widths[widest] <= _MIN_WIDTH:
            break
        widths[widest] -= 1
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("", width=_MARK, justify="right")
    for name, column in widths.items():
        is_count = name in _COUNTS
        table.add_column(_COUNTS.get(name, name), width=column, justify="right" if is_count else "left", no_wrap=True)
    for index, row in enumerate(rows):
        outcome = outcome_of(row)
        texts = [_fit(name, row, texts[index], widths[name]) for name, texts in filled.items()]
        table.add_row(Text(MARKS[outcome], style=STYLES[outcome]), *texts)
    return table


def _text(column: str, row: FactRow) -> str:
    if column == "old → new":
        return f"{cut(row.target_true or '', _MAX_WIDTH)} → {cut(row.target_new, _MAX_WIDTH)}".strip()
    cell: Cell = COLUMNS[column](row)
    if isinstance(cell, float):
        return f"{cell:.2f}" if cell == cell else ""
    return "" if cell is None else cut(str(cell), _MAX_WIDTH)


def _fit(column: str, row: FactRow, text: str, width: int) -> Text:
    """Cut a cell to the width of its column, so that what tells facts apart stays visible."""
    if cell_len(text) > width and column == "prompt":
        start = text.find(cut(row.subject, _MAX_WIDTH))
        if start > 0 and cell_len(text[: start + len(row.subject)]) >= width:
            text = f"…{text[start:]}"
    elif cell_len(text) > width and column == "old → new" and row.target_true:
        half = (width - 3) // 2
        old, new = text.split(" → ", 1)
        old_room = max(half, width - 3 - cell_len(new))
        text = f"{_shorten(old, old_room)} → {_shorten(new, width - 3 - min(cell_len(old), old_room))}"
    return Text(_shorten(text, width))


def _shorten(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return f"{set_cell_size(text, width - 1).rstrip()}…"
