"""Dense changes of many experts at once, because on a GPU one product takes longer to start than to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision

if TYPE_CHECKING:
    from lit_moeedit.solvers import ExpertDeltas


class Batch(NamedTuple):
    """Consecutive experts of those that change, in ascending order.

    Attributes:
        experts: their indices.
        rows: the same, ``[n]`` int64, on the device that computes the changes.
        first: position of the first of them among all experts that change.
        longest: maximum number of terms of one expert.
    """

    experts: list[int]
    rows: Tensor
    first: int
    longest: int


class Batches:
    """Yield all changes, in batches that one product makes dense. Experts with fewer terms are padded with zeros.

    The constructor waits for the device; the other methods do not.

    Args:
        deltas: the changes.
        device: device to compute them on.
        transposed: whether experts are stored as ``[d_hidden, d_model]``.
        limit: maximum number of elements in a batch's changes, and in its padded terms. A single expert may have more.
    """

    def __init__(self, deltas: ExpertDeltas, device: torch.device, transposed: bool, limit: int) -> None:
        order = torch.argsort(deltas.expert_index, stable=True)
        experts, counts = torch.unique_consecutive(deltas.expert_index[order], return_counts=True)
        self._experts, self._lengths = torch.stack((experts, counts)).tolist()
        self._left, self._right = deltas.left.to(device), deltas.right.to(device)
        self._rows, self._order = deltas.row_index[order].to(device), order.to(device)
        self._index, self._counts = experts.to(device), counts.to(device)
        self._begins = self._counts.cumsum(0) - self._counts
        self._transposed, self._limit = transposed, limit

    def __iter__(self) -> Iterator[Batch]:
        widths = self._left.shape[1], self._right.shape[1]
        for first, last, longest in _runs(self._lengths, widths[0] * widths[1], sum(widths), self._limit):
            yield Batch(self._experts[first:last], self._index[first:last], first, longest)

    @full_precision()
    def dense(self, batch: Batch) -> Tensor:
        """Return the changes of a batch's experts, ``[n, d_model, d_hidden]`` or transposed."""
        own = slice(batch.first, batch.first + len(batch.experts))
        places = torch.arange(batch.longest, device=self._order.device)
        # after an expert's last term there are those of the next, whose left factors are set to zero
        terms = (self._begins[own, None] + places).clamp_(max=len(self._order) - 1)
        padding = places >= self._counts[own, None]
        left = self._left[self._rows[terms]].masked_fill_(padding[..., None], 0)
        right = self._right[self._order[terms]]
        return torch.bmm(right.mT, left) if self._transposed else torch.bmm(left.mT, right)


def _runs(lengths: Sequence[int], size: int, width: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Cut the experts into runs of at most ``limit`` elements; yields start, stop and the maximum number of terms."""
    first = longest = 0
    for place, length in enumerate(lengths):
        if place > first and (place + 1 - first) * max(size, max(longest, length) * width) > limit:
            yield first, place, longest
            first, longest = place, 0
        longest = max(longest, length)
    if first < len(lengths):
        yield first, len(lengths), longest
