"""The exact solution in the space of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky, solve_factored
from lit_moeedit.solvers.rounding import TOLERANCE, working_dtype


class NormalEquations:
    r"""Solves the joint problem exactly through a system over the dimensions of all visited experts.

    With the features of an edit stacked to ``Φ [T, D]``, ``D = Σ d_hidden`` over the visited experts:

    .. math:: (\Phi^\top \Phi + \lambda I) \, \Delta W^\top = \Phi^\top R

    Block ``(i, j)`` of the matrix has only products of edits that visit both experts. Time
    ``O(N d_hidden D + D³ + D² d_model)``, memory ``O(T D + D² + D d_model)``: worth it where there are more edits than
    dimensions, as with the few narrow experts of small models. The deltas are dense, as ``D`` rows of an identity.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> NormalEquations().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The minimiser.

        Raises:
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """
        stacked = _solution(problem) if problem.num_pairs else problem.residuals[:0]
        d_hidden = problem.features.shape[1]
        identity = torch.eye(d_hidden).to(problem.features)
        experts = torch.tensor([j for j, _ in problem.experts()], dtype=torch.long, device=stacked.device)
        return ExpertDeltas(
            experts.repeat_interleave(d_hidden),
            torch.arange(len(stacked), device=stacked.device),
            stacked.to(problem.residuals.dtype),
            identity.repeat(len(experts), 1),
            problem.num_experts,
        )


def _solution(problem: EditProblem) -> Tensor:
    """``ΔWᵀ``, ``[D, d_model]``; in float64 if a bound on what rounding adds to the objective asks for it."""
    dtype = working_dtype(problem)
    if dtype == torch.float32 and problem.ridge:
        matrix, right_hand = _system(problem, dtype)
        # rounding acts like a change E of the matrix: it adds tr(ΔW Eᵀ (ΦᵀΦ + λI)⁻¹ E ΔWᵀ) ≤ ‖E‖² ‖ΔW‖² / λ
        change = torch.finfo(dtype).eps * float(matrix.abs().sum(dim=1).max())
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            solution = solve_factored(factor, right_hand)
            objective = float(problem.residuals.double().square().sum() - (right_hand * solution).double().sum())
            if (change * float(solution.norm())) ** 2 / problem.ridge <= TOLERANCE * objective:
                return solution
    what = f"the system of {len(problem.experts())} experts at ridge {problem.ridge:g}"
    factor = cholesky(lambda dtype: _system(problem, dtype)[0], torch.float64, what)
    return solve_factored(factor, _system(problem, torch.float64)[1])


def _system(problem: EditProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``ΦᵀΦ + λ I`` and ``ΦᵀR``, expert by expert: the rows of an expert need only the edits that visit it."""
    d_hidden, experts = problem.features.shape[1], problem.experts()
    design = problem.features.new_zeros(problem.num_edits, len(experts), d_hidden, dtype=dtype)
    for i, (_, pairs) in enumerate(experts):
        design[problem.edit_index[pairs], i] = problem.features[pairs].to(dtype)
    design = design.flatten(1)
    residuals = problem.residuals.to(dtype)
    matrix = design.new_empty(len(experts) * d_hidden, len(experts) * d_hidden)
    right_hand = design.new_empty(len(matrix), residuals.shape[1])
    for i, (_, pairs) in enumerate(experts):
        rows, edits = slice(i * d_hidden, (i + 1) * d_hidden), problem.edit_index[pairs]
        features = problem.features[pairs].to(dtype)
        matrix[rows] = features.T @ design[edits]
        right_hand[rows] = features.T @ residuals[edits]
    matrix.diagonal().add_(problem.ridge)
    return matrix, right_hand
