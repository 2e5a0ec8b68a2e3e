"""The schedule of edits: their moments, and the number of facts of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from lit_moeedit.callbacks.limits import FitLimits

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

    def __str__(self) -> str:
        parts = {self.moment: self.number} | ({} if self.batch is None else {"batch": self.batch})
        return self.moment if self.moment in ("fit_start", "validation") else str(parts).replace("'", "")

    def missed(self, limits: FitLimits, pending: int, edits_made: int = 0) -> int:
        """Count the facts that a fit surely does not edit, because it ends before.

        Args:
            limits: the part of the fit that is still to come.
            pending: number of facts to edit.
            edits_made: number of edits that are made already.
        """
        needed = pending if self.batch is None else math.ceil(pending / self.batch)
        needed = needed if self.batch else min(needed, 1)
        return max(0, pending - (self.batch or pending) * self._edits_to_come(limits, needed, edits_made))

    def _edits_to_come(self, limits: FitLimits, needed: int, edits_made: int) -> int:
        if self.moment == "validation":
            return needed * limits.validates
        if self.moment == "step":
            starts = self.number == limits.step == 0 and limits.epoch < limits.epochs
            left = limits.steps - max(limits.step + 1, self.number) + 1
            return int(min(needed, max(0, left) + starts))
        found, epoch = 0, limits.epoch
        while found < needed and (due := self._next_epoch(epoch, edits_made + found)) < limits.epochs:
            found, epoch = found + 1, int(due) + 1
        return found

    def _next_epoch(self, epoch: int, edits_made: int) -> float:
        """Return the first epoch from ``epoch`` on for which :meth:`due_at_epoch` is true."""
        if self.moment == "epoch":
            if self.batch:
                return max(epoch, self.number + edits_made)
            return math.inf if edits_made else max(epoch, self.number)
        return max(epoch, 1, self.number * (edits_made + 1)) if self.moment == "every_n_epochs" else epoch

    def first_step(self, limits: FitLimits) -> int:
        """Return the number of optimizer steps before the first edit, or a lower number if it is not known."""
        if self.moment == "step":
            return max(limits.step, self.number)
        if self.moment in ("epoch", "every_n_epochs"):
            return max(limits.step, self.number * limits.steps_per_epoch)
        return limits.step
