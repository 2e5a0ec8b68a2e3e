"""The callback that edits facts of a model while the Trainer runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import lightning as L
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.callbacks.listener import EditEvent, tell_listeners
from lit_moeedit.callbacks.named import NamedCallback, callbacks_of
from lit_moeedit.callbacks.progress import edit_progress
from lit_moeedit.callbacks.resources import (
    check_model,
    find_facts,
    find_texts,
    find_tokenizer,
    from_datamodule,
    keep_experts_together,
    log_metrics,
    optimizers_of,
    refuse_contradictions,
)
from lit_moeedit.callbacks.schedule import Schedule
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.facts import CheckedFacts, Fact
from lit_moeedit.editing import EditMethod, EditResult, Evaluation, evaluate, neighbour_groups
from lit_moeedit.models.experts import ExpertLayer, find_model
from lit_moeedit.sharding.finite import check_finite
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class KnowledgeEditing(NamedCallback):
    """Edit facts in the routed experts of the model between epochs or steps, and measure what is left of them.

    It works with any ``LightningModule`` that holds one transformers MoE model, in ``fit``, ``validate`` and ``test``.
    Everything is checked when the run starts: the model's layers, the tokenizer, and every fact. An edit is a
    transaction; gradients, modes and random states are as they were afterwards, and an edited run can be stopped
    and resumed without repeating or losing an edit.

    After an edit, every validation logs ``edit/efficacy``, ``edit/generalization``, ``edit/specificity_retained`` and
    the other metrics of :class:`~lit_moeedit.metrics.EditSuccess` for all facts edited so far; the edit itself logs
    ``edit_before/…`` and ``edit_after/…``. To decide otherwise when to edit or what to keep, override
    :meth:`due` or :meth:`should_keep`.

    A trainer may have several of these callbacks, each with a name and with facts of its own. Only editors that share
    an :class:`~lit_moeedit.editing.EditMemory` hold back what they do to each other's edits.

    Args:
        editor: the editing method.
        facts: a facts file (see :func:`~lit_moeedit.data.read_facts`) or facts; ``None`` asks the data module's
            ``edit_facts()``.
        at: the moment: ``fit_start``, ``validation`` (also in ``validate`` and ``test``), ``{epoch: N}`` (before epoch
            N, counted from 0), ``{step: N}`` (after N optimizer steps), or ``{every_n_epochs: N, batch: M}``.
        preservation: a text file with one document per line, or texts, on which the experts must keep their behavior;
            ``None`` asks the data module's ``preservation_texts()``.
        renew_every_n_steps: edit what training has undone again, every this many optimizer steps after an edit: facts
            that the model no longer generates are brought back, the others enter with residual 0, so that they stay.
            ``None`` leaves the edits to what training makes of them.
        max_renewals: stop renewing after this many times.
        tokenizer: a path or hub id; ``None`` takes the ``tokenizer`` attribute of the module or the data module.
        min_efficacy: undo an edit that ends with less efficacy than this.
        min_specificity_retained: undo an edit that keeps less of its neighbours than this.
        strict: whether a bad row of a facts file is an error (otherwise it is skipped and counted).
        name: log ``edit_<name>/…``, ``edit_<name>_before/…`` and so on instead.

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: when the run starts, if there is no tokenizer, no facts or no preservation text, the
            model or a layer cannot be edited, or the parameters are sharded in a way that is not supported (supported
            are one process, DDP, and DeepSpeed ZeRO stages 0 to 3); if two of these callbacks would log under the same
            names, or have different targets for a prompt.
        FactError: when the run starts, if a fact cannot be edited.

    Example:
        >>> from lit_moeedit.editing import Editor
        >>> callback = KnowledgeEditing(Editor(layers=[3, 4]), facts="facts.jsonl", at={"epoch": 1})
        >>> callback.schedule.moment
        'epoch'
    """

    groups = ("edit", "edit_before", "edit_after", "edit_seconds", "edit_renewed")

    def __init__(
        self,
        editor: EditMethod,
        facts: str | list[Fact] | None = None,
        at: str | dict[str, int] = "fit_start",
        preservation: str | list[str] | None = None,
        renew_every_n_steps: int | None = None,
        max_renewals: int | None = None,
        tokenizer: str | None = None,
        min_efficacy: float = 0.0,
        min_specificity_retained: float = 0.0,
        strict: bool = True,
        name: str | None = None,
    ) -> None:
        source = facts if facts is None or isinstance(facts, str) else sha256(repr(facts).encode()).hexdigest()[:8]
        super().__init__(name, facts=source, at=at, layers=list(editor.layers))
        self.min_efficacy, self.min_specificity_retained = min_efficacy, min_specificity_retained
        for argument in ("min_efficacy", "min_specificity_retained"):
            if not 0.0 <= getattr(self, argument) <= 1.0:
                raise ValueError(f"{argument} is a fraction in [0, 1], got {getattr(self, argument)}")
        if renew_every_n_steps is not None and renew_every_n_steps < 1:
            raise ValueError(f"renew_every_n_steps must be at least 1, or None for never, got {renew_every_n_steps}")
        if max_renewals is not None and max_renewals < 0:
            raise ValueError(f"max_renewals must be at least 0, or None for no limit, got {max_renewals}")
        self.editor = editor
        self.renew_every_n_steps, self.max_renewals = renew_every_n_steps, max_renewals
        self.schedule = Schedule.parse(at)
        self.strict = strict
        self._facts_source = facts
        self._preservation_source = preservation
        self._tokenizer_source = tokenizer
        self.facts = CheckedFacts(())
        """All facts of the run; empty before it starts."""
        self._texts: list[str] | None = None  # while an edit may still need them
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._layers: list[ExpertLayer] | None = None  # as checked, while the weights are what they were then
        # the state of the callback: facts that were edited, with the neighbours whose truth was generated before
        self._applied: dict[str, list[bool]] = {}
        self._undone: set[str] = set()
        self._edits_made = 0
        self._last_step = 0
        self.renewals = 0
        """Number of renewals."""

    # -- what the run is about ----------------------------------------------------------------------------------------

    @property
    def applied_facts(self) -> CheckedFacts:
        """The facts edited so far."""
        return self.facts.select(lambda fact: fact.key in self._applied)

    @property
    def edited_facts(self) -> CheckedFacts:
        """The facts of all edits, those that were undone included."""
        return self.facts.select(lambda fact: fact.key in self._applied or fact.key in self._undone)

    @property
    def pending_facts(self) -> CheckedFacts:
        """The facts still to be edited."""
        return self.facts.select(lambda fact: fact.key not in self._applied and fact.key not in self._undone)

    def due(self, trainer: L.Trainer, moment: str) -> Sequence[Fact]:
        """Select the facts to edit now.

        Args:
            trainer: the trainer, for its epoch and step.
            moment: ``"epoch"`` (before a training epoch), ``"step"`` (after a training batch) or ``"validation"``
                (before a validation or test run).
        """
        if moment == "epoch":
            is_due = self.schedule.due_at_epoch(trainer.current_epoch, self._edits_made)
        elif moment == "step":
            is_due = self.schedule.due_at_step(trainer.global_step)
        else:
            is_due = self.schedule.moment == "validation"
        return self.pending_facts[: self.schedule.batch] if is_due else []

    def should_keep(self, before: Evaluation, after: Evaluation) -> bool:
        """Decide whether to keep an edit, while it is in the weights; ``False`` undoes it bit by bit.

        Both evaluations are of the facts of this edit.
        """
        metrics = after.metrics
        return not (
            metrics["efficacy"] < self.min_efficacy or metrics["specificity_retained"] < self.min_specificity_retained
        )

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # the next run may have another model, tokenizer or data module
        self.facts, self._texts, self._tokenizer, self._layers = CheckedFacts(()), None, None, None
        keep_experts_together(trainer, pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._texts = self._layers = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prepare(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_restored = trainer.ckpt_path is not None and trainer.strategy.restore_checkpoint_after_setup
        # these weights were not there yet when the fit started; one callback checks them for all
        if is_restored and self._take_layers(trainer) is not None:
            check_finite(find_model(pl_module), Ranks.current())

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._edit(trainer, pl_module, self.due(trainer, "epoch"))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._layers = None
        if self._renewal_due(trainer):
            self._renew(trainer, pl_module)
        self._edit(trainer, pl_module, self.due(trainer, "step"))

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._prepare(trainer, pl_module)
            self._edit(trainer, pl_module, self.due(trainer, "validation"))

    on_test_start = on_validation_start

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_retention(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "applied": self._applied,
            "undone": sorted(self._undone),
            "edits_made": self._edits_made,
            "last_step": self._last_step,
            "renewals": self.renewals,
            "memory": None if self.editor.memory is None else self.editor.memory.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where, counts = "the state of KnowledgeEditing in the checkpoint", ("edits_made", "last_step", "renewals")
        shapes = {"applied": {str: [bool]}, "undone": [str], "memory": dict, **dict.fromkeys(counts, int)}
        check_fields(where, state_dict, ("memory",), **shapes)
        for count in counts:
            if state_dict[count] < 0:
                raise CheckpointError(f"{where}: field {count!r} should be at least 0, but is {state_dict[count]}")
        if self.editor.memory is not None:
            # a checkpoint of a run without a memory has none
            self.editor.memory.load_state_dict(state_dict.get("memory") or {})
        self._applied, self._undone = dict(state_dict["applied"]), set(state_dict["undone"])
        self._edits_made, self._last_step, self.renewals = (state_dict[count] for count in counts)

    # -- the edit -----------------------------------------------------------------------------------------------------

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

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, known once the run has started."""
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is not known before the run starts")
        return self._tokenizer

    def preservation_texts(self, trainer: L.Trainer) -> list[str]:
        """Find the texts on which the experts must keep their behavior, once per run; empty if none are needed."""
        return find_texts(trainer, self._preservation_source) if self.editor.needs_moments else []

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check everything for all callbacks of this kind: the first of them may edit before the next one's hook."""
        if self._tokenizer is not None:
            return
        ranks, editings = Ranks.current(), callbacks_of(trainer, KnowledgeEditing)
        # files may be missing on one rank only
        with ranks.together():
            checked = check_model(trainer, pl_module, [editing.editor for editing in editings], ranks)
            for editing, layers in zip(editings, checked, strict=True):
                editing._layers = layers
                editing._find(trainer, pl_module, ranks)
            refuse_contradictions({editing.label: editing.facts for editing in editings})

    def _find(self, trainer: L.Trainer, pl_module: L.LightningModule, ranks: Ranks) -> None:
        self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, "KnowledgeEditing")
        self.facts = find_facts(trainer, self._facts_source, self._tokenizer, self.strict)
        ranks.check_same("the facts", [repr(fact) for fact in self.facts])
        if self.schedule.moment == "validation" or trainer.training:
            self._texts = self.preservation_texts(trainer)
        done = len(self.applied_facts)
        log.info("%s%d facts to edit, %d of them already edited", self.heading, len(self.facts), done)
        missing = len(self._applied) + len(self._undone) - len(self.edited_facts)
        if missing:
            text = "%s%d facts that were edited before are not among the facts now: nothing measures or renews them"
            log.warning(text, self.heading, missing)

    def _release_texts(self) -> None:
        """Forget the preservation texts after the last edit that is due."""
        if not self.pending_facts and (self.renew_every_n_steps is None or self.renewals == self.max_renewals):
            self._texts = None

    def _edit(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        if not facts:
            return
        tell_listeners(trainer, lambda listener: listener.on_edit_start(trainer, pl_module, facts))
        with Ranks.current().together():
            before = self.evaluate(pl_module, facts)
            after: list[Evaluation] = []

            def guard() -> bool:
                after.append(self.evaluate(pl_module, facts, before.neighbours_exact))
                return self.should_keep(before, after[0])

            with edit_progress(trainer) as progress:
                result = self._change(trainer, pl_module, facts, guard=guard, progress=progress)
            event = EditEvent(result, before, after[0], trainer.current_epoch, trainer.global_step, self.name)
            self._record(trainer, event)
        self._release_texts()
        tell_listeners(trainer, lambda listener: listener.on_edit_end(trainer, pl_module, event))

    def _change(
        self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact], **kwargs: Any
    ) -> EditResult:
        if self._texts is None:
            self._texts = self.preservation_texts(trainer)
        try:
            return self.editor.edit(
                find_model(pl_module),
                self.tokenizer,
                facts,
                self._texts,
                optimizers=optimizers_of(trainer),
                layers=self._take_layers(trainer),
                **kwargs,
            )
        except BaseException as error:
            log.warning("the edit was broken off (%s); the weights are what they were before it", type(error).__name__)
            raise

    def _take_layers(self, trainer: L.Trainer) -> list[ExpertLayer] | None:
        """Return the layers as they were checked, once; all callbacks forget theirs, because the weights change."""
        layers = self._layers
        for editing in callbacks_of(trainer, KnowledgeEditing):
            editing._layers = None
        return layers

    def _renewal_due(self, trainer: L.Trainer) -> bool:
        if self.renew_every_n_steps is None or not self._applied or self.renewals == self.max_renewals:
            return False
        return trainer.global_step - self._last_step >= self.renew_every_n_steps

    def _renew(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step
        facts = self.applied_facts
        with Ranks.current().together():
            faded = int((~self.evaluate(pl_module, facts).edits_exact).sum())
            if not faded:
                return
            # an edit that still holds has a target vector of 0: a row with residual 0, which keeps it where it is
            self._change(trainer, pl_module, facts)
            self.renewals += 1
            left = int((~self.evaluate(pl_module, facts).edits_exact).sum())
            renewed = f"{self.metrics_prefix}_renewed"
            log_metrics(trainer, {f"{renewed}/before": faded, f"{renewed}/after": left})
        self._release_texts()
        text = "%srenewed edits at step %d: of %d facts %d were lost, now %d"
        log.info(text, self.heading, self._last_step, len(facts), faded, left)

    def _record(self, trainer: L.Trainer, event: EditEvent) -> None:
        facts, kept = event.result.facts, event.result.kept
        self._edits_made += 1
        self._last_step = event.step
        if kept:
            self._applied.update(event.before.neighbours_exact)
            from_datamodule(trainer, "facts_edited", facts)
        else:
            self._undone.update(fact.key for fact in facts)
        log_metrics(trainer, event.metrics)
        log.log(logging.INFO if kept else logging.WARNING, "%s", event)
        if kept and event.missed:
            log.warning("%s%d edited facts are not generated: %s", self.heading, len(event.missed), event.missed_text)

    def _log_retention(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.applied_facts:
            return
        metrics = self.evaluate(pl_module).metrics
        named = {f"{self.metrics_prefix}/{name}": value for name, value in metrics.items() if value == value}
        # every rank measured all of it
        pl_module.log_dict(named, sync_dist=trainer.world_size > 1)
