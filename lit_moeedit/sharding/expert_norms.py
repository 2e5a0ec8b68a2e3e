"""Norms of experts, read from sharded weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.ranks import Ranks


@torch.no_grad()
def expert_norms(weights: Mapping[int, Tensor], ranks: Ranks) -> dict[int, Tensor]:
    """Compute the Frobenius norm of each expert of some layers.

    Each rank adds up the squares of its own shard, and the sums are all-reduced: nothing is gathered.

    Args:
        weights: by layer index, the weights of all experts, ``[E, …]``, the same layers on all ranks.
        ranks: the processes that share the work. Each calls this.

    Returns:
        By layer index, ``[E]`` float64 on the CPU.

    Raises:
        UnsupportedShardingError: if a parameter is partitioned in a way that cannot be read.

    Example:
        >>> expert_norms({3: torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])}, Ranks())
        {3: tensor([5., 1.], dtype=torch.float64)}
    """
    parts = {index: Part.of(weight) for index, weight in weights.items()}
    squares = {index: torch.zeros(part.shape[0], dtype=torch.float64) for index, part in parts.items()}
    for index, part in parts.items():
        if part.is_counted(ranks):
            norms = [torch.linalg.vector_norm(part.rows(j), dtype=torch.float64) for j in range(part.shape[0])]
            squares[index] = torch.stack(norms).square().cpu()
    ranks.check_errors()  # the sums must not be mixed up with the flags of a rank that has failed
    ranks.all_reduce(*squares.values())
    return {index: total.sqrt() for index, total in squares.items()}
