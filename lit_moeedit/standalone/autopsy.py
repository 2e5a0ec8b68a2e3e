"""The command ``edits autopsy``: which part of a model carried the loss of its edits."""

from __future__ import annotations

import gc
import json
import logging
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from lit_moeedit.atomic_files import atomic_file, check_writable
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.checkpoints.sources import ModelSource
from lit_moeedit.data.errors import FactsError
from lit_moeedit.data.facts import Fact, read_facts
from lit_moeedit.devices import find_device
from lit_moeedit.editing.evaluation import check_queries, evaluate
from lit_moeedit.editing.place import Place
from lit_moeedit.edits import Edit, apply, layers_by_parameter, read_edits
from lit_moeedit.edits.autopsy import Autopsy, Score, autopsy
from lit_moeedit.edits.files import edits_of
from lit_moeedit.models.parts import stored_tensors
from lit_moeedit.pretrained import pretrained_tokenizer
from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.standalone.processes import launched_ranks
from lit_moeedit.terminal import progress
from lit_moeedit.text import brief, count, first_few, printable

log = logging.getLogger(__name__)


def autopsy_edits(
    final: Path,
    *,
    edited: Path | None = None,
    base: Path | None = None,
    edit: Path | None = None,
    facts: Path | None = None,
    layers: list[int] | None = None,
    tokenizer: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    allow_rounding: bool = False,
    device: str = "auto",
) -> None:
    """Find which part of a model carried the loss of its edits.

    The edited facts are measured in the final model, in the model right after the edit, and in the final one with one
    part of the other put back: down-projections, gate/up-projections, routers, attention and so on. Give the model
    right after the edit as --edited, or as --base and --edit. Nothing in these files is executed or changed. Memory is
    needed for one model and its largest part. Started by torchrun, its processes share the prompts.

    Args:
        final: the model now: a local folder of from_pretrained, a checkpoint of Lightning, or a folder of DeepSpeed.
        edited: the model right after the edit, likewise.
        base: local folder of the model before the edit; also for the config and the tokenizer of a checkpoint that has
            none.
        edit: folder of the edit that was made in the base, or of several.
        facts: facts file; by default the facts of the edits, or those that the run's checkpoint names as edited.
        layers: the edited layers, for example [3,4,5]; by default those of the edits or of the checkpoint.
        tokenizer: local folder of the tokenizer; by default the one beside the model or in the checkpoint.
        output: file to write the result into, as JSON.
        overwrite: whether to replace an existing output.
        allow_rounding: whether to accept an edit of the base that differs in last places, as on another machine.
        device: auto (a GPU if there is one), cpu, cuda or cuda:1.

    Raises:
        ValueError: if the models do not fit together, facts or layers are not known, or a file cannot be used.
        FileExistsError: if the output exists already.
        OSError: if a file cannot be read or written.

    Example:
        lit-moeedit edits autopsy runs/last.ckpt --base my-model --edit runs/edits/edit-0001
    """
    _check_arguments(edited, base, edit)
    if output is not None:
        if output.exists() and not overwrite:
            raise FileExistsError(f"{output} exists already; --overwrite replaces it")
        check_writable(output)
    with launched_ranks():
        ranks = Ranks.current()
        with ranks.together():
            after = ModelSource.find(final, base)
            before = ModelSource.find(edited, base) if edited is not None else ModelSource.find(base or final)
            made = [] if edit is None else read_edits(edit)
            known = made or [own for source in (before, after) if source.stored for own in edits_of(source.path)]
            chosen = _find_facts(facts, known, [before, after])
            words = _find_tokenizer(tokenizer, [after, before])
            check_queries(words, chosen)
            model, weights = before.load(after.dtype, find_device(device))
            edited_layers = _find_layers(layers, model, known, [before, after])
            if made:
                weights = _with_edits(model, weights, made, allow_rounding)
        just = evaluate(model, words, chosen, ranks=ranks)
        del model  # before the other is loaded
        gc.collect()
        with ranks.together():
            model, _ = after.load(after.dtype, find_device(device))
            _check_alike(model, weights, before.path)
        with progress() as show:
            result = autopsy(model, words, chosen, edited_layers, weights, just, ranks=ranks, progress=show)
        if ranks.rank == 0:
            _show(result)
            if output is not None:
                _write(result, output)


# -- what is given ----------------------------------------------------------------------------------------------------


def _check_arguments(edited: Path | None, base: Path | None, edit: Path | None) -> None:
    if edited is None and (base is None or edit is None):
        raise ValueError(
            "give the model right after the edit: --edited with its folder or checkpoint, or --base and --edit with "
            "the model before the edit and the folder of the edit"
        )
    if edited is not None and edit is not None:
        raise ValueError("give --edited, which has the edit in its weights, or --edit with --base, but not both")


