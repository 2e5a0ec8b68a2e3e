"""What rounding to the problem's dtype does to a solution, and the form of it that suffers least."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem

TOLERANCE = 5e-6
"""Share of the least objective that rounding may add to it: half of what exact solvers promise, as it is estimated."""
PROBES = 16
"""Random combinations of right-hand sides that stand for all of them where a norm is estimated."""


def working_dtype(problem: EditProblem) -> torch.dtype:
    """The dtype to compute in: that of the features, but float32 at least."""
    return torch.promote_types(problem.features.dtype, torch.float32)


def probes(problem: EditProblem, dtype: torch.dtype, count: int = PROBES) -> Tensor:
    """Random signs ``S [d_model, count]``, the same every time, with ``E ‖X S‖_F² = ‖X‖_F²``."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (problem.residuals.shape[1], count), generator=generator) * 2 - 1
    return signs.to(problem.residuals.device, dtype) / count**0.5


def low_rank(problem: EditProblem, left: Tensor, system: Callable[[Tensor], Tensor]) -> ExpertDeltas:
    """The deltas ``ΔW_j = Σ_t a_t φ_tjᵀ`` in the problem's dtype.

    All experts share the rows ``a_t`` if these survive rounding. They do not where features are nearly dependent: then
    large rows cancel in the sum. In that case each expert gets rows of its own, in an orthonormal basis of its
    features.

    Args:
        problem: the edit problem.
        left: its solution ``a_t``, ``[T, d_model]``.
        system: multiplies ``G + λ I`` with columns of the dtype of ``left``.
    """
    dtype = problem.residuals.dtype
    rounded = left.to(dtype)
    if left.dtype != dtype:
        error = (left - rounded.to(left.dtype)) @ probes(problem, left.dtype)
        moved = system(error) - problem.ridge * error
        added = float(moved.square().sum() + problem.ridge * (error * moved).sum())
        residuals = problem.residuals.to(left.dtype)
        # a misfit of the size of the residuals' own rounding is none, also where the ridge is 0
        least = problem.ridge * float((residuals * left).sum()) + float(
            (torch.finfo(dtype).eps * residuals.norm()) ** 2
        )
        if not added <= TOLERANCE * least:
            return _in_bases(problem, left.double())
    return ExpertDeltas(problem.expert_index, problem.edit_index, rounded, problem.features, problem.num_experts)


def _in_bases(problem: EditProblem, left: Tensor) -> ExpertDeltas:
    """The same deltas, each as coefficients of an orthonormal basis of its expert's features."""
    lefts, rights, experts = [], [], []
    for expert, pairs in problem.experts():
        features = problem.features[pairs].double()
        rows = left[problem.edit_index[pairs]]
        if len(features) < features.shape[1]:
            basis, mixture = torch.linalg.qr(features.T)
            rows, right = mixture @ rows, basis.T
        else:
            rows, right = features.T @ rows, torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        lefts.append(rows.to(problem.residuals.dtype))
        rights.append(right.to(problem.residuals.dtype))
        experts += [expert] * len(right)
    rows = torch.cat(lefts)
    index = torch.tensor(experts, device=rows.device)
    terms = torch.arange(len(rows), device=rows.device)
    return ExpertDeltas(index, terms, rows, torch.cat(rights), problem.num_experts)
