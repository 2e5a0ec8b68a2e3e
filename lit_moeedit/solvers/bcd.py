"""Block coordinate descent over the experts, the solver of MoEEdit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky


class BlockCoordinateDescent:
    r"""Visits one expert after the other and solves for its delta with the others fixed (MoEEdit, algorithm 1).

    With the running residual ``ρ_t = r_t − Σ_j ΔW_j φ_tj``, a block first takes its own part back out of ``ρ`` and
    then solves its ridge regression exactly, in the dual form if fewer edits visit the expert than it has dimensions:

    .. math:: \Delta W_j = \sum_{t \in j} b_t \varphi_{tj}^\top, \qquad
              B_j = (\Phi_j \Phi_j^\top + \lambda I)^{-1} (\rho_j + \Phi_j \Delta W_j^\top)

    The factor of each block is computed once and kept for all passes. The objective falls or stays with every block.

    Args:
        passes: how often each expert is visited.
        seed: of the random order of experts, drawn anew for each pass.
        tolerance: stop after a pass that lowered the objective by less than this share of it; 0 runs all passes.
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

    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """An approximate minimiser, better with every pass.

        Raises:
            torch.linalg.LinAlgError: if a block's system is singular, which only a ridge of 0 allows.
        """
        blocks = [_Block(problem, expert, pairs) for expert, pairs in problem.experts()]
        generator = torch.Generator().manual_seed(self.seed)
        running = problem.residuals.clone()
        previous = float(running.double().square().sum())
        for _ in range(self.passes):
            for i in torch.randperm(len(blocks), generator=generator).tolist():
                blocks[i].update(running)
                if self.on_block is not None:
                    self.on_block(problem.objective(_collect(problem, blocks)))
            if self.tolerance:
                penalty = problem.ridge * _collect(problem, blocks).square_norm()
                objective = float(running.double().square().sum()) + penalty
                if previous - objective <= self.tolerance * previous:
                    break
                previous = objective
        return _collect(problem, blocks)


class _Block:
    """One expert: its features, the factor of its system, and its current delta ``leftᵀ right``."""

    def __init__(self, problem: EditProblem, expert: int, pairs: Tensor) -> None:
        self.expert = expert
        self.edits = problem.edit_index[pairs]
        self.features = problem.features[pairs]
        count, dimensions = self.features.shape
        self.dual = count <= dimensions

        def system(dtype: torch.dtype) -> Tensor:
            rows = self.features.to(dtype) if self.dual else self.features.T.to(dtype)
            matrix = rows @ rows.T
            matrix.diagonal().add_(problem.ridge)
            return matrix

        self.factor = cholesky(system, self.features.dtype, f"the system of expert {expert} at ridge {problem.ridge:g}")
        # in the dual form the delta is a combination of the features, in the primal form it is dense: its own basis
        self.right = self.features if self.dual else torch.eye(dimensions).to(self.features)
        self.kernel = self.features @ self.right.T
        self.left = problem.residuals.new_zeros(len(self.right), problem.residuals.shape[1])

    def update(self, running: Tensor) -> None:
        """Solve the block exactly and bring the running residual ``[T, d_model]`` up to date."""
        wanted = running[self.edits] + self.kernel @ self.left
        right_hand = wanted if self.dual else self.features.T @ wanted
        self.left = torch.cholesky_solve(right_hand.to(self.factor.dtype), self.factor).to(running.dtype)
        running[self.edits] = wanted - self.kernel @ self.left


def _collect(problem: EditProblem, blocks: list[_Block]) -> ExpertDeltas:
    counts = torch.tensor([len(block.right) for block in blocks], dtype=torch.long)
    experts = torch.tensor([block.expert for block in blocks], dtype=torch.long).repeat_interleave(counts)
    device = problem.residuals.device
    left = torch.cat([problem.residuals[:0], *(block.left for block in blocks)])
    right = torch.cat([problem.features[:0], *(block.right for block in blocks)])
    return ExpertDeltas(experts.to(device), torch.arange(len(left), device=device), left, right, problem.num_experts)
