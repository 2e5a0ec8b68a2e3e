"""Forward passes beside the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


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
        >>> import torch
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
