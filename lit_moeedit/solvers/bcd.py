"""Block coordinate descent over the experts, the solver of MoEEdit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.batches import ExpertBatch, expert_batches
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.linalg import invert_ridge
from lit_moeedit.solvers.problem import EditProblem
from lit_moeedit.solvers.rounding import in_basis, working_dtype
from lit_moeedit.solvers.solver import Solver


class BlockCoordinateDescent(Solver):
    r"""Visits one expert after the other and solves for its delta with the others fixed (MoEEdit, algorithm 1).

    The running residual ``ρ_t = r_t − Σ_j ΔW_j φ_tj`` is kept up to date, so that no sum over experts is taken again.
    A block solves its ridge regression exactly, as a correction of the delta it has. If no more edits visit the expert
    than it has dimensions, that is done in the dual form ``ΔW_j = Σ_{t∈j} b_t φ_tjᵀ``:

    .. math:: B_j \leftarrow B_j + (\Phi_j \Phi_j^\top + \lambda I)^{-1} (\rho_j - \lambda B_j), \qquad
              \rho_j \leftarrow \lambda B_j

    and else in the primal form, with ``(Φ_jᵀΦ_j + λI)⁻¹ (Φ_jᵀρ_j − λ ΔW_jᵀ)``. The inverses are computed once and kept
    for all passes. They have ``min(T_j, d_hidden)²`` elements each, together no more than the features. The objective
    falls or stays with every block.

    Args:
        passes: how often each expert is visited.
        seed: seed of the random order of experts, drawn anew for each pass.
        tolerance: stop after a pass that lowered the objective by no more than this share of it; 0 runs all passes.

    Raises:
        ValueError: if ``passes`` is less than 1 or ``tolerance`` is negative.

    Example:
        >>> problem = EditProblem(torch.tensor([0]), torch.tensor([1]), torch.eye(1, 4), torch.ones(1, 2), 3, ridge=1.0)
        >>> BlockCoordinateDescent(passes=2).solve(problem).dense(1)[:, 0]
        tensor([0.5000, 0.5000])
    """

    def __init__(self, passes: int = 4, seed: int = 0, tolerance: float = 0.0) -> None:
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        if tolerance < 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        self.passes, self.seed, self.tolerance = passes, seed, tolerance

    @full_precision()
    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """Return an approximate minimiser, better with every pass.

        Raises:
            torch.linalg.LinAlgError: if a block's system is singular, as it may be with a ridge of 0.
        """
        blocks = _blocks(problem)
        running = problem.residuals.to(working_dtype(problem.residuals.dtype), copy=True)
        # how far the objective falls stays on the device, and is read only for the tolerance
        fall = running.new_zeros((), dtype=torch.float64) if self.tolerance else None
        objective = float(running.double().square().sum()) if self.tolerance else 0.0
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.passes):
            for i in torch.randperm(len(blocks), generator=generator).tolist():
                blocks[i].update(running, fall)
            if fall is not None:
                fallen = float(fall)
                if fallen <= self.tolerance * objective:
                    break
                objective -= fallen
                fall.zero_()
        experts = [j for j, _ in problem.experts()]
        rows = [block.rows(problem.residuals.dtype) for block in blocks]
        return ExpertDeltas.from_rows(experts, rows, (problem.residuals, problem.features), problem.num_experts)


@dataclass
class _Block:
    """One expert: the inverse of its system, and its current delta.

    Attributes:
        edits: ``[T_j]``, those that visit it.
        features: ``[T_j, d_hidden]``, their features.
        inverse: ``(Φ_jΦ_jᵀ + λI)⁻¹`` in the dual form, ``(Φ_jᵀΦ_j + λI)⁻¹`` in the primal form.
        left: the left factor, ``[T_j, d_model]`` or ``[d_hidden, d_model]``, in the dtype of the inverse.
        ridge: ``λ``.
        dual: whether the dual form is used.
    """

    edits: Tensor
    features: Tensor
    inverse: Tensor
    left: Tensor
    ridge: float
    dual: bool

    def rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return factors of the current delta that keep their accuracy when rounded to a dtype."""
        if not self.dual:
            return self.left, torch.eye(self.features.shape[1]).to(self.features)
        return (self.left, self.features) if self.left.dtype == dtype else in_basis(self.left, self.features)

    def update(self, running: Tensor, fall: Tensor | None = None) -> None:
        """Solve the block exactly and bring the running residual up to date, without waiting for the device.

        On a GPU the time is that of starting the kernels, one for each operation.

        Args:
            running: the running residual ``[T, d_model]``.
            fall: if given, is raised by how much the objective falls.
        """
        missing = running.index_select(0, self.edits)
        if self.dual:
            slope = torch.sub(missing.to(self.left.dtype), self.left, alpha=self.ridge)
            self.left.addmm_(self.inverse, slope)
            left_over = (self.ridge * self.left).to(running.dtype)
            running.index_copy_(0, self.edits, left_over)
            if fall is not None:
                fall += ((missing - left_over) * slope).sum()
        else:
            features = self.features.to(self.left.dtype)
            slope = torch.addmm(self.left, features.T, missing.to(self.left.dtype), beta=-self.ridge)
            step = self.inverse @ slope
            self.left += step
            running.index_add_(0, self.edits, (features @ step).to(running.dtype), alpha=-1)
            if fall is not None:
                fall += (step * slope).sum()


