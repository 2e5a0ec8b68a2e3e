"""Events of edits, and the base class of callbacks that hear of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import lightning as L

from lit_moeedit.callbacks.guards import GuardFigure
from lit_moeedit.callbacks.named import callbacks_of, metrics_prefix
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Evaluation, Measured, Moment
from lit_moeedit.editing.outcomes import Reason, describe_failure
from lit_moeedit.sharding.ranks import Ranks

_PROBED = ("perplexity_ratio", "routing_similarity")


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
        reasons: by fact key, why its new target is not generated just after the edit.
        guards: what the guards measured.
        measured: measurements of each fact, before and after; empty if no listener wants answers.
        seconds: seconds of the edit's phases, of those around it (``locate`` and ``evaluation``, before and after), and
            of all ``other`` work; their sum is the time since the edit began.
        memory: peak of each phase's memory on this rank's GPU, in bytes; empty on a CPU.
    """

    result: EditResult
    before: Evaluation
    after: Evaluation
    epoch: int
    step: int
    name: str | None = None
    reasons: Mapping[str, Reason] = field(default_factory=dict)
    guards: Sequence[GuardFigure] = ()
    measured: Mapping[Moment, list[Measured]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def missed(self) -> list[Fact]:
        """The facts whose new target the model does not generate after the edit."""
        return [fact for fact, is_exact in zip(self.result.facts, self.after.edits_exact, strict=True) if not is_exact]

    @property
    def failure(self) -> str:
        """The facts that are not generated, with the most frequent reasons and what to try."""
        return describe_failure(self.result, self.reasons)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the edit, without NaN: ``edit_before/…``, ``edit_after/…``, ``edit_seconds/…``.

        What guards measured on their probe text is among those after the edit. The prefix is ``edit_<name>`` if the
        callback has a name.
        """
        found = {"before": self.before.metrics, "after": self.after.metrics, "seconds": self.result.seconds}
        probed = {figure.name[4:]: figure.value for figure in self.guards}
        found["after"] = {**{name: value for name, value in probed.items() if name in _PROBED}, **found["after"]}
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
        broken = "".join(f"; {figure}" for figure in self.guards if figure.is_broken)
        return (
            f"{done} {len(self.result.facts)} facts in {self.result.seconds['edit']:.1f} s at epoch {self.epoch}, "
            f"step {self.step}: {shown}{broken}"
        )


@dataclass(frozen=True)
class RetentionEvent:
    """The metrics that a validation measured of the edits so far.

    Attributes:
        facts: the facts edited so far.
        evaluation: their evaluation.
        epoch: epoch of the trainer.
        step: optimizer steps done.
        name: name of the :class:`~lit_moeedit.callbacks.KnowledgeEditing` that made the edits.
    """

    facts: Sequence[Fact]
    evaluation: Evaluation
    epoch: int
    step: int
    name: str | None = None


@dataclass(frozen=True)
class SurvivalEvent:
    """A point of the survival curve: what training has left of the edits so far.

    Attributes:
        facts: the facts measured, at most ``survival_facts`` of those edited so far.
        evaluation: their evaluation.
        margins: by fact key, the mean log-probability of the new target minus that of the old one, in nats; of a fact
            without an old target, the mean log-probability of the new one. The lower, the nearer to being lost.
        epoch: epoch of the trainer.
        step: optimizer steps done.
        name: name of the :class:`~lit_moeedit.callbacks.KnowledgeEditing` that made the edits.
    """

    facts: Sequence[Fact]
    evaluation: Evaluation
    margins: Mapping[str, float]
    epoch: int
    step: int
    name: str | None = None


class EditListener(L.Callback):
    """A callback that every :class:`~lit_moeedit.callbacks.KnowledgeEditing` of the trainer tells of its edits.

    Listeners may stand anywhere in the trainer's list of callbacks.
    """

    wants_answers: ClassVar[bool] = False
    """``True`` if the model's answers are to be generated around each edit."""

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        """Hook before an edit of these facts; the model is in training or evaluation mode as it was."""

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        """Hook after an edit, when it is in the weights or has been undone."""

    def on_retention(self, trainer: L.Trainer, pl_module: L.LightningModule, event: RetentionEvent) -> None:
        """Hook at a validation, when the facts edited so far have been evaluated."""

    def on_survival(self, trainer: L.Trainer, pl_module: L.LightningModule, event: SurvivalEvent) -> None:
        """Hook at a point of the survival curve; the weights are those in training, or the average that is kept."""


def tell_listeners(trainer: L.Trainer, call: Callable[[EditListener], None]) -> None:
    """Call a hook of all listeners, one after the other on all ranks."""
    for listener in callbacks_of(trainer, EditListener):
        # the next one may make forwards, which no rank may make alone
        with Ranks.current().together():
            call(listener)
