"""The part of a fit that is still to come, as far as it is known while the fit starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.trainer.states import TrainerFn

from lit_moeedit.callbacks.named import callbacks_of


@dataclass(frozen=True)
class FitLimits:
    """Bounds of a fit that goes on until it ends by itself; infinite where a bound is not known.

    Attributes:
        epoch: the first epoch that is still to come, or the one that is resumed.
        epochs: epochs to come have lower numbers than this.
        step: number of optimizer steps that are done, of all optimizers as in ``trainer.global_step``.
        steps: maximum number of optimizer steps at the end.
        steps_per_epoch: optimizer steps of an epoch; 0 if not known.
        validates: false if no validation comes.
        options: the trainer's options that set the bounds, for messages.
    """

    epoch: int = 0
    epochs: float = math.inf
    step: int = 0
    steps: float = math.inf
    steps_per_epoch: int = 0
    validates: bool = True
    options: str = ""

    @classmethod
    def of(cls, trainer: L.Trainer, is_loaded: bool) -> FitLimits:
        """Read the limits of the trainer's fit.

        Args:
            trainer: the trainer.
            is_loaded: true if the number of batches and the progress of a resumed run are known, as they are from
                ``on_train_start`` on.
        """
        assert trainer.max_epochs is not None
        epoch, step = trainer.current_epoch, trainer.global_step
        epochs = math.inf if trainer.max_epochs == -1 else float(trainer.max_epochs)
        steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
        names = ("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches")
        if trainer.limit_train_batches == 0 or steps <= step:
            epochs, steps = min(epochs, epoch), min(steps, step)
        batches = trainer.fit_loop.max_batches if is_loaded else math.inf
        per_epoch = 0
        if math.isfinite(batches) and trainer.lightning_module.automatic_optimization:
            varies = bool(callbacks_of(trainer, GradientAccumulationScheduler))
            most = math.ceil(batches / (1 if varies else trainer.accumulate_grad_batches))
            per_epoch = 0 if varies else most
            if epochs < math.inf:
                steps = min(steps, step + max(0.0, epochs - epoch) * most)
            if per_epoch and steps < math.inf:
                # an epoch that is resumed in its middle has fewer steps
                epochs = min(epochs, epoch + math.ceil((steps - step) / per_epoch) + (step > 0))
        options = ", ".join(f"{name}={getattr(trainer, name)}" for name in names)
        found = cls(epoch, epochs, step, steps, per_epoch, options=options)
        return replace(found, validates=found._may_validate(trainer))

    def _may_validate(self, trainer: L.Trainer) -> bool:
        every = trainer.check_val_every_n_epoch
        if not trainer.enable_validation:
            return False
        first = 0 if every is None else (self.epoch // every + 1) * every - 1
        if every is not None and first >= self.epochs:
            return False
        interval = getattr(trainer, "val_check_batch", None)
        if self.step or not self.steps_per_epoch or interval in (None, math.inf):
            return True
        needed = first * self.steps_per_epoch + interval // trainer.accumulate_grad_batches
        return bool(needed <= self.steps)


def end_of(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the epoch and step at which the fit of a checkpoint ended; ``None`` if there is something left to fit.

    After the end Lightning calls no hook of the training, and the trainer does not know its progress in the hooks that
    are left. The epoch is what ``trainer.current_epoch`` was in ``on_train_end``.
    """
    try:
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        begun, epochs = progress["started"], progress["processed"]
        steps = checkpoint["global_step"]
    except (KeyError, TypeError):
        return None
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    limits = ((epochs, trainer.max_epochs), (steps, trainer.max_steps))
    is_over = any(limit not in (None, -1) and done >= limit for done, limit in limits)
    return (begun, steps) if is_over or trainer.limit_train_batches == 0 else None
