"""Facts of edits with what was measured of them, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lit_moeedit.editing.measured import Measured, Moment

__all__ = ["FactRow", "Measured", "Moment"]


@dataclass(frozen=True)
class FactRow:
    """A fact, its measurements, and the reason if it is not generated.

    Attributes:
        key: the fact's key.
        subject: the subject.
        prompt: the prompt; of a question to a chat model the question alone.
        target_new: the new target.
        target_true: the true target; ``None`` if it is not known.
        edit: number of the edit in the run, from 1.
        kept: whether the edit was kept.
        measured: measurements by moment.
        reason: a sentence that says why the new target is not generated at the last measured moment, and what to try;
            ``None`` if it is generated.
        name: name of the editing callback, if it has one.
        epoch: epoch of the edit; ``None`` without a trainer.
        step: optimizer step of the edit; ``None`` without a trainer.
        chat: whether the prompt was put into the tokenizer's chat template.
        replaced_by: number of the later edit that gave the prompt another target; ``None`` if there is none.
    """

    key: str
    subject: str
    prompt: str
    target_new: str
    target_true: str | None
    edit: int
    kept: bool
    measured: dict[Moment, Measured] = field(default_factory=dict)
    reason: str | None = None
    name: str | None = None
    epoch: int | None = None
    step: int | None = None
    chat: bool = False
    replaced_by: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the row of ``edits.jsonl``."""
        return asdict(self)
