"""Parameters that every rank holds as a whole, without sharding or under DDP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.sharding.backends.backend import Backend
from lit_moeedit.sharding.shards import Copy, Own, Shard


class Unsharded(Backend):
    """Whole parameters: one process, and DDP."""

    @override
    def holds(self, model: nn.Module) -> bool:
        return True

    @override
    def beside_training(self, model: nn.Module, gradients: bool) -> AbstractContextManager[object]:
        return frozen(model)

    @override
    def shard(self, weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
        if isinstance(weight, DTensor) or _trains_shards(optimizers):
            return None
        states = (getattr(optimizer, "state", {}).get(weight, {}) for optimizer in optimizers)
        moments = [view(value) for state in states for value in state.values() if is_moment(value, weight)]
        return Shard(weight.shape, weight.dtype, 0, weight.numel(), view(weight), None, moments)

    @override
    def own(self, tensor: Tensor) -> Own | None:
        if isinstance(tensor, DTensor):
            return None
        return Own(tensor.shape, True, 0, tensor.detach().reshape(-1))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters of a model within this block."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with held(Undo()) as undo:
        undo.by(_set_trainable, trainable, True)
        _set_trainable(trainable, False)
        yield


def _set_trainable(parameters: Sequence[nn.Parameter], trainable: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(trainable)


def _trains_shards(optimizers: Sequence[Any]) -> bool:
    """Tell if optimizers train DTensors; a whole parameter is then the copy that FSDP2 has gathered for a forward."""
    groups = (group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ()))
    return any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])


def is_moment(value: Any, weight: Tensor) -> bool:
    """Tell if an entry of an optimizer's state is a moment of a weight."""
    return isinstance(value, Tensor) and value.shape == weight.shape


def view(tensor: Tensor, start: int = 0) -> Copy:
    """Return a contiguous tensor as the copy of a parameter's elements from ``start`` on."""
    flat = tensor.data.view(-1)
    return Copy(start, lambda: flat)
