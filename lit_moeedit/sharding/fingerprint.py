"""What tells one state of a model's weights from another, however they are sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import zero_3_partition

BLOCK = 2**18
"""Numbers that are summed at a time."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprints(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """A short text for each parameter or buffer that changes when any of its numbers does.

    The bits of each number, as an integer, are added up with a weight that depends on its place, modulo 2⁶⁴: one pass
    over the memory. Under DeepSpeed ZeRO-3 each rank adds up its own part, and the sums of the ranks are those of the
    whole. It tells states of training apart, and is no defence against somebody who wants two of them to look alike.

    Args:
        tensors: by name, the same names on all ranks.
        ranks: the processes that share the work; each calls this.

    Returns:
        by name: shape, dtype and sum.

    Raises:
        UnsupportedShardingError: if a parameter is partitioned in a way that cannot be read.

    Example:
        >>> fingerprints({"bias": torch.zeros(3)}, Ranks())
        {'bias': '[3] torch.float32 0'}
    """
    sums = torch.zeros(len(tensors), dtype=torch.int64)
    for i, tensor in enumerate(tensors.values()):
        if hasattr(tensor, "ds_id"):
            start, numbers = zero_3_partition(tensor)
            sums[i] = _sum(numbers, start)
        elif ranks.rank == 0:  # all ranks hold all of it
            sums[i] = _sum(tensor.reshape(-1), 0)
    ranks.agree()  # its sum must not meet the flags of a rank that has failed
    ranks.sum(sums)
    shapes = [f"{list(getattr(tensor, 'ds_shape', tensor.shape))} {tensor.dtype}" for tensor in tensors.values()]
    return {name: f"{shape} {value:x}" for name, shape, value in zip(tensors, shapes, sums.tolist(), strict=True)}


def _sum(numbers: Tensor, start: int) -> Tensor:
    """Weighted sum of a run of a tensor's numbers that begins at ``start``."""
    total = torch.zeros((), dtype=torch.int64, device=numbers.device)
    place = torch.arange(min(BLOCK, start + len(numbers)), device=numbers.device)
    # odd, so that the change of a single number never gets lost, and mixed, so that two do not cancel
    weights = ((place * 0x9E3779B97F4A7C1) ^ ((place * 0x2545F4914F6CDD1D) >> 29)) | 1
    bits = numbers.view(_BITS[numbers.element_size()])
    stop = start + len(numbers)
    for first in range(start - start % BLOCK, stop, BLOCK):
        low, high = max(first, start), min(first + BLOCK, stop)
        block = (bits[low - start : high - start] * weights[low - first : high - first]).sum()
        total += block * (((first // BLOCK * 0x5851F42D4C957F2D) % 2**63) | 1)
    return total
