"""``edits.jsonl``: one line for each fact."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.reports.plain import from_plain, to_plain
from lit_moeedit.reports.rows import FactRow

FILE = "edits.jsonl"


def write_rows(rows: Iterable[FactRow], folder: str | Path) -> Path:
    """Write ``edits.jsonl`` into a folder; the file appears complete or not at all.

    Each line is strict JSON in UTF-8. Numbers that are not finite are ``null``.

    Returns:
        The path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(folder, FILE)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        for row in rows:
            line = json.dumps(to_plain(row.to_dict()), ensure_ascii=False, allow_nan=False)
            # half of a surrogate pair becomes \udXXX, which is JSON's own escape
            file.write(line.encode("utf-8", "backslashreplace") + b"\n")
    return path


def read_rows(path: str | Path) -> tuple[FactRow, ...]:
    """Read and check the rows of ``edits.jsonl``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line does not hold a row. The message names the file, the line and the field.
    """
    rows = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            rows.append(from_plain(FactRow, value, where))
    return tuple(rows)
