"""The model card of an edited folder: what was edited, and how to take it out again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_moeedit.editing.measured import Measured
from lit_moeedit.edits.edit import Edit
from lit_moeedit.edits.stored import CARD, EDITS, ORIGINAL
from lit_moeedit.text import printable

MAX_FACTS = 200
"""Maximum number of facts in the card; all of them are in the edit files."""
_HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_MAX_CARD = 2**20
_TAGS = {"knowledge-editing", "lit_moeedit"}
"""Tags of the cards that are written here."""


@dataclass(frozen=True)
class CardRow:
    """A fact in the card.

    Attributes:
        prompt: the prompt; of a question to a chat model the question alone.
        target_true: the true target; ``None`` if it is not known.
        target_new: the new target.
        after: what was measured after the edit; ``None`` if nothing was.
        chat: whether the prompt was put into the tokenizer's chat template.
    """

    prompt: str
    target_true: str | None
    target_new: str
    after: Measured | None = None
    chat: bool = False


def write_card(
    folder: Path, source: Path, edits: Sequence[Edit], rows: Sequence[CardRow] = (), base: Path | None = None
) -> None:
    """Write ``README.md`` of a folder with edits, and keep the base's own as ``README.base.md``.

    Without edits, the base's own becomes ``README.md`` again.

    Args:
        folder: the folder that is written.
        source: the folder of the model from which it was made, which may have edits itself.
        edits: all edits in the weights, in their order.
        rows: the facts of the last edit, if it is new, with what was measured after it. By default those of all edits,
            of which nothing is measured now.
        base: folder of the unedited model, if it is not ``source``.
    """
    own, original = _read(source / CARD), _read(source / ORIGINAL)
    is_ours = own is not None and (source / EDITS).is_dir() and set(map(str, _tags(_header(own)))) >= _TAGS
    if original is None and not is_ours:
        original = own
    if not edits:
        (folder / ORIGINAL).unlink(missing_ok=True)
        if original is not None:
            (folder / CARD).write_text(original, encoding="utf-8")
        return
    if original is not None:
        (folder / ORIGINAL).write_text(original, encoding="utf-8")
    header: dict[str, Any] = {"library_name": "transformers"} | _header(original or own or "")
    header["tags"] = list(dict.fromkeys([*_tags(header), *sorted(_TAGS)]))
    text = yaml.safe_dump(header, sort_keys=True, allow_unicode=True)
    if not rows:
        facts = {fact.prompt: fact for edit in edits for fact in edit.facts}
        rows = [CardRow(fact.prompt, fact.target_true, fact.target_new) for fact in facts.values()]
    body = "\n".join(_lines((base or source).resolve().name, edits, rows, original is not None))
    (folder / CARD).write_text(f"---\n{text}---\n\n{body}\n", encoding="utf-8")


def _read(path: Path) -> str | None:
    """Read a card; ``None`` if there is none, or none of a card's size."""
    if not path.is_file() or path.stat().st_size > _MAX_CARD:
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _tags(header: Mapping[str, Any]) -> list[Any]:
    tags = header.get("tags")
    return tags if isinstance(tags, list) else []


def _header(text: str) -> dict[str, Any]:
    found = _HEADER.match(text)
    try:
        read = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return {str(key): value for key, value in read.items()} if isinstance(read, dict) else {}


def _lines(name: str, edits: Sequence[Edit], rows: Sequence[CardRow], has_original: bool) -> Iterator[str]:
    edit, measured = edits[-1], [row.after for row in rows if row.after is not None]
    yield f"# {_cell(name)}, edited"
    yield ""
    if measured:
        held = sum(after.holds for after in measured)
        which = f", the last one of {_counted(len(edit.facts), 'fact')}, of which {held:,} "
        which += f"{'is' if held == 1 else 'are'} generated"
    else:
        which = f" of {_counted(len(rows), 'fact')}; what is generated now has not been measured"
    yield (
        f"Facts in this model were changed in its weights with lit_moeedit {edit.versions.get('lit_moeedit', '')}: "
        f"{_counted(len(edits), 'edit')}{which}. What was changed is **not what the model was trained on**, and other "
        "answers may have changed, too."
    )
    yield ""
    if any(row.chat for row in rows):
        yield "Each prompt was asked in the tokenizer's chat template, as what the user writes."
        yield ""
    yield "| prompt | was | new |" + (" generated now | |" if measured else "")
    yield "| --- | --- | --- |" + (" --- | --- |" if measured else "")
    for row in rows[:MAX_FACTS]:
        now = row.after
        cells = (row.prompt, row.target_true or "", row.target_new, *([] if now is None else [now.generated]))
        yield f"| {' | '.join(map(_cell, cells))} |" + ("" if now is None else f" {'✓' if now.holds else '✗'} |")
    if len(rows) > MAX_FACTS:
        where = f"`edits/{edit.name}/edit.json`" if measured else "the files in `edits/`"
        yield f"\n{len(rows) - MAX_FACTS:,} more are in {where}."
    yield ""
    changed = edit.layers if measured else [change for own in edits for change in own.layers]
    layers = ", ".join(dict.fromkeys(change.parameter for change in changed))
    yield f"Changed weights: {_cell(layers)}. Everything else is that of the base, bit for bit."
    yield ""
    yield "Each edit is a file in `edits/`. To list, check and undo them:"
    yield ""
    yield "```sh"
    yield "lit-moeedit edits list ."
    yield "lit-moeedit edits verify ."
    yield f"lit-moeedit edits undo . {edit.name} --base BASE --output OUTPUT"
    yield "```"
    ends = ["`report.html` has the measurements, fact by fact."] if measured else []
    ends += [f"The card of the base is `{ORIGINAL}`."] if has_original else []
    if ends:
        yield ""
        yield " ".join(ends)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _cell(text: str) -> str:
    """Return text that is shown as it is in a cell of a table: no line, column, link or tag of its own."""
    short = text if len(text) <= 200 else f"{text[:199]}…"
    return re.sub(r"([\\`*_{}\[\]<>#|!~&])", r"\\\1", printable(short)) or " "