def _blocks(problem: EditProblem) -> list[_Block]:
    """Return the experts that are visited, ascending, none of them changed yet."""
    experts, dimensions, dtype = problem.experts(), problem.features.shape[1], working_dtype(problem.features.dtype)
    counts = [len(pairs) for _, pairs in experts]
    inverses: dict[int, Tensor] = {}
    for batch in expert_batches(problem):
        lengths = [counts[member] for member in batch.members]
        for dual in (True, False):
            rows = [i for i, length in enumerate(lengths) if (length <= dimensions) == dual]
            if rows:
                part = batch if len(rows) == len(lengths) else batch.part(rows)
                inverses |= zip(part.members, _inverses(problem, part, dual, dtype), strict=True)
    order = torch.cat([problem.edit_index[:0], *(pairs for _, pairs in experts)])
    edits, features = (torch.split(rows[order], counts) for rows in (problem.edit_index, problem.features))
    sizes = [min(count, dimensions) for count in counts]
    left = problem.residuals.new_zeros(sum(sizes), problem.residuals.shape[1], dtype=dtype)
    return [
        _Block(edits[i], features[i], inverses[i], own.to(inverses[i].dtype), problem.ridge, counts[i] <= dimensions)
        for i, own in enumerate(torch.split(left, sizes))
    ]


def _inverses(problem: EditProblem, batch: ExpertBatch, dual: bool, dtype: torch.dtype) -> list[Tensor]:
    """Return the inverses of the experts' systems, without padding."""
    experts = [problem.experts()[member] for member in batch.members]

    def systems(dtype: torch.dtype, chosen: list[int] | None) -> Tensor:
        some = batch if chosen is None else batch.part(chosen)
        features = some.features(problem, dtype)
        matrix = features @ features.mT if dual else features.mT @ features
        if dual and some.valid is not None:
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            diagonal += diagonal.amax(dim=1, keepdim=True) * ~some.valid
        return matrix

    names = [f"the system of expert {expert} at ridge {problem.ridge:g}" for expert, _ in experts]
    if not dual or batch.valid is None:
        return invert_ridge(systems, problem.ridge, dtype, names)
    inverses = invert_ridge(systems, problem.ridge, dtype, names, batch.valid.sum(dim=1))
    # a view would keep the padding
    return [own[: len(pairs), : len(pairs)].clone() for own, (_, pairs) in zip(inverses, experts, strict=True)]
