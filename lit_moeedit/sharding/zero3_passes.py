"""Forward and backward passes under DeepSpeed ZeRO stage 3: what is gathered, what is kept, what is left alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@contextmanager
def gathering_on_use(model: nn.Module) -> Iterator[None]:
    """A forward in this block gathers weights that a module reads without calling the module that they belong to.

    Under ZeRO stage 3 DeepSpeed gathers a module's weights before that module's forward. What is read otherwise, such
    as the convolution's weight in Qwen3.5's linear attention, it gathers when it is read, and from then on with the
    module that reads it; but only during a forward of its engine, so that a forward of the model alone would fail until
    training has begun. In this block it does so, too.

    Only the forward belongs in the block: whatever reads a weight in it gathers that. Outside of ZeRO stage 3 nothing
    happens.

    Args:
        model: the model. All ranks must enter the block.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with gathering_on_use(layer):
        ...     output = layer(torch.ones(2))
    """
    watched: list[Any] = [part._parameters for part in model.modules() if hasattr(part._parameters, "_in_forward")]
    before = [weights._in_forward for weights in watched]
    for weights in watched:
        weights._in_forward = True
    try:
        yield
    finally:
        for weights, value in zip(watched, before, strict=True):
            weights._in_forward = value


@contextmanager
def beside_training(model: nn.Module) -> Iterator[None]:
    """Forward and backward passes in this block leave the training's gradients alone under DeepSpeed, too.

    Under ZeRO stage 3 DeepSpeed makes "leaf modules" of the MoE blocks of some families. After every backward pass
    through one, ``torch.autograd.grad`` with respect to something else included, it takes gradients of zero for
    the block's weights and sends them to the optimizer. Not so in this block; gradients of weights must not be asked
    for in it.

    Args:
        model: the model, or a module that holds it. All ranks must enter the block.

    Example:
        >>> layer, offset = nn.Linear(2, 2), torch.zeros(2, requires_grad=True)
        >>> with beside_training(layer):
        ...     (gradient,) = torch.autograd.grad(layer(torch.ones(2) + offset).sum(), offset)
    """
    leaves = [module for module in model.modules() if getattr(module, "_z3_leaf", False)]
    hooks = [module._backward_hooks for module in leaves]
    for module in leaves:
        module._backward_hooks = OrderedDict()
    try:
        yield
    finally:
        for module, kept in zip(leaves, hooks, strict=True):
            module._backward_hooks = kept


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
