"""How callbacks hear of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Evaluation

NAMED = 5
"""So many of the facts that an edit missed are named."""


@dataclass(frozen=True)
class EditEvent:
    """An edit that has been made (or made and undone).

    Attributes:
        result: what the editor did.
        before: evaluation of the facts just before.
        after: evaluation just after; with ``result.kept`` false, of the weights that were not kept.
        epoch: epoch of the trainer.
        step: optimizer steps done.
    """

    result: EditResult
    before: Evaluation
    after: Evaluation
    epoch: int
    step: int

    @property
    def missed(self) -> list[Fact]:
        """The facts whose new target was not said after the edit."""
        return [fact for fact, said in zip(self.result.facts, self.after.edits_exact, strict=True) if not said]

    @property
    def missed_text(self) -> str:
        """Those of them that are named, in a line."""
        named = [f"{fact.prompt!r} -> {fact.target_new!r}" for fact in self.missed[:NAMED]]
        return ", ".join(named) + (f", and {len(self.missed) - NAMED} more" if len(self.missed) > NAMED else "")

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged of the edit: ``edit_before/…``, ``edit_after/…`` and ``edit_seconds/…``, without NaN."""
        found = {"before": self.before.metrics, "after": self.after.metrics, "seconds": self.result.seconds}
        named = {f"edit_{part}/{name}": value for part, values in found.items() for name, value in values.items()}
        return {name: value for name, value in named.items() if value == value}

    def __str__(self) -> str:
        after, done = self.after.metrics, "edited" if self.result.kept else "undid the edit of"
        return (
            f"{done} {len(self.result.facts)} facts in {self.result.seconds['edit']:.1f} s at epoch {self.epoch}, "
            f"step {self.step}: efficacy {after['efficacy']:.3f}, generalization {after['generalization']:.3f}, "
            f"retained {after['specificity_retained']:.3f}"
        )


class EditListener(L.Callback):
    """A callback that :class:`~lit_moeedit.callbacks.KnowledgeEditing` tells of its edits.

    Listeners may stand anywhere in the trainer's list of callbacks.
    """

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        """Called before the facts are edited, in training or evaluation mode as it was."""

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        """Called when the edit is in the weights, or has been undone."""
