"""The history of frozen weights: what they were before any edit, and every change that was added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_moeedit.solvers import ExpertDeltas


@dataclass(frozen=True, eq=False)
class EditSum:
    """Changes of one frozen parameter that are rounded once, together: ``W = round(base + (Δ_1 + … + Δ_n))``.

    Frozen weights have no master weights, so each change that is rounded by itself adds an error of its own, which
    matters in half precision. The changes are added up in float64, in the order in which they were made.

    Attributes:
        base: fingerprint of the parameter before the first of them.
        deltas: the changes.
        after: fingerprint of the parameter after each of them.
        elements: this rank's elements of each changed expert before the first of them, on the CPU; ``None`` if they are
            not known. Then further changes begin another sum, whose base is the rounded state.
        is_exact: whether the changes were added up in float64. One that was not, as a change from a file that was made
            in weights that train, is a sum by itself.
    """

    base: str
    deltas: tuple[ExpertDeltas, ...]
    after: tuple[str, ...]
    elements: Mapping[int, Tensor] | None = field(default=None, repr=False)
    is_exact: bool = True

    def __post_init__(self) -> None:
        if not self.deltas or len(self.deltas) != len(self.after):
            counts = f"{len(self.deltas)} and {len(self.after)}"
            raise ValueError(f"deltas and after must have one entry per change, at least one, got {counts}")

    def __deepcopy__(self, memo: object) -> EditSum:
        return self  # nothing in it changes, and a copy of a model should not copy its base again

    @property
    def experts(self) -> list[int]:
        """Experts that the changes touch, ascending."""
        return sorted({expert for change in self.deltas for expert in change.experts})

    def joined(self) -> EditSum:
        """Return the same sum with its changes added up to one, if they take more memory than that.

        So many renewals need no more memory than a dense change in float64. The sum is the same bit for bit.
        """
        rows, columns = self.deltas[0].shape
        size = sum(factor.nbytes for change in self.deltas for factor in (change.left, change.right))
        if len(self.deltas) == 1 or size <= len(self.experts) * rows * columns * torch.float64.itemsize:
            return self
        experts = torch.tensor(self.experts)
        total = torch.zeros(len(experts), rows, columns, dtype=torch.float64)
        for place, expert in enumerate(self.experts):
            for change in self.deltas:
                if change.changes(expert):
                    total[place] += change.to(torch.float64).dense(expert)
        joined = type(self.deltas[0]).from_dense(experts, total, self.deltas[0].num_experts)
        return replace(self, deltas=(joined,), after=self.after[-1:])

    def extended(self, deltas: Sequence[ExpertDeltas], after: str, elements: Mapping[int, Tensor]) -> EditSum:
        """Return the sum with further changes, which were made together and have touched further experts."""
        return replace(
            self,
            deltas=(*self.deltas, *deltas),
            after=(*self.after, *(after for _ in deltas)),
            elements={**(self.elements or {}), **elements},
        )


History = tuple[EditSum, ...]
"""The sums of one parameter, each based on what the one before has left."""


def missing(history: History, now: str) -> list[EditSum] | None:
    """Return the sums that a parameter lacks; ``None`` if it is in no state of the history.

    A state in the midst of a sum is none: what is missing there can no longer be rounded together with the rest.

    Args:
        history: the history.
        now: fingerprint of the parameter.

    Example:
        >>> missing((), "[3] torch.float32 0") is None
        True
    """
    for number in range(len(history), 0, -1):
        if history[number - 1].after[-1] == now:
            return list(history[number:])
    return list(history) if history and history[0].base == now else None
