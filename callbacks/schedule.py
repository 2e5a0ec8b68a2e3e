"""The schedule of edits: their moments, and the number of facts of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

Moment = Literal["fit_start", "validation", "epoch", "step", "every_n_epochs"]


@dataclass(frozen=True)
class Schedule:
    """A moment, and the number of facts to edit each time it comes.

    Attributes:
        moment: the moment to wait for.
        number: the epoch, the step, or the number of epochs.
        batch: facts per edit; ``None`` for all that are left.
    """

    moment: Moment
    number: int = 0
    batch: int | None = None

    @classmethod
    def parse(cls, at: str | Mapping[str, int]) -> Self:
        """Read ``at`` of :class:`~lit_moeedit.callbacks.KnowledgeEditing`.

        Raises:
            ValueError: saying what was given and what is known.

        Example:
            >>> Schedule.parse({"every_n_epochs": 2, "batch": 10})
            Schedule(moment='every_n_epochs', number=2, batch=10)
        """
        known = (
            "'fit_start', 'validation', {epoch: N}, {step: N} or {every_n_epochs: N}, the last three with 'batch: M' "
            "to edit at most M facts at a time"
        )
        if at in ("fit_start", "validation"):
            return cls(at)  # type: ignore[arg-type]
        if not isinstance(at, Mapping):
            raise ValueError(f"at must be {known}; got {at!r}")
        moments = [key for key in at if key != "batch"]
        if len(moments) != 1 or moments[0] not in ("epoch", "step", "every_n_epochs"):
            raise ValueError(f"at must be {known}; got the keys {sorted(at)}")
        moment = moments[0]
        for key, value in at.items():
            least = 0 if key in ("epoch", "step") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"at: {key} must be a whole number of at least {least}, got {value!r}")
        return cls(moment, at[moment], at.get("batch"))  # type: ignore[arg-type]

    def due_at_epoch(self, epoch: int, edits_made: int) -> bool:
        """Tell whether to edit before training epoch ``epoch`` (counted from 0), after ``edits_made`` earlier edits."""
        if self.moment == "epoch":
            return epoch >= self.number + edits_made if self.batch else epoch >= self.number and not edits_made
        if self.moment == "every_n_epochs":
            return epoch > 0 and epoch >= self.number * (edits_made + 1)
        return self.moment == "fit_start"

    def due_at_step(self, step: int) -> bool:
        """Tell whether to edit when ``step`` optimizer steps are done."""
        return self.moment == "step" and step >= self.number
