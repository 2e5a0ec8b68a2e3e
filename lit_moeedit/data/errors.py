"""What is said about facts that cannot be used. Everything quoted from a file is made harmless for a terminal."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_SHOWN = 20


class FactError(ValueError):
    """Something in a source of facts cannot be used.

    Args:
        file: The file as the caller named it, or the source of facts made in memory.
        row: 1-based row, in a `.jsonl`, `.csv` or `.tsv` file the line (where the row begins); `None` if the whole file
            is meant.
        field: Name of the field as the file spells it; `None` if the whole row is meant.
        message: What was found and what was expected.
    """

    def __init__(self, file: str, row: int | None, field: str | None, message: str) -> None:
        super().__init__(file, row, field, message)
        self.file = file
        self.row = row
        self.field = field
        self.message = message

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        field = "" if self.field is None else f", field '{visible(self.field)}'"
        return f"{visible(self.file)}{row}{field}: {self.message}"


class FactsError(FactError):
    """Several rows cannot be used; `row` and `field` are those of the first problem.

    Args:
        file: The file as the caller named it, or the source of facts made in memory.
        problems: The problems found, at least one.
        headline: What the problems mean for the whole, e.g. `"2 of 9 rows cannot be used"`.
    """

    def __init__(self, file: str, problems: Sequence[FactError], headline: str) -> None:
        super().__init__(file, problems[0].row, problems[0].field, headline)
        self.args = (file, problems, headline)
        self.problems = list(problems)

    def __str__(self) -> str:
        lines = [f"{visible(self.file)}: {self.message}", *(f"  {problem}" for problem in self.problems[:_SHOWN])]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more problems")
        return "\n".join(lines)


def visible(text: str) -> str:
    r"""The text with every character escaped that a terminal would obey or not show (controls, overrides, newlines).

    Example:
        >>> visible("Rome\x1b[2J \u202e")
        'Rome\\x1b[2J \\u202e'
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def short(value: object, width: int = 60) -> str:
    """One-line `repr` for messages, bounded in length and depth because values come from untrusted files."""
    # a text is cut first: the repr of one with many escapes is several times as long
    text = repr(value[: width + 1]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= width else f"{text[:width]}..."


def typed(value: object) -> str:
    """`short` with the type, for a value that should have had another one."""
    return "null" if value is None else f"{short(value)} ({type(value).__name__})"
