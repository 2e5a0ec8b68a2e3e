"""Shaping by ranks that each have the second moments of their own experts alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.preservation.shaping import Preservation, Shaping
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few


@dataclass(frozen=True)
class OwnedShaping:
    """The matrices ``S_j`` of some experts of a layer, each on the first of the ranks that own the expert.

    Rows are shaped by the owner of their expert, and sent to all ranks.

    Attributes:
        experts: ``[n]`` int64, ascending, the experts that have a matrix.
        energy_kept: ``[n]``, see :class:`~lit_moeedit.preservation.shaping.Shaping`.
        free: likewise.
        own: the matrices that this rank has.
        ranks: the processes that edit together.
    """

    experts: Tensor
    energy_kept: Tensor
    free: Tensor | None
    own: Shaping
    ranks: Ranks

    def features(self, keys: Tensor, expert_index: Tensor) -> Tensor:
        """Return ``S_j x`` for every row ``x`` of ``keys [N, d_hidden]``, the same on all ranks, with ``j [N]``."""
        return self._rows(self.own.features, keys, expert_index)

    def applied(self, right: Tensor, expert_index: Tensor) -> Tensor:
        """Return ``S_jᵀ y`` for every row ``y`` of the first rank's ``right [N, d_hidden]``, on all ranks."""
        self.ranks.check_errors()
        right = right.contiguous()
        # rows that owners shape must be of one solution: those of two ranks may differ
        self.ranks.broadcast(right)
        return self._rows(self.own.applied, right, expert_index)

    def _rows(self, shape: Callable[[Tensor, Tensor], Tensor], rows: Tensor, expert_index: Tensor) -> Tensor:
        missing = expert_index[~torch.isin(expert_index, self.experts)].unique().tolist()
        if missing:
            raise ValueError(f"no edit visits experts {first_few(missing)}: its solver must set changes_all_experts")
        is_own = torch.isin(expert_index, self.own.experts)
        shaped = torch.zeros_like(rows)
        shaped[is_own] = shape(rows[is_own], expert_index[is_own])
        self.ranks.check_errors()
        self.ranks.all_reduce(shaped)
        return shaped


def shaping_of(
    moments: SecondMoments,
    experts: Tensor,
    preservation: Preservation,
    penalty: float | None,
    symmetric: bool,
    ranks: Ranks,
) -> Shaping | OwnedShaping:
    """Compute the matrices of some experts of a layer where their second moments are. All ranks call this together.

    Args:
        moments: second moments of the layer.
        experts: ``[n]`` int64, ascending.
        preservation: the preservation that defines the matrices.
        penalty: the value of :meth:`Preservation.penalty` for the layer.
        symmetric: whether the matrices must be symmetric.
        ranks: the processes that edit together.

    Raises:
        ValueError: if the preservation needs gated second moments and these are not, or the reverse.
    """
    part = moments.part
    if part.owners == 1:
        return Shaping.of(moments, experts, preservation, penalty, symmetric)
    is_own = (experts >= part.first) & (experts < part.first + len(moments.total)) & part.is_first
    own = Shaping.of(moments, experts[is_own], preservation, penalty, symmetric)
    ranks.check_errors()

    def of_all(values: Tensor) -> Tensor:
        found = torch.zeros(len(experts), dtype=values.dtype, device=experts.device)
        found[is_own] = values
        ranks.all_reduce(found)
        return found

    free = None if own.free is None else of_all(own.free)
    return OwnedShaping(experts, of_all(own.energy_kept), free, own, ranks)
