"""The callback that edits facts into a model while the Trainer runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.callbacks import states
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.progress import edit_progress
from lit_moeedit.callbacks.resources import (
    callbacks_of,
    find_tokenizer,
    from_datamodule,
    keep_experts_together,
    ranks_of,
    read_documents,
)
from lit_moeedit.callbacks.schedule import Schedule
from lit_moeedit.data.facts import Fact, read_facts, validate_facts
from lit_moeedit.editing import Editor, EditResult, Evaluation, evaluate, neighbour_groups
from lit_moeedit.models.experts import UnsupportedModelError, find_model
from lit_moeedit.sharding.finite import check_finite
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError, locate

log = logging.getLogger(__name__)


class KnowledgeEditing(L.Callback):
    """Edits facts in the routed experts of the model between epochs or steps, and watches what is left of them.

    It works with any ``LightningModule`` that holds one transformers MoE model, in ``fit``, ``validate`` and ``test``.
    Everything is checked when the run starts: the model's layers, the tokenizer, and every fact. An edit is a
    transaction; gradients, modes and random states are as they were afterwards, and an edited run can be stopped
    and resumed without repeating or losing an edit.

    After an edit, every validation logs ``edit/efficacy``, ``edit/generalization``, ``edit/specificity_retained`` and
    the other metrics of :class:`~lit_moeedit.metrics.EditSuccess` for all facts edited so far; the edit itself logs
    ``edit_before/…`` and ``edit_after/…``. To decide otherwise when to edit or what to keep, override
    :meth:`due` or :meth:`should_keep`.

    Args:
        editor: how to edit.
        facts: a facts file (see :func:`~lit_moeedit.data.read_facts`) or facts; ``None`` asks the data module's
            ``edit_facts()``.
        at: when: ``fit_start``, ``validation`` (also in ``validate`` and ``test``), ``{epoch: N}`` (before epoch N,
            counted from 0), ``{step: N}`` (after N optimizer steps), or ``{every_n_epochs: N, batch: M}``.
        preservation: a text file with one document per line, or texts, on which the experts must keep their behaviour;
            ``None`` asks the data module's ``preservation_texts()``.
        renew_every_n_steps: edit what training has undone again, every this many optimizer steps after an edit: facts
            that the model no longer says are brought back, the others enter with residual 0, so that they stay.
            ``None`` leaves the edits to what training makes of them.
        max_renewals: stop renewing after this many times.
        tokenizer: a path or hub id; ``None`` takes the ``tokenizer`` attribute of the module or the data module.
        min_efficacy: undo an edit that ends with less efficacy than this.
        min_specificity_retained: undo an edit that keeps less of its neighbours than this.
        strict: whether a bad row of a facts file is an error (otherwise it is skipped and counted).

    Raises:
        ValueError: if an argument is out of range.
        MisconfigurationException: when the run starts, if there is no tokenizer, no facts or no preservation text, the
            model or a layer cannot be edited, or the parameters are sharded in a way that is not supported (supported
            are one process, DDP, and DeepSpeed ZeRO stages 0 to 3).
        FactError: when the run starts, if a fact cannot be edited.

    Example:
        >>> callback = KnowledgeEditing(Editor(layers=[3, 4]), facts="facts.jsonl", at={"epoch": 1})
        >>> callback.schedule.moment
        'epoch'
    """

    def __init__(
        self,
        editor: Editor,
        facts: str | list[Fact] | None = None,
        at: str | dict[str, int] = "fit_start",
        preservation: str | list[str] | None = None,
        renew_every_n_steps: int | None = None,
        max_renewals: int | None = None,
        tokenizer: str | None = None,
        min_efficacy: float = 0.0,
        min_specificity_retained: float = 0.0,
        strict: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("min_efficacy", min_efficacy), ("min_specificity_retained", min_specificity_retained)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a fraction in [0, 1], got {value}")
        if renew_every_n_steps is not None and renew_every_n_steps < 1:
            raise ValueError(f"renew_every_n_steps must be at least 1, or None for never, got {renew_every_n_steps}")
        self.editor = editor
        if max_renewals is not None and max_renewals < 0:
            raise ValueError(f"max_renewals must be at least 0, or None for no limit, got {max_renewals}")
        self.renew_every_n_steps, self.max_renewals = renew_every_n_steps, max_renewals
        self.schedule = Schedule.parse(at)
        self.min_efficacy = min_efficacy
        self.min_specificity_retained = min_specificity_retained
        self.strict = strict
        self._facts_source = facts
        self._preservation_source = preservation
        self._tokenizer_source = tokenizer
        self._facts: list[Fact] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.ranks: Ranks | None = None  # the processes, known once the run has started
        # the state of the callback: which facts were edited, and what their neighbours said before
        self._applied: dict[str, list[bool]] = {}
        self._undone: set[str] = set()
        self._edits_made = 0
        self._last_step = 0
        self.renewals = 0
        """How often edits were renewed."""

    # -- what the run is about ----------------------------------------------------------------------------------------

    @property
    def facts(self) -> list[Fact]:
        """All facts of the run, checked; empty before it starts."""
        return self._facts or []

    @property
    def applied_facts(self) -> list[Fact]:
        """The facts edited so far."""
        return [fact for fact in self.facts if fact.key in self._applied]

    @property
    def edited_facts(self) -> list[Fact]:
        """The facts that an edit was made of, whether it was kept or undone."""
        return [fact for fact in self.facts if fact.key in self._applied or fact.key in self._undone]

    @property
    def pending_facts(self) -> list[Fact]:
        """The facts still to be edited."""
        return [fact for fact in self.facts if fact.key not in self._applied and fact.key not in self._undone]

    def due(self, trainer: L.Trainer, moment: str) -> list[Fact]:
        """The facts to edit now.

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
        """Whether to keep an edit, asked while it is in the weights; ``False`` undoes it bit by bit."""
        metrics = after.metrics
        return not (
            metrics["efficacy"] < self.min_efficacy or metrics["specificity_retained"] < self.min_specificity_retained
        )

    # -- hooks --------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # the next run may have another model, tokenizer or data module
        self._facts = self._tokenizer = self.ranks = None
        keep_experts_together(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prepare(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is not None and trainer.strategy.restore_checkpoint_after_setup:
            # these weights were not there yet when the fit started
            assert self.ranks is not None
            check_finite(find_model(pl_module), self.ranks)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._edit(trainer, pl_module, self.due(trainer, "epoch"))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._renewal_due(trainer):
            self._renew(trainer, pl_module)
        self._edit(trainer, pl_module, self.due(trainer, "step"))

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._prepare(trainer, pl_module)
            self._edit(trainer, pl_module, self.due(trainer, "validation"))

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._prepare(trainer, pl_module)
        self._edit(trainer, pl_module, self.due(trainer, "validation"))

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_retention(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_retention(trainer, pl_module)

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
        state = states.editing(state_dict)
        if self.editor.memory is not None:
            # a checkpoint of a run without a memory has none
            self.editor.memory.load_state_dict(state.get("memory") or {})
        self._applied, self._undone = dict(state["applied"]), set(state["undone"])
        self._edits_made, self._last_step = state["edits_made"], state["last_step"]
        self.renewals = state["renewals"]

    # -- the edit -----------------------------------------------------------------------------------------------------

    def evaluate(self, pl_module: L.LightningModule, facts: Sequence[Fact] | None = None) -> Evaluation:
        """Evaluate facts (by default those edited so far) against their neighbours before the edit."""
        chosen = self.applied_facts if facts is None else list(facts)
        known = all(fact.key in self._applied for fact in chosen)
        return self._measure(pl_module, chosen, self._applied if known else None)

    def _measure(
        self, pl_module: L.LightningModule, facts: list[Fact], baseline: dict[str, list[bool]] | None
    ) -> Evaluation:
        model, groups, ranks = find_model(pl_module), neighbour_groups(self.facts), self.ranks or Ranks()
        with ranks.together():
            return evaluate(model, self.tokenizer, facts, baseline, groups, self.editor.token_budget, ranks)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, known once the run has started."""
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer is not known before the run starts")
        return self._tokenizer

    def preservation_texts(self, trainer: L.Trainer) -> list[str]:
        """Texts on which the experts must keep their behaviour; empty if the editor needs none."""
        if not self.editor.needs_moments:
            return []
        source = self._preservation_source
        if isinstance(source, str):
            texts = read_documents(source)
        elif source is not None:
            texts = list(source)
        else:
            texts = list(from_datamodule(trainer, "preservation_texts") or [])
        if not texts:
            raise MisconfigurationException(
                f"KnowledgeEditing: preserve={self.editor.preserve!r} needs text whose behaviour is to be kept; give "
                "'preservation' (a text file with a document per line) or a data module with preservation_texts()"
            )
        return texts

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._facts is not None:
            return
        self.ranks = ranks_of(trainer)
        # files may be missing on one rank only
        with self.ranks.together():
            try:
                model = find_model(pl_module)
                check_finite(model, self.ranks)
                for layer in self.editor.check(model):
                    locate(layer.down_proj, self._optimizers(trainer))
            except (UnsupportedModelError, UnsupportedShardingError) as error:
                raise MisconfigurationException(f"KnowledgeEditing: {error}") from error
            self._tokenizer = find_tokenizer(trainer, pl_module, self._tokenizer_source, "KnowledgeEditing")
            facts = self._find_facts(trainer)
            self.ranks.check_same("the facts", [repr(fact) for fact in facts])
            if self.schedule.moment == "validation" or trainer.training:
                self.preservation_texts(trainer)
        self._facts = facts
        log.info("%d facts to edit, %d of them already edited", len(self.facts), len(self.applied_facts))

    @staticmethod
    def _optimizers(trainer: L.Trainer) -> list[Any]:
        """The optimizers that hold the weights too; outside of ``fit`` the trainer may still have those of the last."""
        return list(trainer.optimizers) if trainer.state.fn == TrainerFn.FITTING else []

    def _find_facts(self, trainer: L.Trainer) -> list[Fact]:
        source = self._facts_source
        if isinstance(source, str):
            return read_facts(source, strict=self.strict, tokenizer=self.tokenizer)
        found = from_datamodule(trainer, "edit_facts") if source is None else source
        if not found:
            raise MisconfigurationException(
                "KnowledgeEditing has no facts to edit: give 'facts' (a file), or a data module with edit_facts()"
            )
        return validate_facts(found, tokenizer=self.tokenizer, strict=self.strict)

    def _edit(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: list[Fact]) -> None:
        if not facts:
            return
        assert self.ranks is not None
        self._tell(trainer, "on_edit_start", pl_module, facts)
        with self.ranks.together():
            before = self.evaluate(pl_module, facts)
            after: list[Evaluation] = []

            def guard() -> bool:
                after.append(self._measure(pl_module, facts, before.neighbours_exact))
                return self.should_keep(before, after[0])

            with edit_progress(trainer) as progress:
                result = self._change(trainer, pl_module, facts, guard=guard, progress=progress)
            event = EditEvent(result, before, after[0], trainer.current_epoch, trainer.global_step)
            self._record(trainer, event)
        self._tell(trainer, "on_edit_end", pl_module, event)

    def _tell(self, trainer: L.Trainer, hook: str, *args: Any) -> None:
        assert self.ranks is not None
        for listener in callbacks_of(trainer):
            if isinstance(listener, EditListener):
                # the next one may make forwards, which no rank may make alone
                with self.ranks.together():
                    getattr(listener, hook)(trainer, *args)

    def _change(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: list[Fact], **kwargs: Any) -> EditResult:
        try:
            return self.editor.edit(
                find_model(pl_module),
                self.tokenizer,
                facts,
                self.preservation_texts(trainer),
                optimizers=self._optimizers(trainer),
                ranks=self.ranks,
                **kwargs,
            )
        except BaseException as error:
            log.warning("the edit was broken off (%s); the weights are what they were before it", type(error).__name__)
            raise

    def _renewal_due(self, trainer: L.Trainer) -> bool:
        if self.renew_every_n_steps is None or not self._applied or self.renewals == self.max_renewals:
            return False
        return trainer.global_step - self._last_step >= self.renew_every_n_steps

    def _renew(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.ranks is not None
        self._last_step = trainer.global_step
        facts = self.applied_facts
        with self.ranks.together():
            faded = int((~self.evaluate(pl_module, facts).edits_exact).sum())
            if not faded:
                return
            # an edit that still holds has a target vector of 0: a row with residual 0, which keeps it where it is
            self._change(trainer, pl_module, facts)
            self.renewals += 1
            left = int((~self.evaluate(pl_module, facts).edits_exact).sum())
            for logger in trainer.loggers:
                logger.log_metrics({"edit_renewed/before": faded, "edit_renewed/after": left}, step=trainer.global_step)
        log.info("renewed edits at step %d: of %d facts %d were lost, now %d", self._last_step, len(facts), faded, left)

    def _record(self, trainer: L.Trainer, event: EditEvent) -> None:
        facts, kept = event.result.facts, event.result.kept
        self._edits_made += 1
        self._last_step = event.step
        if kept:
            self._applied.update(event.before.neighbours_exact)
            from_datamodule(trainer, "facts_edited", facts)
        else:
            self._undone.update(fact.key for fact in facts)
        for logger in trainer.loggers:
            logger.log_metrics(event.metrics, step=trainer.global_step)
        log.log(logging.INFO if kept else logging.WARNING, "%s", event)
        if kept and event.missed:
            log.warning("%d edited facts are not said: %s", len(event.missed), event.missed_text)

    def _log_retention(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.applied_facts:
            return
        metrics = {name: value for name, value in self.evaluate(pl_module).metrics.items() if value == value}
        # every rank measured all of it
        pl_module.log_dict({f"edit/{name}": value for name, value in metrics.items()}, sync_dist=trainer.world_size > 1)
