"""The edit problem of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_moeedit.solvers.deltas import ExpertDeltas, group_positions


@dataclass(frozen=True)
class EditProblem:
    r"""Ridge regression over the experts of one layer (equation 5 of MoEEdit, arXiv 2602.10965).

    .. math:: \min_{\Delta W} \sum_t \Big\| r_t - \sum_j \Delta W_j \varphi_{tj} \Big\|^2
              + \lambda \sum_j \| \Delta W_j \|_F^2

    Only routed pairs ``(t, j)`` are stored. ``φ_tj = g_tj S_j k_tj`` is the gated key, shaped by what the experts have
    to preserve; all of that is in ``features``, so that a solver need not know of it.

    Args:
        edit_index: ``[N]`` int64, the edit ``t`` of each pair.
        expert_index: ``[N]`` int64, the expert ``j`` of each pair.
        features: ``[N, d_hidden]``, the features ``φ_tj``.
        residuals: ``[T, d_model]``, the residuals ``r_t``.
        num_experts: ``E``.
        ridge: ``λ ≥ 0``.

    Raises:
        ValueError: if shapes or dtypes do not fit together, an index is out of range, a pair occurs twice, a value is
            not finite, or the ridge is negative or not finite.

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
        if self.residuals.ndim != 2:
            raise ValueError(f"residuals must be [T, d_model], got {list(self.residuals.shape)}")
        for name, index, size in (
            ("edit_index", self.edit_index, len(self.residuals)),
            ("expert_index", self.expert_index, self.num_experts),
        ):
            if index.ndim != 1 or index.dtype != torch.long:
                raise ValueError(f"{name} must be int64 [N], got {index.dtype} {list(index.shape)}")
            if len(index) and (int(index.min()) < 0 or int(index.max()) >= size):
                raise ValueError(f"{name} must be in [0, {size}), got [{int(index.min())}, {int(index.max())}]")
        pairs = len(self.edit_index)
        if len(self.expert_index) != pairs:
            raise ValueError(f"edit_index has {pairs} pairs, expert_index {len(self.expert_index)}")
        if self.features.ndim != 2 or len(self.features) != pairs:
            raise ValueError(f"features must be [N={pairs}, d_hidden], got {list(self.features.shape)}")
        if not self.features.is_floating_point() or self.features.dtype != self.residuals.dtype:
            raise ValueError(
                "features and residuals must have the same floating-point dtype, "
                f"got {self.features.dtype} and {self.residuals.dtype}"
            )
        if len(torch.unique(self.edit_index * self.num_experts + self.expert_index)) != pairs:
            raise ValueError("an (edit, expert) pair occurs more than once")
        if not self.ridge >= 0.0:
            raise ValueError(f"ridge must be at least 0, got {self.ridge}")
        if self.ridge == math.inf:
            raise ValueError("ridge must be finite, got inf")
        for name, values in (("features", self.features), ("residuals", self.residuals)):
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} has values that are not finite")
        object.__setattr__(self, "_groups", list(group_positions(self.expert_index)))

    @property
    def num_edits(self) -> int:
        """Number of edits ``T``."""
        return len(self.residuals)

    @property
    def num_pairs(self) -> int:
        """Number of routed pairs ``N``."""
        return len(self.edit_index)

    def experts(self) -> list[tuple[int, Tensor]]:
        """Return the experts that any edit visits, ascending, each with the positions ``[T_j]`` of its pairs."""
        return self._groups

    def prediction(self, deltas: ExpertDeltas, dtype: torch.dtype | None = None) -> Tensor:
        """Compute ``Σ_j ΔW_j φ_tj`` for every edit, ``[T, d_model]``, in a dtype or that of the residuals."""
        predicted = torch.zeros_like(self.residuals, dtype=dtype)
        for expert, pairs in self._groups:
            rows = deltas.rows(expert)
            if rows is not None:
                left, right = (factor.to(predicted) for factor in rows)
                predicted.index_add_(0, self.edit_index[pairs], (self.features[pairs].to(predicted) @ right.T) @ left)
        return predicted

    def objective(self, deltas: ExpertDeltas) -> float:
        """Compute the objective above, in float64 because large terms of deltas may cancel."""
        misfit = (self.residuals.double() - self.prediction(deltas, torch.float64)).square().sum()
        return float(misfit + self.ridge * deltas.square_norm())
