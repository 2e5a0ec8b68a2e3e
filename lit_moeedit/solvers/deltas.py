"""Low-rank weight changes of the experts of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lit_moeedit.atomic_files import read_tensors, write_tensors


def group_positions(index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the distinct values of ``index [N]`` in ascending order, each with the positions that hold it."""
    order = torch.argsort(index, stable=True)
    values, counts = torch.stack(torch.unique_consecutive(index[order], return_counts=True)).tolist()
    yield from zip(values, torch.split(order, counts), strict=True)


@dataclass(frozen=True)
class ExpertDeltas:
    r"""Low-rank changes of the experts' down-projections: ``ΔW_j = Σ_i left[row_i] ⊗ right_i`` over ``j``'s pairs.

    Args:
        expert_index: ``[M]`` int64, the expert of each term.
        row_index: ``[M]`` int64, the row of ``left`` of each term. (With Woodbury all experts of an edit share one.)
        left: ``[R, d_model]``.
        right: ``[M, d_hidden]``.
        num_experts: ``E``.

    Example:
        >>> deltas = ExpertDeltas(torch.tensor([2]), torch.tensor([0]), torch.ones(1, 3), torch.ones(1, 4), 8)
        >>> deltas.dense(2).shape, deltas.experts
        (torch.Size([3, 4]), [2])
    """

    expert_index: Tensor
    row_index: Tensor
    left: Tensor
    right: Tensor
    num_experts: int

    def __post_init__(self) -> None:
        if not len(self.expert_index) == len(self.row_index) == len(self.right):
            raise ValueError(
                "expert_index, row_index and right must have one entry per term, "
                f"got {len(self.expert_index)}, {len(self.row_index)} and {len(self.right)}"
            )

    @cached_property
    def _groups(self) -> dict[int, Tensor]:
        """The terms of each expert, found on first use because that waits for the device."""
        return dict(group_positions(self.expert_index))

    @property
    def experts(self) -> list[int]:
        """Experts whose weights change, ascending."""
        return list(self._groups)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_model, d_hidden)`` of one expert's delta."""
        return self.left.shape[1], self.right.shape[1]

    def changes(self, expert: int) -> bool:
        """Tell whether an expert's weights change."""
        return expert in self._groups

    def to(self, target: torch.device | torch.dtype | str) -> ExpertDeltas:
        """Return the same deltas on a device, or with factors of a dtype."""
        names = ("left", "right") if isinstance(target, torch.dtype) else _FIELDS
        return replace(self, **{name: getattr(self, name).to(target) for name in names})

    def rows(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """Return the factors ``(left [M_j, d_model], right [M_j, d_hidden])`` of one expert; ``None`` without any."""
        terms = self._groups.get(expert)
        return None if terms is None else (self.left[self.row_index[terms]], self.right[terms])

    def dense(self, expert: int) -> Tensor:
        """Compute ``ΔW_j``, ``[d_model, d_hidden]``.

        Raises:
            IndexError: if there is no such expert.
        """
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert must be in [0, {self.num_experts}), got {expert}")
        rows = self.rows(expert)
        return self.left.new_zeros(self.shape) if rows is None else rows[0].T @ rows[1]

    def square_norm(self) -> float:
        """Compute ``Σ_j ‖ΔW_j‖_F²`` from the factors' Gram matrices, without making a delta dense."""
        total = self.left.new_zeros((), dtype=torch.float64)
        for expert in self._groups:
            rows = self.rows(expert)
            assert rows is not None
            left, right = rows[0].double(), rows[1].double()
            if len(left) > min(self.shape):
                total += (left.T @ right).square().sum()
            else:
                total += ((left @ left.T) * (right @ right.T)).sum()
        return float(total)

    def is_finite(self) -> bool:
        """Tell whether every element is finite."""
        return bool(torch.isfinite(self.left).all() & torch.isfinite(self.right).all())

    def with_right(self, right: Tensor) -> ExpertDeltas:
        """Return the same deltas with other right factors ``[M, d_hidden]``."""
        return ExpertDeltas(self.expert_index, self.row_index, self.left, right, self.num_experts)

    @classmethod
    def from_rows(
        cls,
        experts: Sequence[int],
        rows: Sequence[tuple[Tensor, Tensor]],
        like: tuple[Tensor, Tensor],
        num_experts: int,
    ) -> ExpertDeltas:
        """Put together deltas from the factors of each expert.

        Args:
            experts: those that change, ascending.
            rows: factors ``(left [M_j, d_model], right [M_j, d_hidden])`` of each.
            like: tensors ``[…, d_model]`` and ``[…, d_hidden]`` with the dtype and the device of the result.
            num_experts: ``E``.
        """
        device = like[0].device
        counts = torch.tensor([len(right) for _, right in rows], dtype=torch.long)
        owners = torch.tensor(experts, dtype=torch.long).repeat_interleave(counts).to(device)
        left = torch.cat([like[0][:0], *(left.to(like[0].dtype) for left, _ in rows)])
        right = torch.cat([like[1][:0], *(right.to(like[1].dtype) for _, right in rows)])
        return cls(owners, torch.arange(len(left), device=device), left, right, num_experts)

    @classmethod
    def from_dense(cls, experts: Tensor, dense: Tensor, num_experts: int) -> ExpertDeltas:
        """Return dense deltas ``[n, d_model, d_hidden]`` of ``experts [n]``, with the smaller dimension as rank."""
        count, d_model, d_hidden = dense.shape
        rank = min(d_model, d_hidden)
        basis = torch.eye(rank, dtype=dense.dtype, device=dense.device)
        terms = torch.arange(count * rank, device=dense.device)
        owners = experts.repeat_interleave(rank)
        if d_model <= d_hidden:
            return cls(owners, terms % rank, basis, dense.reshape(-1, d_hidden), num_experts)
        return cls(owners, terms, dense.mT.reshape(-1, d_model), basis.repeat(count, 1), num_experts)

    def save(self, path: str | Path) -> None:
        """Write the factors as safetensors; the file appears complete or not at all."""
        tensors = {name: getattr(self, name) for name in _FIELDS}
        write_tensors(path, tensors, {"format": _FORMAT, "num_experts": str(self.num_experts)})

    @classmethod
    def load(cls, path: str | Path) -> ExpertDeltas:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not one of deltas.
        """
        tensors, metadata = read_tensors(path, _FIELDS, _FORMAT, "expert deltas")
        return cls(**tensors, num_experts=int(metadata["num_experts"]))


_FIELDS = ("expert_index", "row_index", "left", "right")
_FORMAT = "lit_moeedit.deltas.1"
