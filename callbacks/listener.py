"""Events of edits, and the base class of callbacks that hear of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning as L

from lit_moeedit.callbacks.named import callbacks_of, metrics_prefix
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Evaluation
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few


@dataclass(frozen=True)
class EditEvent:
    """An edit that has been made (or made and undone).

    Attributes:
        result: the result of the editor.
        before: evaluation of the facts just before.
        after: evaluation just after; with ``result.kept`` false, of the weights that were not kept.
        epoch: epoch of the trainer.
        step: optimizer steps done.
        name: name of the :class:`~lit_moeedit.callbacks.KnowledgeEditing` that made it.
    """

    result: EditResult
    before: Evaluation
    after: Evaluation
    epoch: int
    step: int
    name: str | None = None

    @property
    def missed(self) -> list[Fact]:
        """The facts whose new target the model does not generate after the edit."""
        return [fact for fact, is_exact in zip(self.result.facts, self.after.edits_exact, strict=True) if not is_exact]

    @property
    def missed_text(self) -> str:
        """The first of them, in a line."""
        return first_few(f"{fact.prompt!r} -> {fact.target_new!r}" for fact in self.missed)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the edit, without NaN: ``edit_before/…``, ``edit_after/…``, ``edit_seconds/…``.

        The prefix is ``edit_<name>`` if the callback has a name.
        """
        found = {"before": self.before.metrics, "after": self.after.metrics, "seconds": self.result.seconds}
        edit = metrics_prefix("edit", self.name)
        named = {f"{edit}_{part}/{name}": value for part, values in found.items() for name, value in values.items()}
        return {name: value for name, value in named.items() if value == value}

    def __str__(self) -> str:
        after, done = self.after.metrics, "edited" if self.result.kept else "undid the edit of"
        # without a true target there is no efficacy, but the new one is generated or not
        named = {"efficacy": "efficacy", "generalization": "generalization", "retained": "specificity_retained"}
        if after["efficacy"] != after["efficacy"]:
            named = {"efficacy_accuracy": "efficacy_accuracy", **named}
        shown = ", ".join(f"{text} {after[key]:.3f}" for text, key in named.items() if after[key] == after[key])
        done = f"{self.name}: {done}" if self.name else done
        return (
            f"{done} {len(self.result.facts)} facts in {self.result.seconds['edit']:.1f} s at epoch {self.epoch}, "
            f"step {self.step}: {shown}"
        )


class EditListener(L.Callback):
    """A callback that every :class:`~lit_moeedit.callbacks.KnowledgeEditing` of the trainer tells of its edits.

    Listeners may stand anywhere in the trainer's list of callbacks.
    """

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        """Hook before an edit of these facts; the model is in training or evaluation mode as it was."""

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        """Hook after an edit, when it is in the weights or has been undone."""


def tell_listeners(trainer: L.Trainer, call: Callable[[EditListener], None]) -> None:
    """Call a hook of all listeners, one after the other on all ranks."""
    for listener in callbacks_of(trainer, EditListener):
        # the next one may make forwards, which no rank may make alone
        with Ranks.current().together():
            call(listener)
