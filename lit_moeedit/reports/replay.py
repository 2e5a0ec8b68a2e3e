"""The replay of edited facts in the training after their edits, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_moeedit.text import counted, first_few, printable


@dataclass(frozen=True)
class Replayed:
    """The statements of edited facts that a run was trained on.

    Attributes:
        share: number of statements in proportion to the rows of a batch, or of their tokens to the tokens of a batch.
        of: the elements of a batch that ``share`` is about.
        every_n_steps: optimizer steps from one batch with statements to the next.
        statements: number of statements so far, on all ranks.
        facts: number of facts that are stated, without those that are given up.
        on_conflict: treatment of text that contradicts an edit.
        conflicts: number of contradicting texts in the batches so far, on all ranks; one that comes twice counts twice.
        given_up: subjects of the facts that are no longer stated, because the text contradicts them.
    """

    share: float
    of: Literal["rows", "tokens"] = "rows"
    every_n_steps: int = 1
    statements: int = 0
    facts: int = 0
    on_conflict: str = "warn"
    conflicts: int = 0
    given_up: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Describe it in one line.

        Example:
            >>> print(Replayed(0.05, statements=1234, facts=31, on_conflict="yield", conflicts=7, given_up=("Peru",)))
            5 % of rows, 1,234 statements of 31 facts; 7 texts contradicted an edit (yield); no longer stated: Peru
        """
        every = "" if self.every_n_steps == 1 else f" every {self.every_n_steps:,} steps"
        statements = f"{counted(self.statements, 'statement')} of {counted(self.facts, 'fact')}"
        line = f"{100 * self.share:.3g} % of {self.of}{every}, {statements}"
        if self.conflicts:
            line += f"; {counted(self.conflicts, 'text')} contradicted an edit ({printable(self.on_conflict)})"
        if self.given_up:
            line += f"; no longer stated: {first_few(map(printable, self.given_up), 10)}"
        return line
