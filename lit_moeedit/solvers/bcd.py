"""Block coordinate descent over the experts, the solver of MoEEdit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moeedit.precision import full_precision
from lit_moeedit.solvers.batches import ExpertBatch, expert_batches
from lit_moeedit.solvers.deltas import ExpertDeltas
from lit_moeedit.solvers.problem import EditProblem, cholesky, is_sound
from lit_moeedit.solvers.rounding import working_dtype

MARGIN = 300.0
"""Least ratio of the pivots of an expert's system to the noise of rounding for it to be inverted in float32.

The error of such an inverse in float32 adds at most about ``1 / MARGIN²`` of it to the objective, 1e-5. Systems that
are nearer to singular are solved in float64.
"""


class BlockCoordinateDescent:
    r"""Visits one expert after the other and solves for its delta with the others fixed (MoEEdit, algorithm 1).

    The running residual ``ρ_t = r_t − Σ_j ΔW_j φ_tj`` is kept up to date, so that no sum over experts is taken again.
    A block solves its ridge regression exactly, as a correction of the delta it has. If no more edits visit the expert
    than it has dimensions, that is done in the dual form ``ΔW_j = Σ_{t∈j} b_t φ_tjᵀ``:

    .. math:: B_j \leftarrow B_j + (\Phi_j \Phi_j^\top + \lambda I)^{-1} (\rho_j - \lambda B_j), \qquad
              \rho_j \leftarrow \lambda B_j

    and else in the primal form, with ``(Φ_jᵀΦ_j + λI)⁻¹ (Φ_jᵀρ_j − λ ΔW_jᵀ)``. The inverses are computed once and kept
    for all passes. They have ``min(T_j, d_hidden)²`` elements each, together no more than the features; where float64
    is needed, a factor is kept beside the inverse. The objective falls or stays with every block.

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
        blocks = _blocks(problem)
        running = problem.residuals.to(working_dtype(problem), copy=True)
        if start is not None:
            for block in blocks:
                block.begin(start.rows(block.expert), running)
        # the objective, and by how much a pass lowers it, stay on the device, and are read only for the tolerance
        objective, fall = 0.0, None
        if self.tolerance:
            objective = float(running.double().square().sum()) if start is None else problem.objective(start)
            fall = running.new_zeros((), dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        for number in range(self.passes):
            for i in torch.randperm(len(blocks), generator=generator).tolist():
                blocks[i].update(running, fall)
                if self.on_block is not None:
                    self.on_block(problem.objective(_collect(problem, blocks)))
            if fall is not None:
                fallen = float(fall)
                if start is not None and number == 0:  # blocks know only how far they fell from nothing
                    fallen = objective - problem.objective(_collect(problem, blocks))
                if fallen <= self.tolerance * objective:
                    break
                objective -= fallen
                fall.zero_()
        return _collect(problem, blocks)


class _Block:
    """One expert: the inverse of its system, and its current delta.

    Args:
        expert: which.
        edits: ``[T_j]``, those that visit it.
        features: ``[T_j, d_hidden]``, theirs.
        left: zeros ``[min(T_j, d_hidden), d_model]`` to hold the left factor.
        ridge: ``λ``.
        system: of the dual form, if it has been solved.
    """

    def __init__(
        self, expert: int, edits: Tensor, features: Tensor, left: Tensor, ridge: float, system: _Dual | None
    ) -> None:
        self.expert, self.edits, self.right, self.ridge = expert, edits, features, ridge
        self.dual, self.mixture = features.shape[0] <= features.shape[1], None
        if system is None:

            def make(dtype: torch.dtype) -> Tensor:
                rows = (features if self.dual else features.T).to(dtype)
                system = rows @ rows.T
                system.diagonal().add_(ridge)
                return system

            what = f"the system of expert {expert} at ridge {ridge:g}"
            self.inverse = torch.cholesky_inverse(cholesky(make, left.dtype, what))
        else:
            self.inverse, self.mixture = system.inverse, system.mixture
            self.right = features if system.right is None else system.right
        if not self.dual:
            # a delta that is dense has the identity for its basis
            self.right = torch.eye(features.shape[1], dtype=features.dtype, device=features.device)
        self.features = features if self.dual else features.to(self.inverse.dtype)
        self.left = left.to(self.inverse.dtype)
        self.start: tuple[Tensor, Tensor] | None = None

    def begin(self, start: tuple[Tensor, Tensor] | None, running: Tensor) -> None:
        """Start from these factors instead of none: what they predict is taken off the running residual."""
        self.start = start
        if start is not None:
            running.index_add_(0, self.edits, self._effect(start).to(running.dtype), alpha=-1)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Factors of the current delta; before the first update those to start from."""
        if self.start is not None:
            return self.start
        return (self.left if self.mixture is None else self.mixture @ self.left), self.right

    def _effect(self, start: tuple[Tensor, Tensor]) -> Tensor:
        """What the deltas to start from predict for the edits of this expert, ``[T_j, d_model]``."""
        left, right = (factor.to(self.inverse.dtype) for factor in start)
        return (self.features.to(right.dtype) @ right.T) @ left

    def update(self, running: Tensor, fall: Tensor | None = None) -> None:
        """Solve the block exactly and bring the running residual up to date, waiting for no number.

        On a GPU what counts is the number of operations: every one is a kernel to start.

        Args:
            running: the running residual ``[T, d_model]``.
            fall: if given, is raised by how much the objective is now below that of no delta (first update) or of the
                one before.
        """
        if self.start is not None:
            running.index_add_(0, self.edits, self._effect(self.start).to(running.dtype))
            self.start = None
        missing = running.index_select(0, self.edits)
        if self.dual:
            slope = torch.sub(missing.to(self.left.dtype), self.left, alpha=self.ridge)
            self.left.addmm_(self.inverse, slope)
            left_over = (self.ridge * self.left).to(running.dtype)
            running.index_copy_(0, self.edits, left_over)
            if fall is not None:
                fall += ((missing - left_over) * slope).sum()
        else:
            slope = torch.addmm(self.left, self.features.T, missing.to(self.left.dtype), beta=-self.ridge)
            step = self.inverse @ slope
            self.left += step
            running.index_add_(0, self.edits, (self.features @ step).to(running.dtype), alpha=-1)
            if fall is not None:
                fall += (step * slope).sum()


def _blocks(problem: EditProblem) -> list[_Block]:
    """The experts that are visited, in ascending order, none of them changed yet."""
    experts, dimensions = problem.experts(), problem.features.shape[1]
    counts = [len(pairs) for _, pairs in experts]
    order = torch.cat([problem.edit_index[:0], *(pairs for _, pairs in experts)])
    edits, features = problem.edit_index[order].split(counts), problem.features[order].split(counts)
    sizes = [min(count, dimensions) for count in counts]
    left = problem.residuals.new_zeros(sum(sizes), problem.residuals.shape[1], dtype=working_dtype(problem))
    systems = _dual_systems(problem)
    blocks = zip(experts, edits, features, left.split(sizes), strict=True)
    return [
        _Block(expert, visitors, own, zeros, problem.ridge, systems.get(i))
        for i, ((expert, _), visitors, own, zeros) in enumerate(blocks)
    ]


@dataclass(frozen=True)
class _Dual:
    """The system ``K = Φ Φᵀ + λI`` of an expert in the dual form, solved.

    Where features are nearly dependent, large rows of ``B`` would cancel in the delta ``Bᵀ Φ`` once they are rounded.
    With ``K = L Lᵀ`` its factors ``Lᵀ B`` and ``L⁻¹ Φ`` are of moderate size.

    Attributes:
        inverse: ``K⁻¹``, in float64 if need be; then there are, too:
        mixture: ``Lᵀ``.
        right: ``L⁻¹ Φ`` in the problem's dtype.
    """

    inverse: Tensor
    mixture: Tensor | None = None
    right: Tensor | None = None


def _dual_systems(problem: EditProblem) -> dict[int, _Dual]:
    """Those of the experts, by position, that have one which is not singular, solved in batches."""
    systems: dict[int, _Dual] = {}
    experts, dimensions = problem.experts(), problem.features.shape[1]
    for batch in expert_batches(problem):
        if batch.pairs.shape[1] > dimensions:
            continue  # all are about as large, and by themselves no slower
        _, factor, sound = _factors(problem, batch, working_dtype(problem), MARGIN)
        good = [i for i, fine in enumerate(sound) if fine]
        # the factors of others may be singular, which would be an error here
        some = factor if len(good) == len(sound) else factor[torch.tensor(good, dtype=torch.long, device=factor.device)]
        inverse = torch.cholesky_inverse(some)
        for i, own in zip(good, inverse, strict=True):
            size = len(experts[batch.members[i]][1])
            # a view would keep the padding
            systems[batch.members[i]] = _Dual(own if batch.valid is None else own[:size, :size].clone())
        if len(good) == len(sound):
            continue
        batch = batch.part([i for i, fine in enumerate(sound) if not fine])
        features, factor, sound = _factors(problem, batch, torch.float64, 1.0)
        if all(sound):  # else the expert is named where it is solved by itself
            inverse = torch.cholesky_inverse(factor)
            right = torch.linalg.solve_triangular(factor, features, upper=False).to(problem.features.dtype)
            for i, member in enumerate(batch.members):
                size = len(experts[member][1])
                own, mixture = inverse[i, :size, :size].clone(), factor[i, :size, :size].mT.clone()
                systems[member] = _Dual(own, mixture, right[i, :size])
    return systems


def _factors(
    problem: EditProblem, batch: ExpertBatch, dtype: torch.dtype, margin: float
) -> tuple[Tensor, Tensor, list[bool]]:
    """The features of a batch, the Cholesky factors of its systems, and which of these are of use."""
    features = batch.features(problem, dtype)
    matrix = features @ features.mT
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    sizes = None
    if batch.valid is not None:
        # the systems are padded with the largest entry of their diagonals: no pivot is larger
        diagonal += diagonal.amax(dim=1, keepdim=True) * ~batch.valid
        sizes = batch.valid.sum(dim=1)
    diagonal += problem.ridge
    factor, info = torch.linalg.cholesky_ex(matrix)
    return features, factor, is_sound(matrix, factor, info, margin, sizes).tolist()


def _collect(problem: EditProblem, blocks: list[_Block]) -> ExpertDeltas:
    residuals, factors = problem.residuals, [block.rows() for block in blocks]
    counts = torch.tensor([len(right) for _, right in factors], dtype=torch.long)
    experts = torch.tensor([block.expert for block in blocks], dtype=torch.long).repeat_interleave(counts)
    left = torch.cat([residuals[:0], *(left.to(residuals.dtype) for left, _ in factors)])
    right = torch.cat([problem.features[:0], *(right.to(residuals.dtype) for _, right in factors)])
    terms = torch.arange(len(left), device=left.device)
    return ExpertDeltas(experts.to(left.device), terms, left, right, problem.num_experts)
