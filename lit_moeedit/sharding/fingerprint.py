"""Fingerprints that tell one state of a model's weights from another, however they are sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_moeedit.sharding.backends import own_elements
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import Own

BLOCK = 2**18
"""Elements of a block, each with a weight of its own. The sums of further blocks are weighted once more."""
BLOCKS = {"cpu": 1}
"""Number of blocks that are summed at a time, by the type of device; :data:`MANY_BLOCKS` on others."""
MANY_BLOCKS = 128
"""Number of blocks where starting an operation takes longer than computing it: 256 MiB of products."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(Own):
    """A copy of what this rank held of a parameter."""

    @classmethod
    def of(cls, tensor: Tensor) -> Part:
        """Return what this rank holds of a parameter or buffer, without a copy."""
        return cls(*own_elements(tensor))

    def is_counted(self, ranks: Ranks) -> bool:
        """Tell if this rank is the one that counts these elements, where ranks add up what they hold."""
        return ranks.rank == 0 if self.is_whole else self.is_first

    def to(self, target: torch.dtype | str) -> Part:
        """Return a copy in main memory (``cpu``), or the same in another dtype."""
        copied = self.elements.to("cpu", copy=True) if isinstance(target, str) else self.elements.to(target)
        return self._replace(elements=copied)

    def of_same_shard(self, other: Part) -> Tensor:
        """Return the elements at the places of another part's, of which this part has all.

        Raises:
            ValueError: if it is cut along another dimension.
        """
        if other.dim == self.dim == 0:
            return self.elements[other.start - self.start :][: len(other.elements)]
        if self.is_whole:
            count = len(other.elements) * self.shape[other.dim] // len(self.elements)
            return self.elements.view(*self.shape).narrow(other.dim, other.start, count).reshape(-1)
        if (self.dim, self.start, len(self.elements)) != (other.dim, other.start, len(other.elements)):
            raise ValueError(f"a parameter is sharded along dimension {self.dim}, and {other.dim} in the other")
        return self.elements

    def rows(self, number: int) -> Tensor:
        """Return this rank's elements of one entry along the first dimension, such as an expert."""
        if self.dim > 0:
            return self.elements.view(self.shape[0], -1)[number]
        size = torch.Size(self.shape[1:]).numel()
        start, stop = (min(max(x * size - self.start, 0), len(self.elements)) for x in (number, number + 1))
        return self.elements[start:stop]


@torch.no_grad()
def fingerprints(
    tensors: Mapping[str, Tensor | Part], ranks: Ranks, rounded_to: torch.dtype | None = None
) -> dict[str, str]:
    """Compute a short text for each parameter or buffer that changes when any of its elements does.

    The bits of each element, as an integer, are added up with a weight that depends on its position, modulo 2⁶⁴, in one
    pass over the memory. Of sharded parameters each rank adds up its own shard, and the sums are all-reduced.
    Fingerprints tell states of training apart. They are no defence against forgery.

    Args:
        tensors: parameters, buffers or copies of them by name, the same names on all ranks.
        ranks: the processes that share the work. Each calls this.
        rounded_to: dtype to round the elements to first. Copies of the same weights in two dtypes have the same
            fingerprint after rounding to the lower precision.

    Returns:
        Shape, dtype and sum of each tensor, by name.

    Raises:
        UnsupportedShardingError: if a parameter is partitioned in a way that cannot be read.

    Example:
        >>> fingerprints({"bias": torch.zeros(3)}, Ranks())
        {'bias': '[3] torch.float32 0'}
    """
    sums = torch.zeros(len(tensors), dtype=torch.int64)
    weights: dict[torch.device, Tensor] = {}
    found: dict[torch.device, dict[int, Tensor]] = {}
    parts = [tensor if isinstance(tensor, Part) else Part.of(tensor) for tensor in tensors.values()]
    for i, part in enumerate(parts):
        if not part.is_counted(ranks):
            continue
        start, elements = part.start, part.elements
        last = start + len(elements) if part.dim == 0 else torch.Size(part.shape).numel()
        if rounded_to is not None:
            elements = elements.to(rounded_to)
        own = weights.get(elements.device)
        if own is None or len(own) < min(BLOCK, last):
            weights[elements.device] = own = _weights(min(BLOCK, last), elements.device)
        total = _sum(elements, start, own) if part.dim == 0 else _sum_cut(part._replace(elements=elements), own)
        found.setdefault(elements.device, {})[i] = total
    for totals in found.values():  # one read per device, because each waits for all queued work
        sums[list(totals)] = torch.stack(list(totals.values())).cpu()
    ranks.check_errors()  # the sums must not be mixed up with the flags of a rank that has failed
    ranks.all_reduce(sums)
    shapes = [f"{list(part.shape)} {rounded_to or part.elements.dtype}" for part in parts]
    return {name: f"{shape} {value:x}" for name, shape, value in zip(tensors, shapes, sums.tolist(), strict=True)}


def _weights(count: int, device: torch.device) -> Tensor:
    """Return the weights of the first ``count`` positions of a block."""
    place = torch.arange(count, device=device)
    # odd, so that the change of a single element is never lost, and mixed, so that two changes do not cancel
    return ((place * 0x9E3779B97F4A7C1) ^ ((place * 0x2545F4914F6CDD1D) >> 29)) | 1


def _factors(numbers: Tensor) -> Tensor:
    """Return the factors of blocks of some numbers."""
    return ((numbers * 0x5851F42D4C957F2D) & (2**63 - 1)) | 1  # products wrap at 2⁶⁴


def _sum_cut(part: Part, weights: Tensor) -> Tensor:
    """Compute the weighted sum of the entries of a dimension that is not the first."""
    shape = torch.Size(part.shape)
    many, width = shape[: part.dim].numel(), shape[part.dim + 1 :].numel()
    bits = part.elements.view(_BITS[part.elements.element_size()]).view(many, -1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    columns = part.start * width + torch.arange(bits.shape[1], device=bits.device)
    for rows in torch.arange(many, device=bits.device).split(max(1, BLOCK // max(1, bits.shape[1]))):
        places = rows[:, None] * (shape[part.dim] * width) + columns
        total += (bits[rows] * weights[places % BLOCK] * _factors(places // BLOCK)).sum()
    return total


def _sum(elements: Tensor, start: int, weights: Tensor) -> Tensor:
    """Compute the weighted sum of a range of a tensor's elements that begins at ``start``."""
    total = torch.zeros((), dtype=torch.int64, device=elements.device)
    bits = elements.view(_BITS[elements.element_size()])
    stop, many = start + len(elements), BLOCKS.get(elements.device.type, MANY_BLOCKS)
    numbers = torch.arange(start // BLOCK, -(-stop // BLOCK), device=elements.device)
    factors = _factors(numbers)
    low = start
    while low < stop:
        number, place = divmod(low, BLOCK)
        # several blocks, if all of them are whole
        blocks = max(1, min(many, (stop - low) // BLOCK)) if place == 0 else 1
        high = min((number + blocks) * BLOCK, stop)
        run = bits[low - start : high - start].view(blocks, -1)
        sums = (run * weights[place : place + run.shape[1]]).sum(1)
        total += (sums * factors[number - start // BLOCK :][:blocks]).sum()
        low = high
    return total
