"""Values of edits that their renewals need: the hidden states that they aimed for, and second moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.editing import EditResult
from lit_moeedit.preservation.kept_moments import KeptMoments


@dataclass(frozen=True)
class Kept:
    """The values that the edits of one callback have left for renewals.

    The goals are part of checkpoints, with ``4 · contexts · d_model`` bytes for each fact. Of the moments, only their
    place on disk is.

    Attributes:
        goals: by fact key, ``[contexts, d_model]`` float32 on the CPU, see
            :class:`~lit_moeedit.editing.job.EditResult`; of facts that were generated with it.
        moments: the second moments that the latest edit used.
    """

    goals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    moments: KeptMoments = field(default_factory=KeptMoments)

    def with_goals(self, result: EditResult, generated: Collection[str]) -> Self:
        """Keep the goals of those facts of an edit that are generated after it."""
        goals = {key: goal.float().cpu().clone() for key, goal in result.goals.items() if key in generated}
        return replace(self, goals={**self.goals, **goals})

    def with_moments(self, moments: KeptMoments) -> Self:
        """Keep other moments."""
        return replace(self, moments=moments)

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint holds; ``None`` if that is nothing."""
        if not self.goals and not self.moments.keys:
            return None
        return {
            "facts": list(self.goals),
            "goals": torch.stack(list(self.goals.values())) if self.goals else torch.zeros(0, 0, 0),
            "moments": dict(self.moments.keys),
            "folder": self.moments.folder,
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
        check_fields(where, state, facts=[str], goals=Tensor, moments={int: str}, folder=str)
        goals: Tensor = state["goals"]
        whole = goals.ndim == 3 and goals.dtype == torch.float32 and bool(goals.isfinite().all())
        if not whole or len(goals) != len(state["facts"]):
            raise CheckpointError(
                f"{where}: field 'goals' should be finite float32 of shape [{len(state['facts'])}, contexts, d_model], "
                f"but is {goals.dtype} of shape {list(goals.shape)}"
            )
        moments = KeptMoments(dict(state["moments"]), state["folder"])
        return cls(dict(zip(state["facts"], goals.cpu().unbind(), strict=True)), moments)
