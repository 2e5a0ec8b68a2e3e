"""Backward passes beside the training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
        >>> import torch
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
