"""Parameters that hold other values for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.sharding.backends import release
from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.ranks import Ranks

BLOCK = 2**24
"""Maximum number of elements that are compared at a time."""


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


@dataclass(frozen=True)
class Movement:
    """The difference between the values that parameters hold for a while and their own.

    Attributes:
        elements: number of elements.
        distance: norm of the difference.
        norm: norm of the values that they hold for a while.
    """

    elements: int
    distance: float
    norm: float

    @property
    def relative(self) -> float:
        """The distance as a share of the norm; 0 if nothing moved, infinite if something moved away from zeros."""
        return self.distance / self.norm if self.norm else float("inf") * bool(self.distance)


@contextmanager
def exchanged(tensors: Mapping[str, Tensor], values: Mapping[str, Part], ranks: Ranks) -> Iterator[Movement]:
    """Give parameters or buffers other values within this block, one after the other, and then their own, bit by bit.

    Each rank writes what it holds of the model weights; master weights stay as they are, so no optimizer may step
    within the block. Their own values are in main memory meanwhile. Of the others, one is in memory at a time, so
    ``values`` may read each when it is asked for it.

    Args:
        tensors: parameters and buffers by name: whole ones, or shards of ZeRO stage 3 or FSDP2.
        values: by the same names, whole tensors or this rank's range of them; any dtype and device.
        ranks: the processes that hold the model. Each calls this with the same names.

    Yields:
        How far the values are from the tensors' own, after rounding to their dtype.

    Raises:
        ValueError: if a value has another shape.
        RankError: if another rank failed.
    """
    with held(Undo()) as undo:
        sums = torch.zeros(2, dtype=torch.float64)
        with ranks.together():
            for name, tensor in tensors.items():
                own = Part.of(tensor).to("cpu")
                undo.by(_write, tensor, own)
                value = values[name]
                if tuple(value.shape) != tuple(own.shape):
                    raise ValueError(f"{name} has the shape {list(own.shape)}, and {list(value.shape)} in the other")
                _write(tensor, value)
                if own.is_counted(ranks):
                    sums += _squares(Part.of(tensor).elements, own.elements)
        ranks.all_reduce(sums)
        elements = sum(prod(Part.of(tensor).shape) for tensor in tensors.values())
        distance, norm = sums.sqrt().tolist()
        yield Movement(elements, distance, norm)


@torch.no_grad()
def _write(tensor: Tensor, value: Part) -> None:
    """Write what this rank holds of a value into a tensor."""
    if isinstance(tensor, nn.Parameter):
        release(tensor)
    own = Part.of(tensor)
    elements = value.of_same_shard(own)
    if own.is_whole:
        tensor.data.copy_(elements.view(tensor.shape))
    else:
        own.elements.copy_(elements)


def _squares(new: Tensor, own: Tensor) -> Tensor:
    """Return the sums of squares of a difference and of its first term, in float64."""
    sums = torch.zeros(2, dtype=torch.float64)
    for some, others in zip(new.split(BLOCK), own.split(BLOCK), strict=True):
        wide = some.to("cpu", torch.float64)
        sums += torch.stack([(wide - others.to(torch.float64)).square().sum(), wide.square().sum()])
    return sums
