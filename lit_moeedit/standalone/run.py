"""Facts edited in a model's folder, or in a model in memory, without a Trainer."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lit_moeedit
from lit_moeedit.atomic_files import check_writable, move_folder
from lit_moeedit.data.encoding import EditToken, check_offsets
from lit_moeedit.data.facts import Fact, read_facts, validate_facts
from lit_moeedit.data.neutral import neutral_texts, texts_to_preserve
from lit_moeedit.devices import find_device
from lit_moeedit.editing import EditMethod, Editor
from lit_moeedit.editing.further import FurtherMeasures, HeldOut, check_measures
from lit_moeedit.editing.outcomes import describe_failure
from lit_moeedit.editing.phases import Progress
from lit_moeedit.edits import Edit, SavedEdits, layers_by_parameter, states
from lit_moeedit.edits.card import CardRow
from lit_moeedit.edits.edit import check_name, settings_of
from lit_moeedit.edits.files import edits_of, save_edit
from lit_moeedit.edits.folders import check_output, load_model, save_model
from lit_moeedit.edits.order import left_by
from lit_moeedit.edits.stored import EDITS, StoredModel
from lit_moeedit.pretrained import check_vocabulary, pretrained_tokenizer
from lit_moeedit.reports import FactRow, Model, Report, write_report
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.standalone.attempts import Found, edit_with_attempts
from lit_moeedit.standalone.chat import in_chat
from lit_moeedit.standalone.processes import launched_ranks

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
"""End of the name of a folder that is being written."""


class TooFewFactsError(ValueError):
    """Raised if too few of the facts are generated after an edit, which was undone then.

    Attributes:
        report: the report on what was measured.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def edit(
    model: str | Path | PreTrainedModel,
    facts: str | Path | Sequence[Fact | Mapping[str, Any]],
    output: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preservation: str | Path | Sequence[str] | None = None,
    editor: EditMethod | None = None,
    layers: Sequence[int] | Literal["auto"] = "auto",
    token: EditToken | Literal["auto"] = "auto",
    min_efficacy: float = 0.5,
    chat: bool = False,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    dry_run: bool = False,
    name: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    measure: Sequence[str] = (),
) -> Report:
    """Edit facts in the weights of a model.

    A folder is loaded, edited in memory, and copied to ``output`` with the edited weights. There is no Trainer, and
    there are no optimizer states. If ``torchrun`` has started several processes, each holds the whole model, and they
    share the work.

    If an edit with the settings of the papers leaves facts that the model does not generate, it is undone, and made
    again with target vectors that are optimised for longer. The better one is kept.

    Args:
        model: a local folder of ``from_pretrained``, or a model in memory, which is changed.
        facts: a facts file, facts, or objects with the keys of a row of a facts file.
        output: the folder to write, for a model in a folder; not needed for a dry run. While it is being written its
            name ends with ``.unfinished``; the edit file and the report are there first.
        tokenizer: the tokenizer, for a model in memory.
        preservation: a text file with one document per line, or texts, on which the experts must keep their behaviour.
            ``None`` takes a small text of this package; one's own preserves more of what matters.
        editor: the editing method, instead of ``layers`` and ``token``.
        layers: indices of the layers to edit; ``auto`` finds them.
        token: the edit token; ``auto`` finds it.
        min_efficacy: smallest share of edited prompts that the model continues with the new answer. With less, the edit
            is undone and nothing is written. (Of a :class:`~lit_moeedit.callbacks.KnowledgeEditing` it is the share for
            which the new answer is more likely than the old one.)
        chat: whether to put the prompts into the tokenizer's chat template.
        columns: field names to column names, for facts with other names.
        dry_run: whether to write nothing. The edit is made in memory, measured, and undone; the report is as without.
        name: name of the edit; ``edit-0001`` and so on by default.
        overwrite: whether to replace an existing output.
        device: the device, for a model in a folder: ``auto`` for a GPU if there is one.
        progress: called with a phase's name, the number of steps done, and their total number.
        measure: names of further measures, see :mod:`lit_moeedit.editing.further`; text of another style is measured
            only if there is text of one's own to preserve.

    Returns:
        The report, fact by fact.

    Raises:
        TooFewFactsError: if too few facts are generated; nothing has changed.
        FactsError: if a fact cannot be edited.
        UnsupportedModelError: if the model cannot be edited.
        FileExistsError: if the output exists already.
        ValueError: if a setting or a file cannot be used.
        OSError: if a file cannot be read or written.

    Example:
        >>> report = edit("my-model", "facts.jsonl", "my-edited-model")  # doctest: +SKIP
        >>> [row.reason for row in report.rows if row.reason]  # doctest: +SKIP
    """
    if not 0 <= min_efficacy <= 1:
        raise ValueError(f"min_efficacy is a fraction in [0, 1], got {min_efficacy}")
    names = check_measures(measure)
    if editor is not None and (layers, token) != ("auto", "auto"):
        raise ValueError("give the editor, or layers and token, but not both")
    if isinstance(editor, SavedEdits) and output is not None:
        raise ValueError("edit files are applied to a model's folder by lit-moeedit edits apply, which keeps the files")
    if name is not None:
        check_name(name)
    first = Editor(layers, token=token) if editor is None else editor  # checks them
    own_device = find_device(device)
    stored, target = None, None
    if isinstance(model, str | Path):
        stored = StoredModel(model)
        if output is None and not dry_run:
            raise ValueError("a model in a folder needs an output folder")
        if output is not None and not dry_run:
            target = Path(output).resolve()
            given = [Path(own) for own in (facts, preservation) if isinstance(own, str | Path)]
            _check_target(target, overwrite, stored.folder, given)
    elif output is not None:
        raise ValueError("output is for a model in a folder; save a model in memory by save_pretrained")
    elif not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is {type(model).__name__}; expected a local folder, or a model of transformers")
    elif not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"a model in memory needs its tokenizer, one of transformers, got {type(tokenizer).__name__}")
    with launched_ranks():
        ranks = Ranks.current()
        with ranks.together():
            # before the model, which takes longer
            if stored is not None:
                tokenizer = pretrained_tokenizer(stored.folder)
                check_offsets(tokenizer)
            assert tokenizer is not None
            known = read_facts(facts, columns=columns, tokenizer=None if chat else tokenizer)
            texts = texts_to_preserve(preservation, warn=ranks.rank == 0)
            if stored is not None:
                present = edits_of(stored.folder)
                name = _free_name(present) if name is None else name
                if name in {own.name for own in present}:
                    raise FileExistsError(f"the model has an edit {name!r} already; give this one another name")
                loaded = load_model(stored, device=own_device)
                stored.check_dtype(loaded, layers_by_parameter(loaded))
                loaded.requires_grad_(False)
            else:
                assert isinstance(model, PreTrainedModel)
                loaded, present = model, []
            check_vocabulary(tokenizer, loaded)
            if first.layers:
                first.find_layers(loaded)
        checked = validate_facts(in_chat(tokenizer, known) if chat else known, tokenizer=tokenizer)
        started = datetime.now(UTC)
        before = states(layers_by_parameter(loaded), ranks) if stored is not None else {}
        held_out = HeldOut(texts=() if preservation is None else neutral_texts())
        measures = FurtherMeasures(names, tokenizer, held_out) if names else None
        found = edit_with_attempts(
            loaded,
            tokenizer,
            checked,
            texts,
            editor,
            layers=layers,
            token=token,
            min_efficacy=min_efficacy,
            undo=dry_run,
            ranks=ranks,
            progress=progress,
            measures=measures,
        )
        # of a dry run, whether it would be
        kept = found.result.kept or (dry_run and float(found.after.edits_exact.float().mean()) >= min_efficacy)
        report = _report(found, loaded, stored, started, [fact.prompt for fact in known], chat, kept)
        if not kept:
            raise TooFewFactsError(_too_few(found, min_efficacy), report)
        if stored is None or dry_run:
            return replace(report, state="finished")
        assert target is not None and name is not None
        with ranks.together():
            left = left_by(present)
            is_built_on = all(left.get(name, state) == state for name, state in before.items())
            if not is_built_on:
                log.warning(
                    "the edits in %s are not all in its weights: the new one does not count as made on them", EDITS
                )
                present = []
            recorded = Edit.record(
                name,
                loaded,
                found.result,
                before,
                method=found.editor,
                made_on=present,
                metrics_before=found.before.metrics,
                metrics_after=found.after.metrics,
                ranks=ranks,
            )
            if ranks.rank == 0:
                _write(stored, target, loaded, [*present, recorded], report, overwrite, progress)
        return replace(report, state="finished")


