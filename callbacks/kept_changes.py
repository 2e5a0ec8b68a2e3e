"""The changes that edits have made, kept so that a renewal can take them out of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.editing import EditResult
from lit_moeedit.solvers import ExpertDeltas

_FACTORS: Mapping[str, Any] = dict.fromkeys(("expert_index", "row_index", "left", "right"), Tensor)


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one edit.

    Attributes:
        facts: keys of its facts.
        deltas: by layer index, on the CPU.
    """

    facts: tuple[str, ...]
    deltas: Mapping[int, ExpertDeltas]

    @classmethod
    def of(cls, result: EditResult) -> Self:
        """Return the change of an edit that was kept."""
        deltas = {index: own.to("cpu") for index, own in result.deltas.items()}
        return cls(tuple(fact.key for fact in result.facts), deltas)

    def fits(self, shapes: Mapping[int, Sequence[int]]) -> bool:
        """Tell if layers of these shapes ``(E, d_model, d_hidden)``, by index, can have the change."""
        return all(
            index in shapes and (own.num_experts, *own.shape) == tuple(shapes[index])
            for index, own in self.deltas.items()
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        layers = {
            index: {own.name: getattr(deltas, own.name) for own in fields(deltas)}
            for index, deltas in self.deltas.items()
        }
        return {"facts": list(self.facts), "layers": layers}

    @classmethod
    def of_state(cls, where: str, state: Mapping[str, Any]) -> Self:
        """Restore the result of :meth:`state`, which may come from an untrusted checkpoint.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        check_fields(where, state, facts=[str], layers={int: dict})
        return cls(
            tuple(state["facts"]),
            {index: _deltas(f"{where}, layer {index}", own) for index, own in state["layers"].items()},
        )


def by_layer(changes: Iterable[Change]) -> Mapping[int, Sequence[ExpertDeltas]]:
    """Return the deltas of changes by layer index, in their order."""
    found: dict[int, list[ExpertDeltas]] = {}
    for change in changes:
        for index, deltas in change.deltas.items():
            found.setdefault(index, []).append(deltas)
    return found


def _deltas(where: str, state: Mapping[str, Any]) -> ExpertDeltas:
    check_fields(where, state, **{**_FACTORS, "num_experts": int})
    factors, experts = {name: state[name].cpu() for name in _FACTORS}, state["num_experts"]
    expert, row, left, right = factors.values()
    are_floats = left.is_floating_point() and left.dtype == right.dtype
    is_right = left.ndim == right.ndim == 2 and are_floats and bool(left.isfinite().all() & right.isfinite().all())
    for index, below in ((expert, experts), (row, len(left) if left.ndim else 0)):
        is_right &= index.dtype == torch.int64 and index.shape == right.shape[:1]
        is_right = is_right and bool(((index >= 0) & (index < below)).all())
    if not is_right:
        shapes = ", ".join(f"{name} {list(factor.shape)}" for name, factor in factors.items())
        raise CheckpointError(
            f"{where}: expected finite factors [rows, d_model] and [terms, d_hidden] of {experts} experts, with the "
            f"expert and the row of each term, but found {shapes}"
        )
    return ExpertDeltas(**factors, num_experts=experts)
