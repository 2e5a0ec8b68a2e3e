"""The exact solution of the joint problem over all experts."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.batches import expert_batches
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky, solve_factored
from lit_moeedit.solvers.rounding import TOLERANCE, low_rank, working_dtype


class Woodbury:
    r"""Solves the joint problem of all experts exactly, through one ``T × T`` system.

    Stacking the experts makes the objective one ridge regression, and the push-through identity moves its inverse from
    the experts' ``Σ d_hidden`` dimensions to the ``T`` edits:

    .. math:: G_{ts} = \sum_j \varphi_{tj}^\top \varphi_{sj}, \qquad A = (G + \lambda I)^{-1} R, \qquad
              \Delta W_j = \sum_{t \in j} a_t \varphi_{tj}^\top

    Time ``O(Σ_j T_j² d_hidden + T³ + T² d_model)``, memory ``O(T² + N d_hidden)``; no delta is made dense.

    The system is solved in float32 if a bound on what rounding can add to the objective is below 5e-6 of it, and in
    float64 otherwise. Refining the float32 solution would cost the same: its residual has to be computed in float64,
    and with ``d_model`` right-hand sides that is as much work as to solve for them.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> Woodbury().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The minimiser.

        Raises:
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """
        dtype = working_dtype(problem)
        residuals = problem.residuals.to(dtype)
        if not problem.num_edits:
            return low_rank(problem, residuals, torch.Tensor.clone)
        if dtype == torch.float32 and problem.ridge:
            matrix = _system(problem, dtype)
            # rounding acts like a change E of the matrix: it adds tr(Aᵀ Eᵀ (G + λI)⁻¹ G E A) ≤ ‖E‖² ‖A‖²
            change = torch.finfo(dtype).eps * float(matrix.abs().sum(dim=1).max())
            factor, info = torch.linalg.cholesky_ex(matrix)
            if not int(info):
                left = solve_factored(factor, residuals)
                objective = problem.ridge * float((residuals * left).sum())
                if (change * float(left.norm())) ** 2 <= TOLERANCE * objective:
                    return low_rank(problem, left, matrix.matmul)
        what = f"the system of {problem.num_edits} edits at ridge {problem.ridge:g}"
        factor = cholesky(lambda dtype: _system(problem, dtype), torch.float64, what)
        left = solve_factored(factor, residuals.double())
        return low_rank(problem, left, lambda columns: factor @ (factor.mT @ columns))


def _system(problem: EditProblem, dtype: torch.dtype) -> Tensor:
    matrix = gram(problem, dtype)
    matrix.diagonal().add_(problem.ridge)
    return matrix


def gram(problem: EditProblem, dtype: torch.dtype | None = None) -> Tensor:
    """``G_ts = Σ_j φ_tjᵀ φ_sj`` over the experts that both edits visit, ``[T, T]``.

    Args:
        problem: with the features.
        dtype: to compute in; by default that of the features, and at least float32.
    """
    size = problem.num_edits
    result = problem.features.new_zeros(size, size, dtype=dtype or working_dtype(problem))
    for batch in expert_batches(problem):
        features = batch.features(problem, result.dtype)
        kernels = features @ features.mT
        # in one dimension: with an index per row and column, adding takes three times as long
        where = batch.edits[:, :, None] * size + batch.edits[:, None, :]
        result.view(-1).scatter_add_(0, where.view(-1), kernels.view(-1))
    return result