# -- what is given ----------------------------------------------------------------------------------------------------


def _free_name(present: Sequence[Edit]) -> str:
    taken = {edit.name for edit in present}
    number = len(taken) + 1
    while f"edit-{number:04d}" in taken:
        number += 1
    return f"edit-{number:04d}"


# -- the report -------------------------------------------------------------------------------------------------------


def _report(
    found: Found,
    model: PreTrainedModel,
    stored: StoredModel | None,
    started: datetime,
    prompts: Sequence[str],
    chat: bool,
    kept: bool,
) -> Report:
    """Make the report; the prompts are those that were given, before they were put into a chat template."""
    rows = tuple(
        FactRow(
            fact.key,
            fact.subject,
            prompt,
            fact.target_new,
            fact.target_true,
            edit=1,
            kept=kept,
            measured={"before": before, "after": after},
            reason=str(found.reasons[fact.key]) if fact.key in found.reasons else None,
            chat=chat,
        )
        for fact, prompt, before, after in zip(
            found.result.facts, prompts, found.measured_before, found.measured_after, strict=True
        )
    )
    return Report(
        title="Edited facts, asked in the chat template" if chat else "Edited facts",
        model=Model(
            name=stored.folder.resolve().name if stored else type(model).__name__,
            family=model.config.model_type,
            parameters=model.num_parameters(),
        ),
        state="running",
        started=started,
        ended=datetime.now(UTC),
        rows=rows,
        metrics={"before": found.before.metrics, "after": found.after.metrics},
        intervals={"before": found.before.intervals, "after": found.after.intervals},
        edited_layers=found.editor.layers,
        relative_change=dict(found.result.relative_change),
        routing=found.routing,
        costs=found.costs,
        guards=found.guards,
        places=found.places,
        warnings=found.warnings,
        settings={"editor": settings_of(found.editor)},
        versions={"lit_moeedit": lit_moeedit.__version__}
        | {package: metadata.version(package) for package in ("torch", "transformers")},
    )


