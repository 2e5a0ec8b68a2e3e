"""Dense changes of many experts at once: on a GPU a product for each would take longer to start than to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision


class Terms(Protocol):
    """Low-rank deltas as one table: term ``i`` adds ``left[row_index[i]] ⊗ right[i]`` to its expert."""

    @property
    def expert_index(self) -> Tensor:
        """``[M]`` int64."""
        ...

    @property
    def row_index(self) -> Tensor:
        """``[M]`` int64."""
        ...

    @property
    def left(self) -> Tensor:
        """``[R, d_model]``."""
        ...

    @property
    def right(self) -> Tensor:
        """``[M, d_hidden]``."""
        ...


class Batch(NamedTuple):
    """Some of the experts that change, one after the other in ascending order.

    Attributes:
        experts: their numbers.
        rows: the same, ``[n]`` int64, where the changes are computed.
        first: place of the first of them among all that change.
        longest: most terms of one.
    """

    experts: list[int]
    rows: Tensor
    first: int
    longest: int


class Batches:
    """All changes, by batches that one product makes dense; terms that experts have less than others are zeros.

    The device is waited for when this is made, and not again.

    Args:
        deltas: the changes.
        device: where to compute them.
        transposed: whether experts are stored as ``[d_hidden, d_model]``.
        most: numbers at most of a batch's changes, and of its terms with the zeros; one expert is a batch anyway.
    """

    def __init__(self, deltas: Terms, device: torch.device, transposed: bool, most: int) -> None:
        order = torch.argsort(deltas.expert_index, stable=True)
        experts, counts = torch.unique_consecutive(deltas.expert_index[order], return_counts=True)
        self._experts, self._lengths = torch.stack((experts, counts)).tolist()
        self._ends = [0, *accumulate(self._lengths)]
        self._left, self._right = deltas.left.to(device), deltas.right.to(device)
        self._rows, self._order = deltas.row_index[order].to(device), order.to(device)
        self._index, counts = experts.to(device), counts.to(device)
        total = len(order)
        places = torch.arange(len(experts), device=device)
        self._owner = places.repeat_interleave(counts, output_size=total)
        begins = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=total)
        self._place = torch.arange(total, device=device) - begins
        self._transposed, self._most = transposed, most

    def __iter__(self) -> Iterator[Batch]:
        widths = self._left.shape[1], self._right.shape[1]
        for first, last, longest in _runs(self._lengths, widths[0] * widths[1], sum(widths), self._most):
            yield Batch(self._experts[first:last], self._index[first:last], first, longest)

    @full_precision()
    def dense(self, batch: Batch) -> Tensor:
        """The changes of a batch's experts, ``[n, d_model, d_hidden]`` or transposed."""
        count = len(batch.experts)
        begin, end = self._ends[batch.first], self._ends[batch.first + count]
        slots = (self._owner[begin:end] - batch.first) * batch.longest + self._place[begin:end]

        def padded(factors: Tensor, rows: Tensor) -> Tensor:
            table = factors.new_zeros(count * batch.longest, factors.shape[1])
            return table.index_copy_(0, slots, factors.index_select(0, rows)).view(count, batch.longest, -1)

        left, right = padded(self._left, self._rows[begin:end]), padded(self._right, self._order[begin:end])
        return torch.bmm(right.mT, left) if self._transposed else torch.bmm(left.mT, right)


def _runs(lengths: Sequence[int], size: int, width: int, most: int) -> Iterator[tuple[int, int, int]]:
    """First, behind the last, and most terms of one, for runs of as many experts as ``most`` numbers allow."""
    first = longest = 0
    for place, length in enumerate(lengths):
        if place > first and (place + 1 - first) * max(size, max(longest, length) * width) > most:
            yield first, place, longest
            first, longest = place, 0
        longest = max(longest, length)
    if first < len(lengths):
        yield first, len(lengths), longest
