"""Checkpoints of the trained weights alone, as Lightning's ``ModelParallelStrategy`` loads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.text import first_few

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy


def load_what_is_there(
    strategy: ModelParallelStrategy, module: L.LightningModule, trained: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Have a strategy load checkpoints that lack weights of a module, if none of those is trained.

    Of a folder, the strategy reads what the module's ``state_dict()`` has. Of a single file it wants every weight, so
    this compares the trained ones itself. Neither would tell of trained weights that the module does not have.

    Args:
        strategy: the strategy of the module's trainer.
        module: the module, whose ``state_dict()`` has the trained weights alone.
        trained: returns these by name.
    """
    # a partial, because some launchers pickle it
    load = partial(_load, strategy, strategy.load_checkpoint, module, trained)
    strategy.load_checkpoint = load  # type: ignore[method-assign]


def check_before_loading(
    strategy: ModelParallelStrategy, module: L.LightningModule, check: Callable[[Iterable[str]], None]
) -> None:
    """Have a strategy check the names of a checkpoint's weights before it loads them, all of which it wants.

    Args:
        strategy: the strategy of the module's trainer.
        module: the module.
        check: called with the names, which it may refuse.
    """
    load = partial(_check_and_load, strategy, strategy.load_checkpoint, module, check)
    strategy.load_checkpoint = load  # type: ignore[method-assign]


def _check_and_load(
    strategy: ModelParallelStrategy,
    load: Callable[..., dict[str, Any]],
    module: L.LightningModule,
    check: Callable[[Iterable[str]], None],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    path = Path(strategy.broadcast(checkpoint_path))
    is_known = path.is_file() or (path / ".metadata").is_file()
    if strategy.lightning_module is module and module.strict_loading and is_known:
        check(_shapes(path, weights_only))
    return load(path, weights_only=weights_only)


def _load(
    strategy: ModelParallelStrategy,
    load: Callable[..., dict[str, Any]],
    module: L.LightningModule,
    trained: Callable[[], Mapping[str, Tensor]],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    path = Path(strategy.broadcast(checkpoint_path))
    with held(Undo()) as undo:
        is_file = path.is_file()
        # what is neither is refused by the strategy
        if strategy.lightning_module is module and (is_file or (path / ".metadata").is_file()):
            names = {name for name, _ in chain(module.named_parameters(), module.named_buffers())}
            _compare(path, _shapes(path, weights_only), {name: one.shape for name, one in trained().items()}, names)
            undo.by(setattr, module, "strict_loading", module.strict_loading)
            module.strict_loading = module.strict_loading and not is_file
        return load(path, weights_only=weights_only)


def _shapes(path: Path, weights_only: bool | None) -> dict[str, torch.Size]:
    """Return the shapes of the weights in a checkpoint by name."""
    prefix = "state_dict."
    if path.is_dir():
        found = FileSystemReader(path).read_metadata().state_dict_metadata
        sizes = {name: one.size for name, one in found.items() if isinstance(one, TensorStorageMetadata)}
        return {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}
    contents = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
    weights = contents.get("state_dict") if isinstance(contents, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"{path} is not a checkpoint of Lightning: it has no 'state_dict'")
    return {name: weight.shape for name, weight in weights.items() if isinstance(weight, Tensor)}


def _compare(path: Path, found: Mapping[str, torch.Size], trained: Mapping[str, torch.Size], names: set[str]) -> None:
    """Compare the weights of a checkpoint with those that are trained, and with the names of all.

    Raises:
        ValueError: if trained weights are missing, or of another shape, or of another model.
    """
    for problem, wrong in (
        ("it lacks", trained.keys() - found.keys()),
        ("it also has", found.keys() - names - trained.keys()),
        ("of other shapes are", {name for name in trained.keys() & found.keys() if trained[name] != found[name]}),
    ):
        if wrong:
            raise ValueError(f"{path} is not a checkpoint of this model: {problem} {first_few(sorted(wrong))}")
