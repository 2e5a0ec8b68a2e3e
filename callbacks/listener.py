"""How callbacks hear of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Evaluation


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


class EditListener(L.Callback):
    """A callback that :class:`~lit_moeedit.callbacks.KnowledgeEditing` tells of its edits.

    Listeners may stand anywhere in the trainer's list of callbacks.
    """

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        """Called before the facts are edited, in training or evaluation mode as it was."""

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        """Called when the edit is in the weights, or has been undone."""
