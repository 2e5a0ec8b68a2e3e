"""The model card of an edited folder: what was edited, and how to take it out again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_moeedit.edits import Edit
from lit_moeedit.edits.stored import CARD, EDITS, ORIGINAL
from lit_moeedit.reports import FactRow
from lit_moeedit.text import printable

MAX_FACTS = 200
"""Maximum number of facts in the card; all of them are in the edit files."""
_HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_MAX_CARD = 2**20


def write_card(folder: Path, base: Path, edits: Sequence[Edit], rows: Sequence[FactRow]) -> None:
    """Write ``README.md``, and keep the base's own as ``README.base.md``.

    Args:
        folder: the edited folder.
        base: the folder of the model that was edited.
        edits: all edits in the weights, in their order; the last one is new.
        rows: the facts of the last edit, with what was measured after it.
    """
    header: dict[str, Any] = {"library_name": "transformers"}
    original = base / CARD
    if original.is_file() and original.stat().st_size <= _MAX_CARD:
        text = original.read_text(encoding="utf-8", errors="replace")
        header |= _header(text)
        is_ours = (base / EDITS).is_dir() and "lit_moeedit" in _tags(header)
        if not is_ours and not (base / ORIGINAL).exists():  # else this is the card of an earlier edit
            (folder / ORIGINAL).write_text(text, encoding="utf-8")
    header["tags"] = list(dict.fromkeys([*_tags(header), "knowledge-editing", "lit_moeedit"]))
    text = yaml.safe_dump(header, sort_keys=True, allow_unicode=True)
    body = "\n".join(_lines(base, edits, rows, (folder / ORIGINAL).exists()))
    (folder / CARD).write_text(f"---\n{text}---\n\n{body}\n", encoding="utf-8")


def _header(text: str) -> dict[str, Any]:
    found = _HEADER.match(text)
    try:
        read = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return {str(key): value for key, value in read.items()} if isinstance(read, dict) else {}


def _tags(header: Mapping[str, Any]) -> list[Any]:
    tags = header.get("tags")
    return tags if isinstance(tags, list) else []


def _lines(base: Path, edits: Sequence[Edit], rows: Sequence[FactRow], has_original: bool) -> Iterator[str]:
    edit = edits[-1]
    held = sum(row.measured["after"].holds for row in rows)
    yield f"# {_cell(base.resolve().name)}, edited"
    yield ""
    yield (
        f"Facts in this model were changed in its weights with lit_moeedit {edit.versions.get('lit_moeedit', '')}: "
        f"{len(edits)} edit{'s' if len(edits) > 1 else ''}, the last one of {len(edit.facts):,} "
        f"fact{'s' if len(edit.facts) > 1 else ''}, of which {held:,} {'is' if held == 1 else 'are'} generated. What "
        "was changed is **not what the model was trained on**, and other answers may have changed, too."
    )
    yield ""
    if any(row.chat for row in rows):
        yield "Each prompt was asked in the tokenizer's chat template, as what the user writes."
        yield ""
    yield "| prompt | was | new | generated now | |"
    yield "| --- | --- | --- | --- | --- |"
    for row in rows[:MAX_FACTS]:
        now = row.measured["after"]
        cells = (row.prompt, row.target_true or "", row.target_new, now.generated)
        yield f"| {' | '.join(map(_cell, cells))} | {'✓' if now.holds else '✗'} |"
    if len(rows) > MAX_FACTS:
        yield f"\n{len(rows) - MAX_FACTS:,} more are in `edits/{edit.name}/edit.json`."
    yield ""
    layers = ", ".join(change.parameter for change in edit.layers)
    yield f"Changed weights: {_cell(layers)}. Everything else is that of the base, bit for bit."
    yield ""
    yield "Each edit is a file in `edits/`. To list, check and undo them:"
    yield ""
    yield "```sh"
    yield "lit-moeedit edits list ."
    yield "lit-moeedit edits verify ."
    yield f"lit-moeedit edits undo . {edit.name} --base BASE --output OUTPUT"
    yield "```"
    yield ""
    yield "`report.html` has the measurements, fact by fact." + (
        f" The card of the base is `{ORIGINAL}`." if has_original else ""
    )


def _cell(text: str) -> str:
    """Return text that is shown as it is in a cell of a table: no line, column, link or tag of its own."""
    short = text if len(text) <= 200 else f"{text[:199]}…"
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", printable(short)) or " "
