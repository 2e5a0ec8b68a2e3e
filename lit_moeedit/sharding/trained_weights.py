"""Checkpoints of the trained weights alone, as Lightning's ``ModelParallelStrategy`` loads them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.text import first_few

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy


def load_what_is_there(
    strategy: ModelParallelStrategy, module: L.LightningModule, trained_names: Callable[[], Collection[str]]
) -> None:
    """Have a strategy load checkpoints that lack weights of a module, if none of those is trained.

    Of a folder, the strategy reads what the module's ``state_dict()`` has. Of a single file it wants every weight, so
    this looks for the trained ones itself.

    Args:
        strategy: the strategy of the module's trainer.
        module: the module, whose ``state_dict()`` has the trained weights alone.
        trained_names: returns their names.
    """
    # a partial, because some launchers pickle it
    load = partial(_load, strategy, strategy.load_checkpoint, module, trained_names)
    strategy.load_checkpoint = load  # type: ignore[method-assign]


def _load(
    strategy: ModelParallelStrategy,
    load: Callable[..., dict[str, Any]],
    module: L.LightningModule,
    trained_names: Callable[[], Collection[str]],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    path = Path(strategy.broadcast(checkpoint_path))
    with held(Undo()) as undo:
        if strategy.lightning_module is module and path.is_file():
            contents = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
            missing = sorted(set(trained_names()) - set(contents["state_dict"]))
            if missing:
                raise ValueError(f"{path} is not a checkpoint of this model: it lacks {first_few(missing)}")
            undo.by(setattr, module, "strict_loading", module.strict_loading)
            module.strict_loading = False
        return load(path, weights_only=weights_only)
