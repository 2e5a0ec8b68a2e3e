"""The form of a solution that suffers least from being rounded to the problem's dtype."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.linalg import TOLERANCE
from lit_moeedit.solvers.problem import EditProblem

PROBES = 16
"""Random combinations of right-hand sides that stand for all of them where a norm is estimated."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in for features of a dtype: the same, but float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def widened(problem: EditProblem) -> EditProblem:
    """Return the problem in the dtype to compute in."""
    dtype = working_dtype(problem.features.dtype)
    if problem.features.dtype == dtype:
        return problem
    return replace(problem, features=problem.features.to(dtype), residuals=problem.residuals.to(dtype))


def low_rank(problem: EditProblem, left: Tensor, factor: Tensor, dtype: torch.dtype) -> ExpertDeltas:
    """Return the deltas ``ΔW_j = Σ_t a_t φ_tjᵀ`` in a dtype.

    All experts share the rows ``a_t`` if these survive rounding. They do not where features are nearly dependent: then
    large rows cancel in the sum. In that case each expert gets rows of its own, in an orthonormal basis of its
    features.

    Args:
        problem: the edit problem.
        left: its solution ``a_t``, ``[T, d_model]``.
        factor: the Cholesky factor of ``G + λ I`` in the dtype of ``left``.
        dtype: dtype of the deltas.
    """
    pairs = (problem.expert_index, problem.edit_index)
    if left.dtype != dtype:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (left.shape[1], PROBES), generator=generator) * 2 - 1
        # random signs S: on average ‖X S‖² is ‖X‖²
        error = (left - left.to(dtype).to(left.dtype)) @ (signs.to(left) / PROBES**0.5)
        moved = factor @ (factor.mT @ error) - problem.ridge * error
        added = moved.square().sum() + problem.ridge * (error * moved).sum()
        residuals = problem.residuals.to(left.dtype)
        # a misfit of the size of the residuals' own rounding is none, also where the ridge is 0
        least = problem.ridge * (residuals * left).sum() + (torch.finfo(dtype).eps * residuals.norm()) ** 2
        if problem.features.dtype != dtype or not bool(added <= TOLERANCE * least):
            return in_bases(ExpertDeltas(*pairs, left, problem.features, problem.num_experts), dtype)
    return ExpertDeltas(*pairs, left.to(dtype), problem.features, problem.num_experts)


def in_bases(deltas: ExpertDeltas, dtype: torch.dtype) -> ExpertDeltas:
    """Return the same deltas in a dtype, each as coefficients of an orthonormal basis; see :func:`in_basis`."""
    rows = [rows for rows in map(deltas.rows, deltas.experts) if rows is not None]
    like = (deltas.left[:0].to(dtype), deltas.right[:0].to(dtype))
    return ExpertDeltas.from_rows(deltas.experts, [in_basis(*both) for both in rows], like, deltas.num_experts)


def in_basis(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return other factors, in float64, of ``leftᵀ right``, with orthonormal rows for the right one.

    Args:
        left: ``[M, d_model]``.
        right: ``[M, d_hidden]``.
    """
    left, right = left.double(), right.double()
    if len(right) >= right.shape[1]:
        return right.T @ left, torch.eye(right.shape[1]).to(right)
    basis, mixture = torch.linalg.qr(right.T)
    return mixture @ left, basis.T