def _find_facts(path: Path | None, edits: Sequence[Edit], sources: Sequence[ModelSource]) -> list[Fact]:
    """Find the edited facts, without neighbours; a fact that was edited again counts as it was edited last."""
    if path is not None:
        found = {fact.prompt: fact for fact in read_facts(path)}
    else:
        found = {fact.prompt: fact for edit in edits for fact in edit.facts}
    for source in sources if not found else ():
        found |= {fact.prompt: fact for state in _states(source) for fact in _facts_in(source.path, state)}
    if not found:
        raise ValueError("the edited facts are not recorded in what was given: name their file with --facts")
    return [replace(fact, neighbours=()) for fact in found.values()]


def _states(source: ModelSource) -> list[Mapping[str, Any]]:
    """Return the states of editing callbacks in a checkpoint."""
    callbacks = {} if source.checkpoint is None else source.checkpoint.callbacks
    return [
        state
        for key, state in callbacks.items()
        if str(key).startswith("KnowledgeEditing") and isinstance(state, Mapping)
    ]


def _facts_in(path: Path, state: Mapping[str, Any]) -> list[Fact]:
    where = f"{path}: the state of KnowledgeEditing"
    check_fields(where, state, ("facts",), applied={str: [bool]}, facts={str: dict})
    try:
        return [Fact.from_dict(row) for key, row in (state.get("facts") or {}).items() if key in state["applied"]]
    except FactsError as error:
        raise CheckpointError(f"{where}: field 'facts': {brief(error)}") from error


def _find_layers(
    given: Sequence[int] | None, model: PreTrainedModel, edits: Sequence[Edit], sources: Sequence[ModelSource]
) -> list[int]:
    """Find the edited layers: those that are given, or that edits or a checkpoint name."""
    if given:
        return sorted(set(given))
    by_name = {name: layer.index for name, layer in layers_by_parameter(model).items()}
    found = {by_name[name] for edit in edits for name in edit.changes if name in by_name}
    for source in sources if not found else ():
        for state in _states(source):
            found |= _layers_in(source.path, state)
    if not found:
        raise ValueError("the edited layers are not recorded in what was given: name them with --layers, as [3,4,5]")
    return sorted(found)


def _layers_in(path: Path, state: Mapping[str, Any]) -> set[int]:
    where = f"{path}: the state of KnowledgeEditing"
    check_fields(where, state, ("place",), place=dict)
    try:
        return set(Place.from_dict(state["place"]).layers) if state.get("place") else set()
    except ValueError as error:
        raise CheckpointError(f"{where}: field 'place': {brief(error)}") from error


def _find_tokenizer(given: Path | None, sources: Sequence[ModelSource]) -> Any:
    if given is not None:
        return pretrained_tokenizer(given)
    failures = []
    for source in sources:
        try:
            return source.tokenizer()
        except (OSError, ValueError) as error:
            failures.append(brief(error))
    raise ValueError(f"no tokenizer is beside the models; give one with --tokenizer ({failures[0]})")


def _with_edits(
    model: PreTrainedModel, weights: Mapping[str, Part], edits: Sequence[Edit], allow_rounding: bool
) -> Mapping[str, Part]:
    """Apply edits to the model before them; return its weights with the changed ones, which stay in memory."""
    apply(model, edits, allow_siblings=True, allow_rounding=allow_rounding)
    tensors = stored_tensors(model)
    changed = {name: Part.of(tensors[name]).to("cpu") for edit in edits for name in edit.changes}
    return ChainMap(changed, cast("Any", weights))  # which writes into the first of them only


def _check_alike(model: PreTrainedModel, weights: Mapping[str, Part], path: Path) -> None:
    lacking = [name for name in stored_tensors(model) if name not in weights]
    if lacking:
        raise ValueError(f"{path} is another model than the final one: it lacks {first_few(lacking)}")


# -- the result ----------------------------------------------------------------------------------------------------


def _show(result: Autopsy) -> None:
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(f"{result.facts} edits in layers {', '.join(map(str, result.layers))}")
    console.print(make_table(result), soft_wrap=False)
    console.print(printable(f"{result.verdict[:1].upper()}{result.verdict[1:]}."))
    if result.advice is not None:
        console.print(f"What helps: {result.advice}.")


def _write(result: Autopsy, path: Path) -> None:
    with atomic_file(path) as beside:
        beside.write_text(json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def make_table(result: Autopsy) -> Table:
    """Make a table with a line for each part, and one each for the just-edited and the final model."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("put back", no_wrap=True)
    for heading in ("generated", "efficacy", "generalization", "explains", "parameters", "moved"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("nothing: final", *_cells(result.final, result.facts))
    table.add_row("all: just edited", *_cells(result.edited, result.facts), end_section=True)
    for part in result.parts:
        explained = "" if part.explained is None else f"{100 * part.explained:.0f} %"
        moved = f"{part.moved:.3f}" if part.moved else "0"
        cells = _cells(part.score, result.facts)
        table.add_row(part.name, *cells, explained, count(part.parameters), moved, style=_style(result, part.name))
    return table


def _style(result: Autopsy, name: str) -> str:
    return "bold" if result.carrier is not None and result.carrier.name == name else ""


def _cells(score: Score, facts: int) -> list[str]:
    shares = ("" if value != value else f"{value:.3f}" for value in (score.efficacy, score.generalization))
    return [f"{score.generated}/{facts}", *shares]
