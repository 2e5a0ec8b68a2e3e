"""Parameters that hold other values for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lit_moeedit.interrupts import Undo, held


@contextmanager
def lent(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give parameters or buffers other values within this block, and then their own values back, bit by bit.

    Their own values are in main memory meanwhile, so an interrupt at any moment loses none of them.

    Args:
        tensors: whole parameters or buffers, not sharded.
        values: what each of them is to hold, of the same shape; any dtype and device.

    Yields:
        The tensors' own values, in their order. They may be changed within the block: what they are at its end is what
        the tensors hold afterwards.

    Example:
        >>> import torch
        >>> weight, average = torch.zeros(2), torch.ones(2)
        >>> with lent([weight], [average]) as own:
        ...     own[0] += 5
        ...     weight
        tensor([1., 1.])
        >>> weight
        tensor([5., 5.])
    """
    with held(Undo()) as undo:
        own = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
        undo.by(_put, tensors, own)
        _put(tensors, values)
        yield own


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value.data)
