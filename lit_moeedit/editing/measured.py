"""The measurements of one fact at one moment, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Moment = Literal["before", "after", "end"]
"""Just before an edit, just after it (with the weights that were kept or undone), and at the end of the run."""


@dataclass(frozen=True)
class Measured:
    """A fact at one moment.

    Attributes:
        generated: the text that the model generates after the prompt, greedily.
        holds: whether the model generates the new target.
        p_new: probability of the new target's tokens, their geometric mean, in [0, 1].
        p_true: the same of the true target; ``None`` if it is not known.
        paraphrases: number of paraphrases after which the new target is generated, and number of all.
        neighbours: number of neighbours whose true answer is generated, and number of those whose answer was generated
            before the edit. Only the latter are counted.
    """

    generated: str
    holds: bool
    p_new: float
    p_true: float | None = None
    paraphrases: tuple[int, int] = (0, 0)
    neighbours: tuple[int, int] = (0, 0)
