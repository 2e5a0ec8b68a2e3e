"""Errors about facts that cannot be used. All text quoted from a file is made safe for a terminal."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

from lit_moeedit.text import printable

_MAX_LINES = 20


class FactError(ValueError):
    """A part of a source of facts that cannot be used.

    Args:
        file: The file as the caller named it, or the name of a source in memory.
        row: The row, from 1; in a `.jsonl`, `.csv` or `.tsv` file the line where the row begins. `None` for the whole
            file.
        field: The name of the field in the file; `None` for the whole row.
        message: The value found, and the expected one.
    """

    def __init__(self, file: str, row: int | None, field: str | None, message: str) -> None:
        super().__init__(file, row, field, message)
        self.file = file
        self.row = row
        self.field = field
        self.message = message

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        field = "" if self.field is None else f", field '{printable(self.field)}'"
        return f"{printable(self.file)}{row}{field}: {self.message}"


class FactsError(FactError):
    """Several rows that cannot be used; `row` and `field` are those of the first problem.

    Args:
        file: The file as the caller named it, or the name of a source in memory.
        problems: The problems, at least one.
        headline: A summary of the problems, e.g. `"2 of 9 rows cannot be used"`.
    """

    def __init__(self, file: str, problems: Sequence[FactError], headline: str) -> None:
        super().__init__(file, problems[0].row, problems[0].field, headline)
        self.args = (file, problems, headline)
        self.problems = list(problems)

    def __str__(self) -> str:
        lines = [f"{printable(self.file)}: {self.message}", *(f"  {problem}" for problem in self.problems[:_MAX_LINES])]
        if len(self.problems) > _MAX_LINES:
            lines.append(f"  ... and {len(self.problems) - _MAX_LINES} more problems")
        return "\n".join(lines)


def short(value: object, width: int = 60) -> str:
    """Format a value of an untrusted file for a message: its `repr` in one line of bounded length and depth."""
    # a text is cut first, because the repr of a text with many escapes is several times as long
    text = repr(value[: width + 1]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= width else f"{text[:width]}..."


def typed(value: object) -> str:
    """Format a value of the wrong type for a message: `short` with the type."""
    return "null" if value is None else f"{short(value)} ({type(value).__name__})"
