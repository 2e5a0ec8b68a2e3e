"""Context managers for passes under DeepSpeed ZeRO stage 3, which change nothing outside of that stage.

DeepSpeed partitions every parameter. Hooks of its engine gather a module's weights before the module's forward and
backward pass, release them after it, and reduce the gradients. Three things break that for passes that an edit makes
beside the training, or for MoE models:

- A weight that is read by another module than its own is gathered only during the engine's forward:
  :func:`gathering_on_use`.
- A backward pass sends gradients to the optimizer, although the pass is not the training's: :func:`beside_training`.
- Autograd keeps gathered weights alive for the backward pass, through views of them: :func:`regathering`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_moeedit.interrupts import Undo, held


@contextmanager
def gathering_on_use(model: nn.Module) -> Iterator[None]:
    """Have a forward of the model gather weights that a module reads without calling the module that they belong to.

    An example is the convolution's weight in Qwen3.5's linear attention. DeepSpeed gathers such a weight when it is
    read, and from then on together with the module that reads it, but only during a forward of its engine. A forward of
    the model alone would fail until training has begun. Within this block it gathers them, too.

    Only the forward belongs in the block, because everything that reads a weight in it gathers the weight.

    Args:
        model: the model. All ranks must enter the block.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with gathering_on_use(layer):
        ...     output = layer(torch.ones(2))
    """
    watched: list[Any] = [part._parameters for part in model.modules() if hasattr(part._parameters, "_in_forward")]
    with held(Undo()) as undo:
        for weights in watched:
            undo.by(setattr, weights, "_in_forward", weights._in_forward)
            weights._in_forward = True
        yield


@contextmanager
def beside_training(model: nn.Module) -> Iterator[None]:
    """Have forward and backward passes leave the training's gradients alone.

    DeepSpeed makes "leaf modules" of the MoE blocks of some families. After every backward pass through one, even of
    ``torch.autograd.grad`` with respect to activations, it takes gradients of zero for the leaf's weights and sends
    them to the optimizer. Within this block it does not. Gradients of weights must not be computed in it.

    Args:
        model: the model, or a module that holds it. All ranks must enter the block.

    Example:
        >>> layer, offset = nn.Linear(2, 2), torch.zeros(2, requires_grad=True)
        >>> with beside_training(layer):
        ...     (gradient,) = torch.autograd.grad(layer(torch.ones(2) + offset).sum(), offset)
    """
    with held(Undo()) as undo:
        for module in model.modules():
            if getattr(module, "_z3_leaf", False):
                undo.by(setattr, module, "_backward_hooks", module._backward_hooks)
                module._backward_hooks = OrderedDict()
        yield


@contextmanager
def regathering(module: nn.Module) -> Iterator[None]:
    """Have a forward pass keep no gathered weights for its backward pass.

    Autograd saves views of some gathered weights, those of single experts and transposed ones, and a view keeps the
    whole weight alive. At the end of the forward every rank would hold the experts of all layers. Within this block the
    graph saves where in its weight a view lies, and takes it from the weight that DeepSpeed gathers for the module's
    backward pass. Copies of weights that autocast makes in another dtype are saved as usual.

    Only the forward belongs in the block.

    Args:
        module: the model, or a module that holds it.

    Raises:
        RuntimeError: in the backward pass, if a weight is not gathered then. There can be one backward pass only, and
            it must go through the outputs of the weight's module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with regathering(layer):
        ...     loss = layer(torch.ones(2)).sum()
        >>> loss.backward()
    """
    partitioned = hasattr(next(module.parameters(), None), "ds_id")
    with held(Undo()) as undo:
        if partitioned:
            undo.enter_context(torch.autograd.graph.saved_tensors_hooks(_pack, _unpack))
        yield


class _View(NamedTuple):
    """A view of a weight. The offset counts from the weight's first element, wherever that will be in memory."""

    weight: Any
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(tensor: Tensor) -> Tensor | _View:
    weight = tensor if tensor._base is None else tensor._base
    # a view that is older than the current gathered copy is of other memory
    same = hasattr(weight, "ds_id") and tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    if not same or tensor.dtype != weight.dtype:
        # an output that is saved by its own operation would keep the graph alive, forever if no backward pass frees it
        return tensor.detach()
    offset = int(tensor.storage_offset() - weight.storage_offset())
    return _View(weight, tensor.shape, tensor.stride(), offset)


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    weight, shape, stride, offset = saved
    if weight.ds_status.name != "AVAILABLE":
        raise RuntimeError(
            f"the backward pass needs a weight of shape {list(weight.ds_shape)} that DeepSpeed has not gathered: "
            "a forward in regathering() can be followed by one backward pass only"
        )
    gathered: Tensor = weight.data
    return gathered.as_strided(shape, stride, gathered.storage_offset() + offset)
