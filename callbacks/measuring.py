"""The measuring of edits around them and when training ends, of which a failure costs a run nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L

from lit_moeedit.callbacks.attempts import attempt
from lit_moeedit.callbacks.conflicts import contradicting_texts
from lit_moeedit.callbacks.just_edited import JustEdited
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.measurements import Measurements
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.totals import plain_sums
from lit_moeedit.callbacks.validation import validating, validation_batches
from lit_moeedit.editing import perplexity
from lit_moeedit.editing.outcomes import measure
from lit_moeedit.edits import Autopsy
from lit_moeedit.models.experts import find_model
from lit_moeedit.reports import MissingAutopsy
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class Measuring:
    """The measuring of one run; every rank calls each method at the same moment.

    Args:
        with_autopsy: whether the weights right after the last edit are kept for an autopsy at the end.

    Attributes:
        autopsy: result of the autopsy, or the reason why there is none; ``None`` if none was asked for.
        warned: errors that were logged as warnings; each is logged once.
    """

    def __init__(self, with_autopsy: bool = False) -> None:
        self.with_autopsy = with_autopsy
        self.autopsy: Autopsy | MissingAutopsy | None = None
        self._just_edited = JustEdited()
        self.warned: set[str] = set()

    def perplexity(
        self,
        measured: Measurements,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        moment: str,
        again: bool = True,
    ) -> None:
        """Measure the perplexity of the validation data.

        Args:
            measured: gets the result, or the error.
            trainer: the trainer.
            pl_module: its module.
            moment: name of the moment.
            again: whether to measure a moment again of which there is a result or an error.
        """
        name = f"perplexity {moment}"
        if not again and (moment in measured.perplexity or name in measured.failed):
            return
        measured.perplexity.pop(moment, None)
        with self._attempt(measured, name), validating(trainer) as loaders:
            if loaders is not None:
                batches = validation_batches(trainer, pl_module, loaders)
                measured.perplexity[moment] = perplexity(find_model(pl_module), batches, Ranks.current())

    def keep_weights(self, measured: Measurements, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the weights right after an edit, if there is to be an autopsy."""
        if self.with_autopsy:
            with self._attempt(measured, "autopsy"):
                self._just_edited.keep(trainer, pl_module)

    def end(self, measured: Measurements, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Measure what is left of the edits when training ends, after this number of optimizer steps."""
        self.perplexity(measured, trainer, pl_module, "after_training")
        editings = callbacks_of(trainer, KnowledgeEditing)
        for editing in editings:
            if editing.edited_facts:
                name = "after_training" if len(editings) == 1 else f"after_training of {editing.label}"
                with self._attempt(measured, name):
                    _measure_facts(measured, trainer, pl_module, editing, step)
        if self.with_autopsy:
            with self._attempt(measured, "autopsy"):
                self.autopsy = self._just_edited.examine(trainer, pl_module)

    @contextmanager
    def _attempt(self, measured: Measurements, name: str) -> Iterator[None]:
        """Make a measurement on all ranks or on none; a failure is recorded under ``name`` and costs nothing else."""

        def fail(error: BaseException) -> None:
            measured.failed[name] = text = f"{type(error).__name__}: {error}"
            # what cannot be measured before an edit cannot be measured after it: once is enough
            level = logging.DEBUG if text in self.warned else logging.WARNING
            self.warned.add(text)
            log.log(level, "EditReport could not measure %s: %s", name, text)
            log.debug("", exc_info=error)

        measured.failed.pop(name, None)
        with attempt(fail):
            yield


def _measure_facts(
    measured: Measurements, trainer: L.Trainer, pl_module: L.LightningModule, editing: KnowledgeEditing, step: int
) -> None:
    facts, undone = editing.applied_facts, editing.undone_facts
    settings: Any = {"token_budget": editing.editor.token_budget}
    model = find_model(pl_module)
    if facts:
        evaluation, baseline = editing.evaluate(pl_module), editing.neighbours_before
        found = measure(model, editing.tokenizer, facts, baseline, evaluation=evaluation, **settings)
        generated = [one.generated for one in found]
        evaluation = editing.measure_further(pl_module, facts, evaluation, generated=generated).add_to(evaluation)
        measured.final[editing.label] = evaluation.metrics
        measured.final_by_fact[editing.label] = plain_sums(evaluation.by_fact)
        contradictions = contradicting_texts(trainer, facts)
        measured.history = measured.history.with_end(editing.name, facts, found, step, contradictions)
    if undone:
        found = measure(model, editing.tokenizer, undone, **settings)
        measured.history = measured.history.with_end(editing.name, undone, found, step, {})
