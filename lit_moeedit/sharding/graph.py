"""What autograd keeps of sharded weights between a forward and its backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@contextmanager
def regathering(module: nn.Module) -> Iterator[None]:
    """A forward pass in this block keeps no gathered weights for its backward pass.

    Under ZeRO stage 3 DeepSpeed gathers a module's weights for its forward and lets go of them behind it. But autograd
    saves views of some of them, those of single experts and transposed ones, and a view keeps the whole: at the end of
    the forward every rank would hold the experts of all layers. In this block the graph remembers where in its weight
    a view lies, and takes it again from what DeepSpeed gathers for the module's backward pass. Copies of weights that
    autocast makes in another dtype are saved as ever.

    Only the forward belongs in the block. Outside of ZeRO stage 3 nothing happens.

    Args:
        module: the model, or a module that holds it.

    Raises:
        RuntimeError: in the backward pass, if a weight is not gathered then: the graph can be run backwards once, by
            passes that go through the outputs of the weight's module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with regathering(layer):
        ...     loss = layer(torch.ones(2)).sum()
        >>> loss.backward()
    """
    first = next(module.parameters(), None)
    if not hasattr(first, "ds_id"):
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


class _Place(NamedTuple):
    """A part of a weight; the offset counts from the weight's first number, wherever that will be."""

    weight: Any
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(tensor: Tensor) -> Tensor | _Place:
    weight = tensor if tensor._base is None else tensor._base
    # a view from before the weight was gathered anew is of other memory
    same = hasattr(weight, "ds_id") and tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    if not same or tensor.dtype != weight.dtype:
        # an output that is saved by the operation that made it would keep that, and a graph that is never run backwards
        # would stay for ever
        return tensor.detach()
    offset = int(tensor.storage_offset() - weight.storage_offset())
    return _Place(weight, tensor.shape, tensor.stride(), offset)


def _unpack(saved: Tensor | _Place) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    weight, shape, stride, offset = saved
    if weight.ds_status.name != "AVAILABLE":
        raise RuntimeError(
            f"the backward pass needs a weight of shape {list(weight.ds_shape)} that DeepSpeed has not gathered: "
            "a forward in regathering() can be followed by one backward pass only"
        )
    gathered = weight.data
    return gathered.as_strided(shape, stride, gathered.storage_offset() + offset)
