"""The making of edits in a run: measured, written in one transaction, recorded and reported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lit_moeedit.callbacks.averages import Copies, edited_weights, validated_weights
from lit_moeedit.callbacks.charts import log_curves, log_summary
from lit_moeedit.callbacks.copies import CopyPolicy
from lit_moeedit.callbacks.edit_files import EditFiles
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.foresight import monitored
from lit_moeedit.callbacks.frozen import FrozenEdits
from lit_moeedit.callbacks.guards import Guards, Trial
from lit_moeedit.callbacks.inputs import EditInputs
from lit_moeedit.callbacks.listener import EditEvent, EditListener, RetentionEvent, tell_listeners
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.progress import edit_progress
from lit_moeedit.callbacks.resources import from_datamodule, optimizers_of
from lit_moeedit.callbacks.survival import SurvivalCurve
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Evaluation, evaluate, neighbour_groups
from lit_moeedit.editing.further import Further, FurtherMeasures
from lit_moeedit.editing.outcomes import FailedEditError, OnFailure
from lit_moeedit.editing.phases import EVALUATION, LOCATE, Meter
from lit_moeedit.editing.probe import Probe
from lit_moeedit.interrupts import Undo
from lit_moeedit.models.experts import find_model
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class EditMaking(EditInputs):
    """A callback that makes edits, and measures what is left of them.

    A subclass decides when, and sets these attributes.

    Attributes:
        guards: limits that an edit must meet.
        on_failure: treatment of an edit of which most facts failed.
        probe: the text on which guards compare the model before and after; ``None`` if they need none.
        curve: settings of the survival curve.
        further: further measures around each edit and when training ends; ``None`` if none are asked for.
    """

    groups = ("edit", "edit_before", "edit_after", "edit_seconds", "edit_renewed")

    guards: Guards
    on_failure: OnFailure
    probe: Probe | None = None
    curve: SurvivalCurve = SurvivalCurve()
    further: FurtherMeasures | None = None
    _copies: CopyPolicy
    _frozen: FrozenEdits
    _edit_files: EditFiles
    _has_stepped: bool

    @property
    def may_renew(self) -> bool:
        """``True`` if edits may be made anew later."""
        return False

    def should_keep(self, before: Evaluation, after: Evaluation) -> bool:
        """Decide whether to keep an edit, while it is in the weights; ``False`` undoes it bit by bit.

        Both evaluations are of the facts of this edit. ``max_perplexity_ratio``, ``min_routing_similarity`` and
        ``on_failure`` may still undo what this keeps.
        """
        return not any(figure.is_broken for figure in self.guards.of_facts(after))

    @override
    def evaluate(
        self,
        pl_module: L.LightningModule,
        facts: Sequence[Fact] | None = None,
        baseline: dict[str, list[bool]] | None = None,
    ) -> Evaluation:
        """Evaluate facts (by default those edited so far) against their neighbours before the edit.

        Args:
            pl_module: the module.
            facts: the facts.
            baseline: ``neighbours_exact`` of an edit that is not finished; ``None`` for that of finished edits.
        """
        facts = self.applied_facts if facts is None else facts
        if baseline is None and all(fact.key in self._applied for fact in facts):
            baseline = self._applied
        model, groups = find_model(pl_module), neighbour_groups(self.facts)
        with Ranks.current().together():
            return evaluate(model, self.tokenizer, facts, baseline, groups, self.editor.token_budget)

    def measure_further(
        self,
        pl_module: L.LightningModule,
        facts: Sequence[Fact],
        evaluation: Evaluation,
        layers: Sequence[int] = (),
        before: Further | None = None,
        generated: Sequence[str] | None = None,
    ) -> Further:
        """Make the further measures, see :meth:`lit_moeedit.editing.further.FurtherMeasures.measure`."""
        if self.further is None:
            return Further()
        with Ranks.current().together():
            return self.further.measure(find_model(pl_module), facts, evaluation, layers, before, generated)

    def generated(self, pl_module: L.LightningModule, facts: Sequence[Fact]) -> list[str]:
        """Return the keys of the facts whose new target the model generates; nothing else is measured."""
        found = self.evaluate(pl_module, [replace(fact, paraphrases=(), neighbours=()) for fact in facts])
        exact = zip(facts, found.edits_exact.tolist(), strict=True)
        return [fact.key for fact, is_exact in exact if is_exact]

    def _release_texts(self) -> None:
        """Forget the preservation texts after the last edit that is due."""
        if not self.pending_facts and not self.may_renew:
            self._texts = None

    def _edit(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        if not facts:
            return
        meter = Meter(pl_module.device)
        with edited_weights(trainer, pl_module) as copies:
            with edit_progress(trainer) as progress, nullcontext() if self.editor.is_resolved else meter(LOCATE):
                self._find_place(trainer, pl_module, histories=self._frozen.histories, progress=progress)
            with meter(EVALUATION):
                tell_listeners(trainer, lambda listener: listener.on_edit_start(trainer, pl_module, facts))
            with Ranks.current().together():
                wants_answers = any(listener.wants_answers for listener in callbacks_of(trainer, EditListener))
                trial = Trial(self, pl_module, facts, wants_answers, meter)
                is_error, point = False, None

                def record(kept: bool, undo: Undo) -> None:
                    nonlocal is_error, point
                    # a run that is resumed after the error edits these facts again
                    is_error = trial.has_failed and self.on_failure == "raise"
                    if not is_error:
                        self._record(trainer, facts, trial if kept else None, undo)
                    if kept and trainer.state.fn == TrainerFn.FITTING:
                        with meter(EVALUATION):  # in the transaction: an edit without its point is half recorded
                            point = self.curve.add_point(self, trainer, pl_module, "edit")

                states = self._edit_files.states(trainer, pl_module, self.editor.layers)
                with edit_progress(trainer) as progress:
                    made: dict[str, Any] = {"record": record, "progress": progress, "phase": meter}
                    result = self._change(trainer, pl_module, facts, copies, guard=trial.passes, **made)
                trial.complete(result)
                moment = trainer.current_epoch, trainer.global_step, self.name
                found = trial.reasons(result), trial.figures, trial.measured
                event = EditEvent(
                    result, trial.before, trial.after, *moment, *found, seconds=meter.seconds(), memory=meter.memory
                )
                self._report(trainer, event, is_error)
                metrics = trial.before.metrics, trial.after.metrics
                self._written = self._edit_files.save(
                    trainer, pl_module, "edit", self.editor, result, states, self._written, metrics
                )
            self._release_texts()
            tell_listeners(trainer, lambda listener: listener.on_edit_end(trainer, pl_module, event))
            if result.kept and trainer.state.fn == TrainerFn.FITTING:
                exact = zip(facts, trial.after.edits_exact.tolist(), strict=True)
                with Ranks.current().together():  # it writes files
                    self._keep(trainer, result, [fact.key for fact, is_exact in exact if is_exact])
                self.curve.tell(self, trainer, pl_module, point)
            if is_error:
                raise FailedEditError(
                    f"{self.heading}{event.failure}\nThe edit was undone: the weights are what they were before it. To "
                    "go on without these facts set on_failure: undo, to keep such an edit on_failure: keep"
                )

    def _change(
        self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact], copies: Copies, **kwargs: Any
    ) -> EditResult:
        texts, layers = self._take_texts(trainer), self._take_layers(trainer)
        known = [own for e in callbacks_of(trainer, EditState) for own in (*e.recorded_facts, *e.facts)]
        if self.editor.memory is not None:  # which a checkpoint of an earlier version may have filled
            self.editor.memory.rename({fact.key: fact.prompt_key for fact in known})
        made = (self._edits_made, self.renewals)
        try:
            return self.editor.edit(
                find_model(pl_module),
                self.tokenizer,
                facts,
                texts,
                optimizers=optimizers_of(trainer),
                layers=None if copies else layers,  # an average has other output scales
                copies=[*copies, *self._copies.find(trainer, pl_module, self.editor.layers)],
                histories=self._frozen.histories,
                measured=known,
                **kwargs,
            )
        except BaseException as error:
            is_made = (self._edits_made, self.renewals) != made
            end = "it is in the weights and in the record" if is_made else "the weights are what they were before it"
            log.warning("the edit was broken off (%s); %s", type(error).__name__, end)
            raise

    def _keep(
        self, trainer: L.Trainer, result: EditResult, generated: Sequence[str], has_moments: bool = False
    ) -> None:
        """Keep what renewals need of an edit, with the keys of those of its facts that are generated after it."""

    def _record(self, trainer: L.Trainer, facts: Sequence[Fact], trial: Trial | None, undo: Undo) -> None:
        """Record an edit in its transaction; ``trial`` of one that is kept."""
        self._change_state(undo, edits_made=self._edits_made + 1, last_step=trainer.global_step)
        if trial is None:
            self._change_state(undo, undone=self._undone | {fact.key for fact in facts})
            return
        for editing in callbacks_of(trainer, EditState):
            editing.forget_replaced(facts, undo)
        words = self._words | {fact.key: fact.to_dict() for fact in facts}
        self._change_state(undo, applied=self._applied | trial.before.neighbours_exact, words=words)
        undo.by(setattr, self, "survival", self.survival)
        self.survival = self.survival.with_edit(facts, trial.after)
        datamodule: Any = getattr(trainer, "datamodule", None)
        if hasattr(datamodule, "facts_edited") and hasattr(datamodule, "load_state_dict"):
            undo.by(datamodule.load_state_dict, deepcopy(datamodule.state_dict()))
        from_datamodule(trainer, "facts_edited", facts)

    def _report(self, trainer: L.Trainer, event: EditEvent, is_error: bool) -> None:
        kept = event.result.kept
        log_summary(trainer, event.metrics)
        log.log(logging.INFO if kept else logging.WARNING, "%s", event)
        if event.reasons and not is_error:  # which the error says
            log.warning("%s%s", self.heading, event.failure)

    def _log_retention(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        facts, wanted = self.applied_facts, monitored(trainer, self.metrics_prefix)
        if not facts and not (wanted and trainer.state.fn == TrainerFn.FITTING and self.pending_facts):
            return
        with validated_weights(trainer, pl_module, self):
            evaluation = self.evaluate(pl_module, facts or self.pending_facts)
        metrics = evaluation.metrics
        if facts:
            event = RetentionEvent(facts, evaluation, trainer.current_epoch, trainer.global_step, self.name)
            tell_listeners(trainer, lambda listener: listener.on_retention(trainer, pl_module, event))
        if not facts:  # nothing is lost before the first edit
            metrics |= {name: 1.0 for name in metrics if name.startswith("specificity_retained")}
        prefix = self.metrics_prefix
        # before the first edit there is only what a monitor cannot do without
        known = {n: value for n, value in metrics.items() if f"{prefix}/{n}" in wanted or (facts and value == value)}
        log_curves(trainer, pl_module, prefix, known)
