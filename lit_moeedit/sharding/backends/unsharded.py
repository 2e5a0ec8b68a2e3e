"""Parameters that every rank holds as a whole, without sharding or under DDP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_moeedit.sharding.shards import Copy, Shard


def unsharded(weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
    """Return the shard of a plain parameter, which is all of it."""
    if isinstance(weight, DTensor) or _trains_shards(optimizers):
        return None
    states = (getattr(optimizer, "state", {}).get(weight, {}) for optimizer in optimizers)
    moments = [view(value) for state in states for value in state.values() if is_moment(value, weight)]
    return Shard(weight.shape, weight.dtype, 0, weight.numel(), view(weight), None, moments)


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