def _too_few(found: Found, min_efficacy: float) -> str:
    return (
        "nothing is changed, because the share of edited prompts that the model continues with the new answer is below "
        f"the min_efficacy of {min_efficacy:g}. {describe_failure(found.result, found.reasons)}"
    )


# -- the output -------------------------------------------------------------------------------------------------------


def _check_target(target: Path, overwrite: bool, source: Path, given: Sequence[Path]) -> None:
    """Check that the output can be written, before the work, and that what is given is not lost by that."""
    if target.is_relative_to(source.resolve()):
        raise ValueError(f"the output {target} is in the folder of the model, which must stay as it is")
    check_output(target, overwrite, [source, *given])
    unfinished = _unfinished(target)
    _check_unfinished(unfinished)
    if unfinished.exists() and not overwrite:
        folders = (shlex.quote(str(folder)) for folder in (source, unfinished / EDITS, "--output", target))
        raise FileExistsError(
            f"{unfinished} is what a run has left that was killed: lit-moeedit edits apply {' '.join(folders)} makes "
            "its edit again. Remove it, or use --overwrite"
        )
    inside = [path for path in (source, *given) if path.resolve().is_relative_to(unfinished)]
    if inside:
        raise FileExistsError(f"{unfinished} is not replaced: {inside[0]}, which is read, is in it")
    check_writable(target.parent / f".{target.name}.check")


def _check_unfinished(folder: Path) -> None:
    """Check that what has the name of an unfinished output is one: it has edits, or what was replaced by one."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder}, where the output is written first, is no folder: move it away")
    if folder.exists() and any(folder.iterdir()) and not any((folder / own).exists() for own in (EDITS, "config.json")):
        raise FileExistsError(
            f"{folder}, where the output is written first, is not what a run has left: it has no {EDITS}. Move it away"
        )


def _unfinished(target: Path) -> Path:
    return target.with_name(target.name + UNFINISHED)


def _write(
    stored: StoredModel,
    target: Path,
    model: PreTrainedModel,
    edits: Sequence[Edit],
    report: Report,
    overwrite: bool,
    progress: Progress | None,
) -> None:
    """Write the edit and the report first, then the model; all of it is moved to its place when it is complete."""
    folder = _unfinished(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for own in edits:
        save_edit(own, folder / EDITS)
    write_report(report, folder)
    with _explained(folder):
        save_model(
            stored,
            model,
            edits[-1].changes,
            edits,
            folder,
            lambda done, total: progress and progress("copying", done, total),
            [
                CardRow(row.prompt, row.target_true, row.target_new, row.measured["after"], row.chat)
                for row in report.rows
            ],
        )
        write_report(replace(report, state="finished"), folder)
        move_folder(folder, target, overwrite)
    shutil.rmtree(folder, ignore_errors=True)  # what was there before
    log.info("%s: %s", target, edits[-1].name)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what is left if the output cannot be completed."""
    try:
        yield
    except BaseException:
        log.warning("the edit was made, but the model is not complete: %s has the edit file and the report", folder)
        raise
