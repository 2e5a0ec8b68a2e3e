"""The exact solution of the joint problem over all experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.batches import expert_batches
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.linalg import solve_ridge
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.rounding import low_rank, working_dtype
from lit_moeedit.solvers.solver import Solver


class Woodbury(Solver):
    r"""Solves the joint problem of all experts exactly, through one system of equations.

    Stacking the experts makes the objective one ridge regression, and the push-through identity moves its inverse from
    the ``D = Σ d_hidden`` dimensions of the visited experts to the ``T`` edits:

    .. math:: G_{ts} = \sum_j \varphi_{tj}^\top \varphi_{sj}, \qquad A = (G + \lambda I)^{-1} R, \qquad
              \Delta W_j = \sum_{t \in j} a_t \varphi_{tj}^\top

    Time ``O(Σ_j T_j² d_hidden + T³ + T² d_model)``, memory ``O(T² + N d_hidden)``; no delta is made dense.

    Where ``D`` is smaller than ``T``, as with the few narrow experts of small models, the inverse stays where it was,
    and the deltas are dense. With the features of an edit stacked to ``Φ [T, D]``:

    .. math:: (\Phi^\top \Phi + \lambda I) \, \Delta W^\top = \Phi^\top R

    Time ``O(N d_hidden D + D³ + D² d_model)``, memory ``O(T D + D² + D d_model)``.

    Either system is solved in float32 if a bound on what rounding can add to the objective is below 5e-6 of it, and in
    float64 otherwise.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> Woodbury().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """Return the minimiser.

        Raises:
            torch.linalg.LinAlgError: if the system is singular, as it may be with a ridge of 0.
        """
        return minimiser(lambda dtype: problem, problem.residuals.dtype)


def minimiser(make: Callable[[torch.dtype], EditProblem], dtype: torch.dtype) -> ExpertDeltas:
    """Return the minimiser of a problem whose features may themselves be the result of a computation.

    Args:
        make: returns the problem for a dtype to compute in: features that are not exact in float32 are computed anew
            in float64, if the solution needs that.
        dtype: dtype of the deltas.

    Raises:
        torch.linalg.LinAlgError: if the system is singular.
    """
    problem = make(working_dtype(dtype))
    primal = 0 < len(problem.experts()) * problem.features.shape[1] < problem.num_edits
    return (_primal if primal else _dual)(problem, make, dtype)


def _dual(problem: EditProblem, make: Callable[[torch.dtype], EditProblem], dtype: torch.dtype) -> ExpertDeltas:
    if not problem.num_edits:
        return low_rank(problem, problem.residuals, gram(problem), dtype)
    what = f"the system of {problem.num_edits} edits at ridge {problem.ridge:g}"

    def system(at: torch.dtype) -> tuple[Tensor, Tensor]:
        return gram(make(at), at), make(at).residuals.to(at)

    left, factor = solve_ridge(system, problem.ridge, working_dtype(dtype), what)
    return low_rank(make(left.dtype), left, factor, dtype)


def _primal(problem: EditProblem, make: Callable[[torch.dtype], EditProblem], dtype: torch.dtype) -> ExpertDeltas:
    d_hidden, experts = problem.features.shape[1], [j for j, _ in problem.experts()]
    what = f"the system of {len(experts)} experts at ridge {problem.ridge:g}"
    energy = problem.residuals.double().square().sum()
    stacked, _ = solve_ridge(
        lambda at: _normal_equations(make(at), at), problem.ridge, working_dtype(dtype), what, energy
    )
    identity = torch.eye(d_hidden, dtype=dtype, device=stacked.device)
    rows = [(own, identity) for own in torch.split(stacked, d_hidden)]
    return ExpertDeltas.from_rows(experts, rows, (problem.residuals.to(dtype), identity), problem.num_experts)


def gram(problem: EditProblem, dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``G_ts = Σ_j φ_tjᵀ φ_sj`` over the experts that both edits visit, ``[T, T]``.

    Args:
        problem: the edit problem.
        dtype: dtype to compute in; by default that of the features, and at least float32.
    """
    size = problem.num_edits
    result = problem.features.new_zeros(size, size, dtype=dtype or working_dtype(problem.features.dtype))
    for batch in expert_batches(problem):
        features = batch.features(problem, result.dtype)
        kernels = features @ features.mT
        # in one dimension: with an index per row and column, adding takes three times as long
        where = batch.edits[:, :, None] * size + batch.edits[:, None, :]
        result.view(-1).scatter_add_(0, where.view(-1), kernels.view(-1))
    return result


def _normal_equations(problem: EditProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute ``ΦᵀΦ`` and ``ΦᵀR``, expert by expert: the rows of an expert need only the edits that visit it."""
    d_hidden, experts = problem.features.shape[1], problem.experts()
    size = len(experts) * d_hidden
    design = problem.features.new_zeros(problem.num_edits, size, dtype=dtype)
    residuals = problem.residuals.to(dtype)
    matrix, right_hand = design.new_empty(size, size), design.new_empty(size, residuals.shape[1])
    for start, (_, pairs) in zip(range(0, size, d_hidden), experts, strict=True):
        own, edits = slice(start, start + d_hidden), problem.edit_index[pairs]
        features = problem.features[pairs].to(dtype)
        design[edits, own] = features
        # the experts that come later fill in their own rows and columns
        matrix[own, : own.stop] = features.T @ design[edits, : own.stop]
        matrix[:start, own] = matrix[own, :start].T
        right_hand[own] = features.T @ residuals[edits]
    return matrix, right_hand
