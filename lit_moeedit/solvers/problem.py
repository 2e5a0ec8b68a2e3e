"""The edit problem of one layer, and what a solver of it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas, group_positions


@dataclass(frozen=True)
class EditProblem:
    r"""Ridge regression over the experts of one layer (equation 5 of MoEEdit, arXiv 2602.10965).

    .. math:: \min_{\Delta W} \sum_t \Big\| r_t - \sum_j \Delta W_j \varphi_{tj} \Big\|^2
              + \lambda \sum_j \| \Delta W_j \|_F^2

    Only routed pairs ``(t, j)`` are stored. ``φ_tj = g_tj S_j k_tj`` is the gated key, shaped by what the experts have
    to preserve; all of that is in ``features``, so a solver needs to know nothing of it.

    Args:
        edit_index: ``[N]`` int64, the edit ``t`` of each pair.
        expert_index: ``[N]`` int64, the expert ``j`` of each pair.
        features: ``[N, d_hidden]``, the features ``φ_tj``.
        residuals: ``[T, d_model]``, the residuals ``r_t``.
        num_experts: ``E``.
        ridge: ``λ ≥ 0``.

    Raises:
        ValueError: if shapes or dtypes do not fit together, an index is out of range, a pair occurs twice, a value is
            not finite, or the ridge is negative.

    Example:
        >>> problem = EditProblem(torch.tensor([0, 0]), torch.tensor([1, 3]), torch.eye(2), torch.ones(1, 5), 4)
        >>> problem.num_edits, problem.num_pairs
        (1, 2)
    """

    edit_index: Tensor
    expert_index: Tensor
    features: Tensor
    residuals: Tensor
    num_experts: int
    ridge: float = 1.0
    _groups: list[tuple[int, Tensor]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, index in (("edit_index", self.edit_index), ("expert_index", self.expert_index)):
            if index.ndim != 1 or index.dtype != torch.long:
                raise ValueError(f"{name} must be int64 [N], got {index.dtype} {list(index.shape)}")
        pairs = len(self.edit_index)
        if len(self.expert_index) != pairs:
            raise ValueError(f"edit_index has {pairs} pairs, expert_index {len(self.expert_index)}")
        if self.features.ndim != 2 or len(self.features) != pairs:
            raise ValueError(f"features must be [N={pairs}, d_hidden], got {list(self.features.shape)}")
        if self.residuals.ndim != 2:
            raise ValueError(f"residuals must be [T, d_model], got {list(self.residuals.shape)}")
        if not self.features.is_floating_point() or self.features.dtype != self.residuals.dtype:
            raise ValueError(
                "features and residuals must have the same floating-point dtype, "
                f"got {self.features.dtype} and {self.residuals.dtype}"
            )
        for name, index, size in (
            ("edit_index", self.edit_index, len(self.residuals)),
            ("expert_index", self.expert_index, self.num_experts),
        ):
            if pairs and (int(index.min()) < 0 or int(index.max()) >= size):
                raise ValueError(f"{name} must be in [0, {size}), got [{int(index.min())}, {int(index.max())}]")
        if len(torch.unique(self.edit_index * self.num_experts + self.expert_index)) != pairs:
            raise ValueError("an (edit, expert) pair occurs more than once")
        if not self.ridge >= 0.0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge}")
        for name, values in (("features", self.features), ("residuals", self.residuals)):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} has values that are not finite")
        object.__setattr__(self, "_groups", list(group_positions(self.expert_index)))

    @property
    def num_edits(self) -> int:
        """``T``."""
        return len(self.residuals)

    @property
    def num_pairs(self) -> int:
        """``N``."""
        return len(self.edit_index)

    def experts(self) -> list[tuple[int, Tensor]]:
        """Experts that any edit visits, each with the positions ``[T_j]`` of its pairs, in ascending order."""
        return self._groups

    def prediction(self, deltas: ExpertDeltas) -> Tensor:
        """``Σ_j ΔW_j φ_tj`` for every edit, ``[T, d_model]``."""
        return self._prediction(deltas, self.residuals.dtype)

    def objective(self, deltas: ExpertDeltas) -> float:
        """The objective above, computed in float64: large terms of deltas may cancel."""
        misfit = (self.residuals.double() - self._prediction(deltas, torch.float64)).square().sum()
        return float(misfit + self.ridge * deltas.square_norm())

    def _prediction(self, deltas: ExpertDeltas, dtype: torch.dtype) -> Tensor:
        predicted = torch.zeros_like(self.residuals, dtype=dtype)
        for expert, pairs in self._groups:
            rows = deltas.rows(expert)
            if rows is not None:
                left, right = rows[0].to(dtype), rows[1].to(dtype)
                predicted.index_add_(0, self.edit_index[pairs], (self.features[pairs].to(dtype) @ right.T) @ left)
        return predicted


@runtime_checkable
class Solver(Protocol):
    """Anything that turns an :class:`EditProblem` into :class:`ExpertDeltas`."""

    def solve(self, problem: EditProblem) -> ExpertDeltas:
        """Solve the problem, exactly or not."""
        ...


def cholesky(system: Callable[[torch.dtype], Tensor], dtype: torch.dtype, what: str) -> Tensor:
    """Cholesky factor of a positive definite matrix, tried in ``dtype`` (at least float32) and then in float64.

    Args:
        system: makes the matrix ``[n, n]`` in the dtype it is given. It is made anew for float64, because rounding it
            to float32 has already lost its small eigenvalues.
        dtype: to try first.
        what: names the matrix in an error.

    Raises:
        torch.linalg.LinAlgError: if it is singular in float64 too.
    """
    for precision in dict.fromkeys((torch.promote_types(dtype, torch.float32), torch.float64)):
        matrix = system(precision)
        factor, info = torch.linalg.cholesky_ex(matrix)
        # in float32 pivots must stand out by two digits, because a second try is still to come
        margin = 1.0 if precision == torch.float64 else 100.0
        if bool(is_sound(matrix, factor, info, margin)):
            return factor
    pivot = int(info) if int(info) else int(factor.diagonal().abs().argmin()) + 1
    raise torch.linalg.LinAlgError(
        f"{what} is singular (pivot {pivot} of {len(matrix)}): edits share the same features; use a larger ridge"
    )


def is_sound(matrix: Tensor, factor: Tensor, info: Tensor, margin: float, sizes: Tensor | None = None) -> Tensor:
    """Tell whether Cholesky factors are of use, one truth value per matrix.

    A factor can "succeed" and still be useless, if rounding left pivots of the size of the noise.

    Args:
        matrix: ``[..., n, n]``.
        factor: its factor.
        info: what ``torch.linalg.cholesky_ex`` says of it.
        margin: how many times the noise each pivot must be.
        sizes: of the matrices, if they are padded to ``n`` with the largest entries of their diagonals.
    """
    largest = matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    noise = torch.finfo(matrix.dtype).eps * (matrix.shape[-1] if sizes is None else sizes) * largest
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    return (info == 0) & (pivots.amin(-1) > margin * noise)


def solve_factored(factor: Tensor, right_hand: Tensor) -> Tensor:
    """``X`` with ``L Lᵀ X = B``.

    From the right, on the transposed: rows stay rows then, where ``torch.cholesky_solve`` copies ``B`` to columns and
    back, and takes 1.3 to 2.7 times as long on a CPU.

    Args:
        factor: ``L [n, n]``, lower triangular.
        right_hand: ``B [n, m]``.
    """
    half = torch.linalg.solve_triangular(factor.mT, right_hand.mT, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False).mT
