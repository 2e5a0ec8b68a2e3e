"""The reason why edits were lost, as plain values for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class PartPutBack:
    """A part of the just-edited model, put back into the final one.

    Attributes:
        name: name of the part.
        generated: number of edited facts that are generated then.
        explained: share of the loss that this part explains; NaN if nothing was lost.
        moved: distance from the just-edited to the final part, as a share of the norm of the just-edited one.
        carries: whether it carries the loss.
    """

    name: str
    generated: int
    explained: float = math.nan
    moved: float = math.nan
    carries: bool = False


@dataclass(frozen=True)
class LossByPart:
    """The loss of edits since they were made, by part of the model.

    Attributes:
        facts: number of edited facts.
        right_after: number of them that were generated right after the last edit.
        final: number of them that are generated at the end.
        verdict: the result in one sentence.
        advice: the remedy; ``None`` if nothing was lost.
        parts: the parts put back, one at a time.
    """

    facts: int
    right_after: int
    final: int
    verdict: str
    advice: str | None = None
    parts: tuple[PartPutBack, ...] = ()

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> Self | None:
        """Make it of ``autopsy`` of a summary; ``None`` if no autopsy was made."""
        if not found or "parts" not in found:
            return None
        parts = [
            PartPutBack(
                part["name"],
                part["score"]["generated"],
                math.nan if part["explained"] is None else part["explained"],
                math.nan if part["moved"] is None else part["moved"],
                part["name"] == found["carrier"],
            )
            for part in found["parts"]
        ]
        counts = found["facts"], found["edited"]["generated"], found["final"]["generated"]
        return cls(*counts, found["verdict"], found["advice"], tuple(parts))


@dataclass(frozen=True)
class MissingAutopsy:
    """An autopsy that was asked for and could not be made.

    Attributes:
        reason: the reason.
        command: a command that makes one from checkpoints; words in capitals stand for what is not known.
    """

    reason: str
    command: str

    @property
    def verdict(self) -> str:
        """The reason and the command in one sentence."""
        return f"not made, because {self.reason}; checkpoints are examined by: {self.command}"

    def to_dict(self) -> dict[str, str]:
        """Return what a summary has of it."""
        return {"missing": self.reason, "command": self.command}

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> Self | None:
        """Make it of ``autopsy`` of a summary; ``None`` if one was made, or none was asked for."""
        return cls(found["missing"], found["command"]) if found and "missing" in found else None
