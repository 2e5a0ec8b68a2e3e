"""The hold of edited facts in the training after their edits, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from lit_moeedit.text import counted


@dataclass(frozen=True)
class Held:
    """The hidden states at edit tokens that a run has held.

    Attributes:
        rows: number of prompts of a step, on each rank.
        every_n_steps: optimizer steps from one step with prompts to the next.
        weight: factor of the loss.
        facts: number of facts that are held.
        distance: squared distance of the hidden states from where they are held, over the squared norm of the latter,
            on average over the last prompts of the first rank; ``None`` before there were any.
    """

    rows: int
    every_n_steps: int = 1
    weight: float = 1.0
    facts: int = 0
    distance: float | None = None

    def __str__(self) -> str:
        """Describe it in one line.

        Example:
            >>> print(Held(4, facts=32, distance=0.0123))
            4 prompts each step, 32 facts; relative squared distance 0.012
        """
        every = "each step" if self.every_n_steps == 1 else f"every {self.every_n_steps:,} steps"
        line = f"{counted(self.rows, 'prompt')} {every}, {counted(self.facts, 'fact')}"
        return line if self.distance is None else f"{line}; relative squared distance {self.distance:.2g}"
