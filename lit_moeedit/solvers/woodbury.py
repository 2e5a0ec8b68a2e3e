"""The exact solution of the joint problem over all experts."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky


class Woodbury:
    r"""Solves the joint problem of all experts exactly, through one ``T × T`` system.

    Stacking the experts makes the objective one ridge regression, and the push-through identity moves its inverse from
    the experts' ``Σ d_hidden`` dimensions to the ``T`` edits:

    .. math:: G_{ts} = \sum_j \varphi_{tj}^\top \varphi_{sj}, \qquad A = (G + \lambda I)^{-1} R, \qquad
              \Delta W_j = \sum_{t \in j} a_t \varphi_{tj}^\top

    Time ``O(Σ_j T_j² d_hidden + T³ + T² d_model)``, memory ``O(T² + N d_hidden)``; no delta is made dense.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> Woodbury().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The minimiser.

        Raises:
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """

        def system(dtype: torch.dtype) -> Tensor:
            matrix = gram(problem, dtype)
            matrix.diagonal().add_(problem.ridge)
            return matrix

        if problem.num_edits:
            dtype = problem.features.dtype
            factor = cholesky(system, dtype, f"the system of {problem.num_edits} edits at ridge {problem.ridge:g}")
            left = torch.cholesky_solve(problem.residuals.to(factor.dtype), factor).to(problem.residuals.dtype)
        else:
            left = problem.residuals
        return ExpertDeltas(problem.expert_index, problem.edit_index, left, problem.features, problem.num_experts)


def gram(problem: EditProblem, dtype: torch.dtype | None = None) -> Tensor:
    """``G_ts = Σ_j φ_tjᵀ φ_sj`` over the experts that both edits visit, ``[T, T]``, computed in ``dtype``."""
    result = problem.features.new_zeros(problem.num_edits, problem.num_edits, dtype=dtype)
    for _, pairs in problem.experts():
        edits, features = problem.edit_index[pairs], problem.features[pairs].to(result.dtype)
        result[edits[:, None], edits] += features @ features.T
    return result
