"""Conjugate gradients on the system of the edits, without the system."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.batches import ExpertBatch, expert_batches
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.rounding import TOLERANCE, low_rank, probes, working_dtype
from lit_moeedit.solvers.woodbury import Woodbury

log = logging.getLogger(__name__)


class ConjugateGradients:
    r"""Solves ``(G + λI) A = R`` by conjugate gradients, for all right-hand sides at once.

    ``G`` is applied expert by expert, through the kernels ``Φ_j Φ_jᵀ`` or, where more than ``2 d_hidden`` edits visit
    an expert, through the features; the preconditioner is its diagonal. Time per iteration
    ``O(Σ_j T_j min(T_j, 2 d_hidden) d_model)``, memory ``O(Σ_j T_j min(T_j, 2 d_hidden) + T d_model)``: less than
    :class:`Woodbury` needs where two edits seldom share an expert, but only if few iterations suffice.

    It stops when the duality gap, which for this problem is exactly ``‖R − (G + λI) A‖²``, is below ``tolerance`` times
    the dual objective ``λ tr(Rᵀ A)``; the objective is then that close to the least. If that takes too many iterations,
    or float32 does not hold it (checked against the features in float64, with random combinations of the right-hand
    sides), :class:`Woodbury` solves instead.

    Args:
        tolerance: share of the objective by which it may be above the least.
        iterations: most iterations before it gives up.

    Raises:
        ValueError: if ``tolerance`` is not positive or ``iterations`` is less than 1.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> ConjugateGradients().solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    def __init__(self, tolerance: float = TOLERANCE, iterations: int = 100) -> None:
        if not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        self.tolerance, self.iterations = tolerance, iterations

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """The minimiser, up to the tolerance.

        Raises:
            torch.linalg.LinAlgError: if the system is singular, which only a ridge of 0 allows.
        """
        if not problem.ridge or not problem.num_edits:  # without a ridge the dual objective is 0, and no gap is small
            return Woodbury().solve(problem)
        return self.solve_with(Operator(problem), problem)

    @full_precision()
    def solve_with(self, operator: Operator, problem: EditProblem) -> ExpertDeltas:
        """:meth:`solve` with an operator that is there already."""
        residuals = problem.residuals.to(operator.dtype)
        left, used = iterate(operator, residuals, self.tolerance, self.iterations)
        if used is None:
            log.info("conjugate gradients did not converge in %d iterations: solving exactly", self.iterations)
            return Woodbury().solve(problem)
        if gap(problem, left) > 2 * self.tolerance:  # the estimate is random
            log.info("conjugate gradients converged only up to rounding: solving exactly")
            return Woodbury().solve(problem)
        return low_rank(problem, left, operator.__matmul__)


class Operator:
    """``G + λ I`` as a product with ``[T, n]`` matrices.

    Args:
        problem: with the features.
    """

    def __init__(self, problem: EditProblem) -> None:
        self.ridge, self.dtype = problem.ridge, working_dtype(problem)
        self.blocks: list[tuple[ExpertBatch, Tensor, bool]] = []
        self.diagonal = problem.features.new_full((problem.num_edits,), problem.ridge, dtype=self.dtype)
        for batch in expert_batches(problem):
            features = batch.features(problem, self.dtype)
            squares = features.square().sum(dim=2)
            self.diagonal.index_add_(0, batch.edits.flatten(), squares.flatten())
            direct = features.shape[1] > 2 * features.shape[2]
            self.blocks.append((batch, features if direct else features @ features.mT, direct))

    def __matmul__(self, columns: Tensor) -> Tensor:
        result = self.ridge * columns
        for batch, block, direct in self.blocks:
            rows = columns.index_select(0, batch.edits.flatten()).view(*batch.edits.shape, -1)
            part = block @ (block.mT @ rows) if direct else block @ rows
            result.index_add_(0, batch.edits.flatten(), part.flatten(0, 1))
        return result


def iterate(operator: Operator, residuals: Tensor, tolerance: float, most: int) -> tuple[Tensor, int | None]:
    """Solution ``[T, n]`` and the number of iterations; ``None`` if the gap was too large after ``most`` of them."""
    left, missing = torch.zeros_like(residuals), residuals.clone()
    inverse = (1 / operator.diagonal)[:, None]
    direction = inverse * missing
    slope = (missing * direction).sum(dim=0)
    dual = 0.0
    for used in range(most + 1):
        # the increments of tr(Rᵀ A) are known: directions are conjugate
        if float(missing.square().sum()) <= tolerance * operator.ridge * dual:
            return left, used
        if used == most:
            break
        image = operator @ direction
        length = slope / (direction * image).sum(dim=0).clamp(min=torch.finfo(slope.dtype).tiny)
        dual += float((length * slope).sum())
        left.addcmul_(direction, length)
        missing.addcmul_(image, length, value=-1)
        scaled = inverse * missing
        before, slope = slope, (missing * scaled).sum(dim=0)
        direction = direction.mul_(slope / before.clamp(min=torch.finfo(slope.dtype).tiny)).add_(scaled)
    return left, None


def gap(problem: EditProblem, left: Tensor) -> float:
    """Duality gap of ``left`` as a share of the dual objective, estimated in float64 from the features."""
    sketch = probes(problem, torch.float64)
    columns = left.double() @ sketch
    missing = problem.residuals.double() @ sketch - problem.ridge * columns
    for batch in expert_batches(problem):
        features = batch.features(problem, torch.float64)
        part = features @ (features.mT @ columns[batch.edits])
        missing.index_add_(0, batch.edits.flatten(), part.flatten(0, 1), alpha=-1)
    dual = problem.ridge * float((problem.residuals.double() * left).sum())
    return float(missing.square().sum()) / dual if dual > 0 else float("inf")
