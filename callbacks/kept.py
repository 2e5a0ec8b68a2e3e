"""Values of edits that their renewals need: hidden states that they aimed for, second moments, or their changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from lit_moeedit.callbacks.kept_changes import Change
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.editing import EditResult
from lit_moeedit.preservation.kept_moments import KeptMoments


def in_blocks(tensors: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """Stack tensors ``[rows, d_model]`` with different numbers of rows, in blocks of equally many rows.

    Args:
        tensors: by fact key.

    Returns:
        The fact key of each block, and the blocks, ``[n, rows of a block, d_model]``. If all tensors have as many rows,
        each is one block.

    Example:
        >>> facts, blocks = in_blocks({"a": torch.zeros(3, 5), "b": torch.zeros(6, 5)})
        >>> facts, list(blocks.shape)
        (['a', 'b', 'b'], [3, 3, 5])
    """
    size = math.gcd(*map(len, tensors.values()))
    blocks = [(key, block) for key, tensor in tensors.items() for block in tensor.split(size)]
    return [key for key, _ in blocks], torch.stack([block for _, block in blocks]) if blocks else torch.zeros(0, 0, 0)


def of_blocks(facts: Sequence[str], blocks: Tensor) -> dict[str, Tensor]:
    """Return the tensors of which :func:`in_blocks` made these blocks."""
    found: dict[str, list[Tensor]] = {}
    for key, block in zip(facts, blocks, strict=True):
        found.setdefault(key, []).append(block)
    return {key: torch.cat(own) for key, own in found.items()}


@dataclass(frozen=True)
class Kept:
    """The values that the edits of one callback have left for renewals.

    The goals are part of checkpoints, with ``4 · contexts · d_model`` bytes for each edit token of a fact. Of the
    moments, only their place on disk is. The changes are part of checkpoints.

    Attributes:
        goals: by fact key, ``[rows, d_model]`` float32 on the CPU, see
            :class:`~lit_moeedit.editing.job.EditResult`; of facts that were generated with it.
        moments: the second moments that the latest edit used.
        changes: the changes that are in the weights, in the order of their edits; none unless a renewal takes them out.
    """

    goals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    moments: KeptMoments = field(default_factory=KeptMoments)
    changes: tuple[Change, ...] = field(default=(), repr=False)

    def with_goals(self, result: EditResult, generated: Collection[str]) -> Self:
        """Keep the goals of those facts of an edit that are generated after it."""
        goals = {key: goal.float().cpu().clone() for key, goal in result.goals.items() if key in generated}
        return replace(self, goals={**self.goals, **goals})

    def without(self, keys: Collection[str]) -> Self:
        """Forget the goals of facts."""
        return replace(self, goals={key: goal for key, goal in self.goals.items() if key not in keys})

    def with_moments(self, moments: KeptMoments) -> Self:
        """Keep other moments."""
        return replace(self, moments=moments)

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint holds; ``None`` if that is nothing."""
        if not self.goals and not self.moments.keys and not self.changes:
            return None
        facts, goals = in_blocks(self.goals)
        return {
            "facts": facts,
            "goals": goals,
            "moments": dict(self.moments.keys),
            "folder": self.moments.folder,
            "changes": [change.state() for change in self.changes],
        }

    @classmethod
    def of_state(cls, where: str, state: Mapping[str, Any] | None) -> Self:
        """Restore the result of :meth:`state`, which may come from an untrusted checkpoint.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        if state is None:
            return cls()
        where = f"{where}, kept"
        shapes = {"facts": [str], "goals": Tensor, "moments": {int: str}, "folder": str, "changes": [dict]}
        check_fields(where, state, ("changes",), **shapes)  # those of earlier versions have none
        goals: Tensor = state["goals"]
        whole = goals.ndim == 3 and goals.dtype == torch.float32 and bool(goals.isfinite().all())
        if not whole or len(goals) != len(state["facts"]):
            raise CheckpointError(
                f"{where}: field 'goals' should be finite float32 of shape [{len(state['facts'])}, contexts, d_model], "
                f"but is {goals.dtype} of shape {list(goals.shape)}"
            )
        moments = KeptMoments(dict(state["moments"]), state["folder"])
        changes = (Change.of_state(f"{where}, changes", change) for change in state.get("changes") or ())
        return cls(of_blocks(state["facts"], goals.cpu()), moments, tuple(changes))
