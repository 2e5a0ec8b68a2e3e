"""The batches of the Trainer's validation data, for measurements outside of its validation loop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lit_moeedit.interrupts import Undo, held


@contextmanager
def validating(trainer: L.Trainer) -> Iterator[CombinedLoader | None]:
    """Put the trainer into its validation stage; yields its loaders, ``None`` if there is nothing to validate with.

    Hooks of the user may ask for the stage. Random states are restored afterwards.
    """
    with held(Undo()) as undo:
        undo.by(setattr, trainer.state, "stage", trainer.state.stage)
        trainer.validating = True
        with isolate_rng(include_cuda=trainer.strategy.root_device.type == "cuda"):
            yield _loaders(trainer)


def validation_batches(trainer: L.Trainer, pl_module: L.LightningModule, loaders: CombinedLoader) -> Iterator[Any]:
    """Yield the batches of all validation loaders as ``validation_step`` gets them.

    Args:
        trainer: the trainer, whose limits (``limit_val_batches``, ``overfit_batches``, ``fast_dev_run``) are kept.
        pl_module: the module; its hooks that transfer batches, or those of the data module, are called.
        loaders: the loaders.

    Raises:
        ValueError: if a loader can be read only once, so that validation would miss what is read here.
    """
    hook = "on_before_batch_transfer"
    has_hook = trainer.datamodule is not None and is_overridden(hook, trainer.datamodule)  # type: ignore[attr-defined]
    before_transfer = getattr(trainer.datamodule if has_hook else pl_module, hook)  # type: ignore[attr-defined]
    for index, (loader, limit) in enumerate(zip(loaders.flattened, trainer.num_val_batches, strict=True)):
        for batch in islice(_read_again(loader), None if limit == float("inf") else int(limit)):
            batch = before_transfer(trainer.precision_plugin.convert_input(batch), index)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index)


def _loaders(trainer: L.Trainer) -> CombinedLoader | None:
    if trainer.state.fn == TrainerFn.VALIDATING:
        return trainer.validate_loop._combined_loader
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None and trainer.state.fn == TrainerFn.FITTING and trainer.enable_validation:
        # as at the start of training, where the epoch ends with a validation
        loop.setup_data()
    return loop._combined_loader


def _read_again(loader: Any) -> Iterator[Any]:
    """Iterate over a loader without touching an iterator that the Trainer may have of it."""
    if getattr(loader, "persistent_workers", False):
        # a second iterator would start the first one anew: they share the workers
        loader = copy.copy(loader)
        loader._iterator = None
    iterator: Iterator[Any] = iter(loader)
    if iterator is loader:
        raise ValueError(f"a validation loader that can be read only once ({type(loader).__name__}) is left unread")
    return iterator
