"""Low-rank changes of one layer joined, and cut to the rank that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas

NUMERICAL_RANK = 1e-7
"""Singular values below this share of the largest one are dropped: they are rounding errors of float32."""


def join(deltas: Sequence[ExpertDeltas]) -> ExpertDeltas:
    """Return the sum of changes of one layer as one change, with the terms of all.

    Args:
        deltas: at least one, of the same shape and number of experts.

    Raises:
        ValueError: if there are none, or they are of different layers.

    Example:
        >>> one = ExpertDeltas(torch.tensor([2]), torch.tensor([0]), torch.ones(1, 3), torch.ones(1, 4), 8)
        >>> join([one, one]).dense(2)[0]
        tensor([2., 2., 2., 2.])
    """
    sizes = {(change.num_experts, *change.shape) for change in deltas}
    if len(sizes) != 1:
        raise ValueError(f"expected changes of one layer, got sizes (E, d_model, d_hidden) {sorted(sizes)}")
    rows, offset = [], 0
    for change in deltas:
        rows.append(change.row_index + offset)
        offset += len(change.left)
    left, right = ([getattr(change, name) for change in deltas] for name in ("left", "right"))
    dtype = max((tensor.dtype for tensor in (*left, *right)), key=lambda kind: torch.finfo(kind).bits)
    return ExpertDeltas(
        torch.cat([change.expert_index for change in deltas]),
        torch.cat(rows),
        torch.cat([tensor.to(dtype) for tensor in left]),
        torch.cat([tensor.to(dtype) for tensor in right]),
        deltas[0].num_experts,
    )


def cut(deltas: ExpertDeltas, rank: int | None = None) -> ExpertDeltas:
    """Return changes whose experts have as few terms as they need, or the best ones of at most a given rank.

    Args:
        deltas: the changes.
        rank: maximum number of terms of an expert; ``None`` for its numerical rank, see :data:`NUMERICAL_RANK`.

    Returns:
        The changes with the smallest Frobenius distance to ``deltas``, computed in float64 and rounded to their dtype.

    Raises:
        ValueError: if the rank is below 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, or None for the numerical rank, got {rank}")
    factors = [_cut(*rows, rank) for rows in map(deltas.rows, deltas.experts) if rows is not None]
    return ExpertDeltas.from_rows(deltas.experts, factors, (deltas.left, deltas.right), deltas.num_experts)


def _cut(left: Tensor, right: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return balanced factors of ``leftᵀ right`` by its singular values, float64."""
    bases, cores = zip(*(torch.linalg.qr(factor.double().T) for factor in (left, right)), strict=True)
    output, values, hidden = torch.linalg.svd(cores[0] @ cores[1].T, full_matrices=False)
    kept = int((values > NUMERICAL_RANK * values.amax()).sum()) if rank is None else min(rank, len(values))
    roots = values[:kept].sqrt()
    return (bases[0] @ output[:, :kept] * roots).T, (bases[1] @ hidden[:kept].T * roots).T
