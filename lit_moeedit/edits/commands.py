"""The commands ``edits list``, ``show``, ``apply``, ``undo`` and ``verify``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from lit_moeedit.edits.adapters import to_peft
from lit_moeedit.edits.apply import apply, undo, verify
from lit_moeedit.edits.edit import Edit
from lit_moeedit.edits.files import HEADER, edits_of, read_edits
from lit_moeedit.edits.folders import load_model, new_folder, save_model
from lit_moeedit.edits.stored import StoredModel
from lit_moeedit.terminal import progress
from lit_moeedit.text import first_few, printable

log = logging.getLogger(__name__)


def list_edits(folder: Path) -> None:
    """List the edits in a folder: of a model that has some, or of edits.

    Nothing but the edits is read, so this does not tell if they are in the model's weights; edits verify does.

    Args:
        folder: a model's folder with a folder "edits", or a folder of edits.

    Raises:
        ValueError: if a file of an edit cannot be used.
        OSError: if there is no such folder.

    Example:
        lit-moeedit edits list my-model
    """
    table = Table("order", "name", "id", "facts", "layers", "made on", "efficacy")
    for edit in read_edits(folder):
        efficacy = edit.metrics_after.get("efficacy")
        table.add_row(
            str(edit.order),
            edit.name,
            edit.id[:12],
            f"{len(edit.facts):,}",
            str(len(edit.layers)),
            ", ".join(edit.made_on.values()) or "the base",
            "" if efficacy is None else f"{efficacy:.3f}",
        )
    _console().print(table)


def show_edits(folder: Path, name: str | None = None) -> None:
    """Show an edit: its facts, its settings, its layers, and its metrics.

    Args:
        folder: the folder of an edit, of several, or of a model that has some.
        name: name of one edit; all of them by default.

    Raises:
        ValueError: if there is no such edit, or a file cannot be used.
        OSError: if there is no such folder.

    Example:
        lit-moeedit edits show my-model capitals
    """
    edits = read_edits(folder)
    chosen = [edit for edit in edits if name in (None, edit.name)]
    if not chosen:
        raise ValueError(f"{folder} has no edit {name!r}; its edits are {first_few((e.name for e in edits), 20)}")
    console = _console()
    for edit in chosen:
        for line in _lines(edit):
            console.print(printable(line))


def apply_edits(
    model: Path,
    edits: list[Path],
    *,
    output: Path,
    format: Literal["weights", "peft"] = "weights",
    base: Path | None = None,
    rank: int | None = None,
    allow_siblings: bool = False,
    allow_rounding: bool = False,
    allow_square: bool = False,
    overwrite: bool = False,
) -> None:
    """Apply edits to a model, and write the edited model or an adapter.

    All is checked before anything is written: that the model is the one on which the edits were made, that none is
    missing, and that the edited weights are those in which they were made, bit by bit. Nothing that comes with the
    model is executed. Memory is needed for the whole model.

    Args:
        model: local folder of a model. Edits in its folder "edits" are in its weights already.
        edits: folders of edits or of several edits, in the order in which they were made.
        output: the folder to write. It appears when it is complete.
        format: weights for the edited model, with its tokenizer and its edits, or peft for an adapter to the model.
        base: local folder of the unedited model, if the model has edits already that must be rounded with the others.
        rank: maximum rank of an adapter's change of an expert; by default all of it.
        allow_siblings: whether to add up edits that were made without each other.
        allow_rounding: whether to accept a result that differs in last places, as on another machine.
        allow_square: whether to write an adapter of square experts, which a peft older than 0.19 would transpose.
        overwrite: whether to replace an existing output.

    Raises:
        ValueError: if the edits do not fit together or the model, or a file cannot be used.
        FileExistsError: if the output exists already.
        OSError: if a folder cannot be read or written.

    Example:
        lit-moeedit edits apply my-model edits/capitals --output my-edited-model
    """
    if rank is not None and format != "peft":
        raise ValueError("--rank is of an adapter: give --format peft, too, or leave it out")
    _refuse_swapped(model, edits)
    given = [edit for path in edits for edit in read_edits(path)]
    present = edits_of(model)
    ids = {edit.id for edit in present}
    new = [edit for edit in given if edit.id not in ids]
    if not new:
        raise ValueError(f"already in {model}: {first_few(edit.name for edit in given)}; nothing is written")
    with new_folder(output, overwrite, [model, *edits, *([base] if base else [])]) as beside:
        stored = StoredModel(model)
        loaded = load_model(stored)
        with progress() as show:
            placed = apply(
                loaded,
                [*present, *new],
                base=base,
                allow_siblings=allow_siblings,
                allow_rounding=allow_rounding,
                report=partial(show, "layers"),
            )
        if format == "weights":
            changed = {name for edit in placed for name in edit.changes}
            save_model(stored, loaded, changed, placed, beside, base=base)
        else:
            to_peft(new, beside, rank, allow_siblings=allow_siblings, allow_square=allow_square, overwrite=True)
    log.info("%s: %s", output, first_few(edit.name for edit in new))


def undo_edits(
    model: Path,
    names: list[str],
    *,
    output: Path,
    base: Path | None = None,
    approximate: bool = False,
    allow_rounding: bool = False,
    overwrite: bool = False,
) -> None:
    """Take edits out of a model, and write it without them.

    The changed experts are rebuilt from the base and the edits that remain, bit by bit as if the others had never been
    made. Other weights stay as they are in the model.

    Args:
        model: local folder of a model, with all edits of its weights in its folder "edits".
        names: names of the edits to take out.
        output: the folder to write. It appears when it is complete.
        base: local folder of the unedited model; needed unless --approximate.
        approximate: whether to subtract the changes instead, after which some elements differ in the last place.
        allow_rounding: whether to accept a result that differs in last places, as on another machine.
        overwrite: whether to replace an existing output.

    Raises:
        ValueError: if there is no such edit, others were made on it, or the weights are not those of the edits.
        FileExistsError: if the output exists already.
        OSError: if a folder cannot be read or written.

    Example:
        lit-moeedit edits undo my-edited-model capitals --base my-model --output my-other-model
    """
    edits = read_edits(model)
    with new_folder(output, overwrite, [model, *([base] if base else [])]) as beside:
        stored = StoredModel(model)
        loaded = load_model(stored)
        with progress() as show:
            left = undo(
                loaded,
                edits,
                names,
                base=base,
                approximate=approximate,
                allow_rounding=allow_rounding,
                report=partial(show, "layers"),
            )
        save_model(stored, loaded, {name for edit in edits for name in edit.changes}, left, beside, base=base)
    log.info("%s has the edits: %s", output, first_few(edit.name for edit in left) or "none")


def verify_edits(model: Path, edits: Path | None = None) -> None:
    """Check which edits are in a model's weights, layer by layer.

    The exit code is 1 if one is missing.

    Args:
        model: local folder of a model.
        edits: folder of edits; by default the folder "edits" of the model.

    Raises:
        ValueError: if an edit is not in the weights, or a file cannot be used.
        OSError: if a folder cannot be read.

    Example:
        lit-moeedit edits verify my-edited-model
    """
    known = read_edits(edits or model)
    found = verify(load_model(model), known)
    table = Table("edit", "parameter", "status")
    for presence in found:
        status = presence.status + ("" if presence.is_exact or presence.status == "unknown" else ", up to rounding")
        table.add_row(presence.edit.name, presence.parameter, status)
    _console().print(table)
    absent = {presence.edit.name for presence in found if presence.status != "applied"}
    if absent:
        raise ValueError(f"{len(absent)} of {len(known)} edits are not in the weights: {first_few(sorted(absent))}")


def _refuse_swapped(model: Path, edits: Sequence[Path]) -> None:
    """Refuse edits in the place of the model, and the model among the edits."""
    models = [path for path in edits if (path / "config.json").is_file()]
    found = [model / HEADER, *model.glob(f"*/{HEADER}")] if model.is_dir() else [model]
    is_model = (model / "config.json").is_file()
    if models and not is_model and any(path.name == HEADER and path.is_file() for path in found):
        raise ValueError(f"{model} is a folder of edits, and {models[0]} a model: give the model first, then the edits")


def _console() -> Console:
    return Console(soft_wrap=True, markup=False, emoji=False, highlight=False)


def _lines(edit: Edit) -> Iterator[str]:
    """Describe an edit for people."""
    yield f"{edit.name} (id {edit.id[:12]}, number {edit.order})"
    yield f"  made on: {', '.join(edit.made_on.values()) or 'the base'}"
    yield f"  method: {edit.method} {json.dumps(edit.settings)}"
    yield f"  versions: {', '.join(f'{name} {version}' for name, version in edit.versions.items())}"
    for name in dict.fromkeys((*edit.metrics_before, *edit.metrics_after)):
        both = (metrics.get(name) for metrics in (edit.metrics_before, edit.metrics_after))
        yield f"  {name}: {' → '.join('?' if value is None else f'{value:.4g}' for value in both)}"
    for change in edit.layers:
        experts, terms = len(change.deltas.experts), len(change.deltas.right)
        size = sum(getattr(change.deltas, factor).nbytes for factor in ("left", "right")) / 1e6
        yield f"  {change.parameter}: {experts} of {change.sizes[0]} experts, {terms} terms, {size:.2f} MB"
    for fact in edit.facts:
        truth = "" if fact.target_true is None else f" (was: {fact.target_true})"
        yield f"  {fact.prompt} → {fact.target_new}{truth}"
