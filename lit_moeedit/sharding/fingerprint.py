"""Fingerprints that tell one state of a model's weights from another, however they are sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import zero_3_partition

BLOCK = 2**18
"""Numbers that have weights of their own; the sums of further blocks are weighted once more."""
BLOCKS = {"cpu": 1}
"""Blocks that are summed at a time, by the kind of device; :data:`MANY_BLOCKS` on others."""
MANY_BLOCKS = 128
"""Blocks where starting an operation takes longer than computing it: 256 MiB of products."""

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
    weights: dict[torch.device, Tensor] = {}
    found: dict[torch.device, dict[int, Tensor]] = {}
    for i, tensor in enumerate(tensors.values()):
        if hasattr(tensor, "ds_id"):
            start, numbers = zero_3_partition(tensor)
        elif ranks.rank == 0:  # all ranks hold all of it
            start, numbers = 0, tensor.reshape(-1)
        else:
            continue
        own = weights.get(numbers.device)
        if own is None or len(own) < min(BLOCK, start + len(numbers)):
            weights[numbers.device] = own = _weights(min(BLOCK, start + len(numbers)), numbers.device)
        found.setdefault(numbers.device, {})[i] = _sum(numbers, start, own)
    for totals in found.values():  # one look at each device: it waits for all that the device was given
        sums[list(totals)] = torch.stack(list(totals.values())).cpu()
    ranks.check_errors()  # its sum must not meet the flags of a rank that has failed
    ranks.all_reduce(sums)
    shapes = [f"{list(getattr(tensor, 'ds_shape', tensor.shape))} {tensor.dtype}" for tensor in tensors.values()]
    return {name: f"{shape} {value:x}" for name, shape, value in zip(tensors, shapes, sums.tolist(), strict=True)}


def _weights(count: int, device: torch.device) -> Tensor:
    """Weights of the first ``count`` places of a block."""
    place = torch.arange(count, device=device)
    # odd, so that the change of a single number never gets lost, and mixed, so that two do not cancel
    return ((place * 0x9E3779B97F4A7C1) ^ ((place * 0x2545F4914F6CDD1D) >> 29)) | 1


def _sum(numbers: Tensor, start: int, weights: Tensor) -> Tensor:
    """Weighted sum of a run of a tensor's numbers that begins at ``start``."""
    total = torch.zeros((), dtype=torch.int64, device=numbers.device)
    bits = numbers.view(_BITS[numbers.element_size()])
    stop, many = start + len(numbers), BLOCKS.get(numbers.device.type, MANY_BLOCKS)
    low = start
    while low < stop:
        number, place = divmod(low, BLOCK)
        # several blocks, if all of them are whole
        blocks = max(1, min(many, (stop - low) // BLOCK)) if place == 0 else 1
        high = min((number + blocks) * BLOCK, stop)
        run = bits[low - start : high - start]
        if blocks == 1:
            total += (run * weights[place : place + len(run)]).sum() * _factor(number)
        else:
            places = torch.arange(number, number + blocks, device=numbers.device)
            factors = ((places * 0x5851F42D4C957F2D) & (2**63 - 1)) | 1  # as _factor: products wrap at 2⁶⁴
            total += ((run.view(blocks, BLOCK) * weights).sum(1) * factors).sum()
        low = high
    return total


def _factor(number: int) -> int:
    """Weight of a block."""
    return ((number * 0x5851F42D4C957F2D) % 2**63) | 1
