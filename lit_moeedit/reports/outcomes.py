"""The outcome of an edit, fact by fact and in total."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lit_moeedit.reports.rows import FactRow, Measured

Outcome = Literal["failed", "lost", "undone", "unmeasured", "replaced", "holds"]
"""The worst first. ``lost``: the fact held after the edit, and no longer at the end. ``replaced``: a later edit gave
its prompt another target."""

ORDER: tuple[Outcome, ...] = ("failed", "lost", "undone", "unmeasured", "replaced", "holds")
MARKS: dict[Outcome, str] = {
    "failed": "✗",
    "lost": "✗",
    "undone": "↶",
    "unmeasured": "?",
    "replaced": "→",
    "holds": "✓",
}
WORDS: dict[Outcome, str] = {
    "failed": "failed",
    "lost": "lost later",
    "undone": "undone",
    "unmeasured": "not measured",
    "replaced": "replaced",
    "holds": "holds",
}


def latest(row: FactRow) -> Measured | None:
    """Return the last measurement after the edit; ``None`` if there is none."""
    return row.measured.get("end") or row.measured.get("after")


def outcome_of(row: FactRow) -> Outcome:
    """Tell the outcome of a fact's edit at the last measured moment."""
    now, after = latest(row), row.measured.get("after")
    if not row.kept:
        return "undone"
    if row.replaced_by is not None:
        return "replaced"
    if now is None:
        return "unmeasured"
    if now.holds:
        return "holds"
    return "lost" if after is not None and after.holds else "failed"


def worst_first(rows: Iterable[FactRow]) -> list[FactRow]:
    """Sort rows by outcome, the failed ones first; within an outcome their order stays."""
    return sorted(rows, key=lambda row: ORDER.index(outcome_of(row)))


@dataclass(frozen=True)
class Totals:
    """Counts over all facts at the last measured moment.

    Attributes:
        facts: number of facts of each outcome.
        paraphrases: number of paraphrases after which the new target is generated, and number of all; here and below
            without those of edits that were undone or replaced.
        neighbours: number of neighbours whose true answer is generated, and number of those whose answer was generated
            before the edit.
    """

    facts: dict[Outcome, int]
    paraphrases: tuple[int, int]
    neighbours: tuple[int, int]

    @classmethod
    def of(cls, rows: Iterable[FactRow]) -> Totals:
        """Count the outcomes, paraphrases and neighbours of rows."""
        facts: dict[Outcome, int] = dict.fromkeys(ORDER, 0)
        sums = [0, 0, 0, 0]
        for row in rows:
            facts[outcome_of(row)] += 1
            now = latest(row)
            if now is not None and row.kept and row.replaced_by is None:
                sums = [a + b for a, b in zip(sums, (*now.paraphrases, *now.neighbours), strict=True)]
        return cls(facts, (sums[0], sums[1]), (sums[2], sums[3]))

    @property
    def number(self) -> int:
        """Number of all facts, without edits that were replaced."""
        return sum(self.facts.values()) - self.facts.get("replaced", 0)

    @property
    def headline(self) -> str:
        """The outcome in one sentence.

        Example:
            >>> Totals({"holds": 4, "failed": 1}, (0, 0), (0, 0)).headline
            '4 of 5 facts hold: 1 failed.'
        """
        number, holding = self.number, self.facts.get("holds", 0)
        if not number:
            return "No fact has been edited."
        if holding == number:
            return "The fact holds." if number == 1 else f"All {number:,} facts hold."
        found = ((count, outcome) for outcome, count in self.facts.items() if count)
        others = [(count, WORDS[outcome]) for count, outcome in found if outcome not in ("holds", "replaced")]
        if number == 1:
            return f"The fact does not hold: {others[0][1]}."
        share = (
            f"{holding:,} of {number:,} facts hold{'s' * (holding == 1)}"
            if holding
            else f"None of {number:,} facts hold"
        )
        return f"{share}: {', '.join(f'{count:,} {word}' for count, word in others)}."
