"""Tables that are part of the package."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib.resources import files


def packaged_table(name: str) -> Iterator[dict[str, str]]:
    """Read the rows of a table in this folder, by the names of its columns; lines that begin with ``#`` are comments.

    Example:
        >>> next(packaged_table("rivers.tsv"))
        {'capital': 'Accra', 'river': 'Odaw'}
    """
    text = files("lit_moeedit.data").joinpath(name).read_text(encoding="utf-8")
    yield from csv.DictReader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")
