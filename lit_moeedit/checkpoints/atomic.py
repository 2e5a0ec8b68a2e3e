"""Atomic writing of checkpoints: a checkpoint of Lightning or DeepSpeed appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy
from typing_extensions import override

from lit_moeedit.atomic_files import atomic_file, atomic_folder
from lit_moeedit.checkpoints.read import check_undamaged


class AtomicCheckpointIO(TorchCheckpointIO):
    """A ``CheckpointIO`` whose checkpoints appear complete or not at all, and are not loaded if they are damaged.

    The previous checkpoint stays until the new one is complete. Lightning's own ``CheckpointIO`` writes into the
    system's folder for temporary files and then moves the file, which across file systems is a copy over the previous
    checkpoint. This writes beside the previous checkpoint and then exchanges the names. It needs no second copy of the
    checkpoint in memory. Checkpoints on other hosts are written as Lightning does.

    The command ``lit-moeedit`` uses it. In a script, give it to the trainer.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: the state of module and trainer.
            path: where to save it.
            storage_options: must be ``None``.

        Raises:
            OSError: it cannot be written; a previous checkpoint at ``path`` is unchanged.
            TypeError: there are storage options.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_file(_local(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch then fails to end the file, too, and raises that
                if isinstance(error.__context__, OSError | KeyboardInterrupt):
                    raise error.__context__ from None
                raise

    @override
    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, after a check of its records against their checksums, which ``torch.load`` ignores.

        Raises:
            CheckpointError: a local checkpoint is damaged.
        """
        if _is_local_file_protocol(path) and _local(path).exists():
            check_undamaged(_local(path))
        return super().load_checkpoint(path, *args, **kwargs)


def save_atomically(strategy: Strategy) -> None:
    """Have a strategy save its checkpoints atomically: files by :class:`AtomicCheckpointIO`, and folders.

    A ``CheckpointIO`` that the user gave to the trainer stays. A folder of DeepSpeed or FSDP2 is written beside the
    previous one by all ranks, and then exchanged with it by the first rank. If a rank fails to write its part, the
    others wait for it in DeepSpeed, as they do without this; the previous checkpoint stays.

    Args:
        strategy: the strategy of a trainer.
    """
    if isinstance(strategy, DeepSpeedStrategy) or _saves_folders(strategy):
        # a partial, because some launchers pickle it
        save = partial(_save_folder, strategy, strategy.save_checkpoint)
        strategy.save_checkpoint = save  # type: ignore[method-assign]
        return
    given = strategy._checkpoint_io
    if given is None or type(given) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif isinstance(given, _WrappingCheckpointIO) and not given._base_checkpoint_io_configured:
        given.checkpoint_io = AtomicCheckpointIO()


def _saves_folders(strategy: Strategy) -> TypeGuard[ModelParallelStrategy]:
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def _save_folder(
    strategy: DeepSpeedStrategy | ModelParallelStrategy,
    save: Callable[..., None],
    checkpoint: dict[str, Any],
    filepath: str | Path,
    storage_options: Any = None,
) -> None:
    path = strategy.broadcast(filepath)
    if not _is_local_file_protocol(path):
        save(checkpoint, path, storage_options)
        return
    with ExitStack() as stack:
        folder: Path | None = None
        error: OSError | None = None
        if strategy.is_global_zero:
            try:
                folder = stack.enter_context(atomic_folder(_local(path), overwrite=True))
            except OSError as caught:  # the others wait
                error = caught
        folder, reason = strategy.broadcast((folder, None if error is None else str(error)))
        if reason is not None:
            raise error or OSError(f"the first rank failed: {reason}")
        save(checkpoint, folder, storage_options)
        strategy.barrier("all ranks have saved")
    strategy.barrier("the checkpoint is in its place")


def _local(path: str | Path) -> Path:
    return Path(str(path).removeprefix("file://"))
