"""The survival of edits in the training after them, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lit_moeedit.text import first_few, printable

Change = Literal["edit", "renewal"]


@dataclass(frozen=True)
class SurvivalPoint:
    """A point of the survival curve.

    Attributes:
        epoch: the epoch.
        step: the optimizer step.
        facts: number of facts that were measured.
        generated: number of them whose new target is generated.
        metrics: metrics by name; ``margin_min`` and ``margin_median`` are in nats.
        after: ``edit`` or ``renewal`` if the point was measured just after one; ``None`` for training alone.
        lost: subjects of the facts whose new target was generated at the point before, and no longer is.
        name: name of the callback that made the edits.
    """

    epoch: int
    step: int
    facts: int
    generated: int
    metrics: dict[str, float] = field(default_factory=dict)
    after: Change | None = None
    lost: tuple[str, ...] = ()
    name: str | None = None


@dataclass(frozen=True)
class Survivors:
    """The edits that are left at the end of the training.

    Attributes:
        edits: number of edits.
        generated: number of them whose new target is generated.
        right_after: number of them whose new target was generated just after the edit.
        lost: subjects of those that were generated just after the edit, and no longer are.
        contradicted: subjects of those that the training text contradicts.
    """

    edits: int
    generated: int
    right_after: int
    lost: tuple[str, ...] = ()
    contradicted: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe them in one line.

        Example:
            >>> print(Survivors(32, 30, 32, ("A", "B"), ("B",)))
            of 32 edits 30 are generated (32 right after the edit); lost: A, B; contradicted by the training text: B
        """
        edits = "edit" if self.edits == 1 else "edits"
        line = f"of {self.edits:,} {edits} {self.generated:,} are generated ({self.right_after:,} right after the edit)"
        for heading, subjects in (("lost", self.lost), ("contradicted by the training text", self.contradicted)):
            if subjects:
                line += f"; {heading}: {first_few(map(printable, subjects), 10)}"
        return line
