"""Block coordinate descent over the experts, the solver of MoEEdit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky
from lit_moeedit.solvers.rounding import working_dtype


class BlockCoordinateDescent:
    r"""Visits one expert after the other and solves for its delta with the others fixed (MoEEdit, algorithm 1).

    The running residual ``ρ_t = r_t − Σ_j ΔW_j φ_tj`` is kept up to date, so that no sum over experts is taken again.
    A block solves its ridge regression exactly, as a correction of the delta it has. If no more edits visit the expert
    than it has dimensions, that is done in the dual form ``ΔW_j = Σ_{t∈j} b_t φ_tjᵀ``:

    .. math:: B_j \leftarrow B_j + (\Phi_j \Phi_j^\top + \lambda I)^{-1} (\rho_j - \lambda B_j), \qquad
              \rho_j \leftarrow \lambda B_j

    and else in the primal form, with ``(Φ_jᵀΦ_j + λI)⁻¹ (Φ_jᵀρ_j − λ ΔW_jᵀ)``. The inverses are computed once and kept
    for all passes. They have ``min(T_j, d_hidden)²`` numbers each, together no more than the features. The objective
    falls or stays with every block.

    Args:
        passes: how often each expert is visited.
        seed: of the random order of experts, drawn anew for each pass.
        tolerance: stop after a pass that lowered the objective by no more than this share of it; 0 runs all passes.
        on_block: called with the objective after each block (which costs one evaluation each); for tests and plots.

    Raises:
        ValueError: if ``passes`` is less than 1 or ``tolerance`` is negative.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> BlockCoordinateDescent(passes=2).solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        passes: int = 4,
        seed: int = 0,
        tolerance: float = 0.0,
        on_block: Callable[[float], None] | None = None,
    ) -> None:
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        if tolerance < 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        self.passes, self.seed, self.tolerance, self.on_block = passes, seed, tolerance, on_block

    @full_precision()
    def solve(self, problem: EditProblem, start: ExpertDeltas | None = None) -> ExpertDeltas:
        """An approximate minimiser, better with every pass.

        Args:
            problem: the edit problem.
            start: deltas to start from instead of none, of any problem with experts of the same shape. What they hold
                for experts that this problem does not visit is dropped: it could only cost.

        Raises:
            ValueError: if ``start`` has another shape.
            torch.linalg.LinAlgError: if a block's system is singular, which only a ridge of 0 allows.
        """
        shape = (problem.residuals.shape[1], problem.features.shape[1])
        if start is not None and (start.shape != shape or start.num_experts != problem.num_experts):
            raise ValueError(
                f"start must have {problem.num_experts} experts of shape {shape}, "
                f"got {start.num_experts} of {start.shape}"
            )
        blocks = [_Block(problem, expert, pairs) for expert, pairs in problem.experts()]
        running = problem.residuals.to(working_dtype(problem), copy=True)
        objective = float(running.double().square().sum())
        if start is not None:
            objective = problem.objective(start)
            for block in blocks:
                block.start = start.rows(block.expert)
                if block.start is not None:
                    running[block.edits] -= block.effect(problem).to(running.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        for number in range(self.passes):
            fall = 0.0
            for i in torch.randperm(len(blocks), generator=generator).tolist():
                fall += blocks[i].update(problem, running)
                if self.on_block is not None:
                    self.on_block(problem.objective(_collect(problem, blocks)))
            if self.tolerance:
                if start is not None and number == 0:  # blocks know only how far they fell from nothing
                    fall = objective - problem.objective(_collect(problem, blocks))
                if fall <= self.tolerance * objective:
                    break
                objective -= fall
        return _collect(problem, blocks)


class _Block:
    """One expert: the inverse of its system, and its current delta ``leftᵀ right``."""

    def __init__(self, problem: EditProblem, expert: int, pairs: Tensor) -> None:
        self.expert, self.pairs, self.edits, self.ridge = expert, pairs, problem.edit_index[pairs], problem.ridge
        given = problem.features[pairs]
        count, dimensions = given.shape
        what = f"the system of expert {expert} at ridge {problem.ridge:g}"

        def invert(rows: Tensor, dtype: torch.dtype) -> Tensor:
            def system(dtype: torch.dtype) -> Tensor:
                matrix = rows.to(dtype) @ rows.to(dtype).T
                matrix.diagonal().add_(problem.ridge)
                return matrix

            return torch.cholesky_inverse(cholesky(system, dtype, what))

        self.dual = count <= dimensions
        self.right, features = given, given
        self.inverse = invert(features if self.dual else features.T, working_dtype(problem))
        if not self.dual:
            # a delta that is dense has the identity for its basis
            self.right = torch.eye(dimensions).to(given)
        elif self.inverse.dtype != working_dtype(problem):
            # features that are nearly dependent make large rows that cancel: take an orthonormal basis of them
            basis, mixture = torch.linalg.qr(given.double().T)
            self.dual, self.right, features = False, basis.T.to(given.dtype), mixture.T
            self.inverse = invert(mixture, torch.float64)
        self.features = features.to(self.inverse.dtype)
        self.left = self.inverse.new_zeros(len(self.right), problem.residuals.shape[1])
        self.start: tuple[Tensor, Tensor] | None = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """Factors of the current delta; before the first update those to start from."""
        return (self.left, self.right) if self.start is None else self.start

    def effect(self, problem: EditProblem) -> Tensor:
        """What the deltas to start from predict for the edits of this expert, ``[T_j, d_model]``."""
        assert self.start is not None
        left, right = (factor.to(self.inverse.dtype) for factor in self.start)
        return (problem.features[self.pairs].to(right.dtype) @ right.T) @ left

    def update(self, problem: EditProblem, running: Tensor) -> float:
        """Solve the block exactly and bring the running residual ``[T, d_model]`` up to date.

        Returns:
            By how much the objective is now below that of no delta (first update) or of the one before.
        """
        if self.start is not None:
            running.index_add_(0, self.edits, self.effect(problem).to(running.dtype))
            self.start = None
        missing = running.index_select(0, self.edits).to(self.left.dtype)
        slope = torch.sub(missing if self.dual else self.features.T @ missing, self.left, alpha=self.ridge)
        step = self.inverse @ slope
        self.left += step
        # in the dual form what a step predicts, Φ_j Φ_jᵀ step, follows from the system that it solves
        moved = torch.sub(slope, step, alpha=self.ridge) if self.dual else self.features @ step
        running.index_add_(0, self.edits, moved.to(running.dtype), alpha=-1)
        return float(((moved if self.dual else step) * slope).sum())


def _collect(problem: EditProblem, blocks: list[_Block]) -> ExpertDeltas:
    residuals, factors = problem.residuals, [block.rows() for block in blocks]
    counts = torch.tensor([len(right) for _, right in factors], dtype=torch.long)
    experts = torch.tensor([block.expert for block in blocks], dtype=torch.long).repeat_interleave(counts)
    left = torch.cat([residuals[:0], *(left.to(residuals.dtype) for left, _ in factors)])
    right = torch.cat([problem.features[:0], *(right.to(residuals.dtype) for _, right in factors)])
    terms = torch.arange(len(left), device=left.device)
    return ExpertDeltas(experts.to(left.device), terms, left, right, problem.num_experts)
