"""Checks of a run's start: edits that cannot come in it are refused or named, and the metrics that monitors need."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn

from lit_moeedit.callbacks.averages import averaging_callbacks
from lit_moeedit.callbacks.limits import FitLimits
from lit_moeedit.callbacks.schedule import Schedule

log = logging.getLogger(__name__)


def is_restored_late(trainer: L.Trainer) -> bool:
    """Tell if a checkpoint is restored between the start of the fit and that of training, as by DeepSpeed."""
    return trainer.ckpt_path is not None and trainer.strategy.restore_checkpoint_after_setup


@dataclass(frozen=True)
class Foresight:
    """Knowledge of the edits to come, when a run starts.

    Attributes:
        schedule: their schedule.
        pending: number of facts that are not edited yet.
        edits_made: number of edits that are made already.
        heading: beginning of messages.
    """

    schedule: Schedule
    pending: int
    edits_made: int
    heading: str

    def check_start(self, trainer: L.Trainer) -> None:
        """Check before the first forward that facts can be edited.

        Raises:
            MisconfigurationException: if none of the facts can be edited (in a ``fast_dev_run`` this is a warning).
        """
        if not self.pending or (trainer.training and is_restored_late(trainer)):
            return
        self._check_moments(trainer, is_loaded=False)

    def check_loaded(self, trainer: L.Trainer, renew_every_n_steps: int | None, edited_at: int | None) -> None:
        """Refuse or name what a fit cannot edit or renew, when its data is loaded.

        Args:
            trainer: the trainer.
            renew_every_n_steps: optimizer steps from an edit to its renewal, or ``None``.
            edited_at: optimizer step of the latest edit or renewal, if there was one.

        Raises:
            MisconfigurationException: as :meth:`check_start`.
        """
        self._check_moments(trainer, is_loaded=True)
        limits = FitLimits.of(trainer, is_loaded=True)
        start = self.schedule.first_step(limits) if edited_at is None else edited_at
        if renew_every_n_steps is not None and start + renew_every_n_steps > limits.steps:
            text = (
                "%srenew_every_n_steps=%d: no renewal comes, the run ends after %d optimizer steps and is edited "
                "after %d"
            )
            log.warning(text, self.heading, renew_every_n_steps, limits.steps, start)

    def _check_moments(self, trainer: L.Trainer, is_loaded: bool) -> None:
        """Refuse or name facts whose moment does not come; nothing of a fit is logged before its data is loaded."""
        if not self.pending:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            _tell_of_evaluation(trainer, self.schedule, self.pending, self.heading)
            return
        limits = FitLimits.of(trainer, is_loaded)
        missed = self.schedule.missed(limits, self.pending, self.edits_made)
        if not missed:
            return
        end = _end_of(trainer, self.schedule, limits)
        reason = f"at: {self.schedule} comes too late for {missed} of {self.pending} facts: {end}"
        if missed == self.pending and not self.edits_made and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(f"KnowledgeEditing: {self.heading}{reason}")
        if is_loaded:
            log.warning("%s%s", self.heading, reason)


def _end_of(trainer: L.Trainer, schedule: Schedule, limits: FitLimits) -> str:
    if schedule.moment == "validation":
        names = ("limit_val_batches", "check_val_every_n_epoch", "val_check_interval", "max_epochs", "max_steps")
        options = ", ".join(f"{name}={getattr(trainer, name)}" for name in names)
        return f"the run has no validation; give it a validation set, or change the trainer's options ({options})"
    if schedule.moment == "step":
        end = f"the run ends after {limits.steps:.0f} optimizer steps"
    else:
        end = f"the run has no epoch after epoch {limits.epochs - 1:.0f} (counted from 0)"
        if limits.epochs <= limits.epoch:
            end = "the run has no epoch"
    return f"{end}; edit earlier, or change the trainer's options ({limits.options})"


def _tell_of_evaluation(trainer: L.Trainer, schedule: Schedule, pending: int, heading: str) -> None:
    fn = trainer.state.fn and trainer.state.fn.value
    if schedule.moment == "validation":
        text = (
            "%s%d facts are edited for this '%s' alone: it saves no checkpoint, so the edited weights are lost when "
            "the process ends; trainer.save_checkpoint() or a fit with at: validation keeps them"
        )
        log.warning(text, heading, pending, fn)
    else:
        text = "%s'%s' edits none of %d facts: at: %s comes in a fit only; at: validation edits here, too"
        log.warning(text, heading, fn, pending, schedule)


def tell_of_averages(trainer: L.Trainer, heading: str) -> None:
    """Name a callback that averages the weights, because of which no renewal comes at the end of a fit."""
    for averaging in averaging_callbacks(trainer):
        name = type(averaging).__name__
        text = (
            "%srenew_at: end: no renewal comes, because %s may still change its average of the weights after the last "
            "step; renew_below with renew_at: points renews before it, at points of the survival curve, or remove %s"
        )
        log.warning(text, heading, name, name)


def monitored(trainer: L.Trainer, prefix: str) -> set[str]:
    """Find the metrics of a prefix without which a callback or a scheduler of the learning rate would end the run.

    Args:
        trainer: the trainer.
        prefix: the beginning of the metrics' names, before ``/``.
    """
    schedulers = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    monitors = [*trainer.callbacks, *schedulers]  # type: ignore[attr-defined]
    names = (getattr(monitor, "monitor", None) for monitor in monitors if getattr(monitor, "strict", True))
    return {name for name in names if isinstance(name, str) and name.startswith(f"{prefix}/")}
