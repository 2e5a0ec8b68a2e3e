"""The survival curve: what training leaves of the edits, measured from time to time on some prompts."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import lightning as L

from lit_moeedit.callbacks.charts import log_now
from lit_moeedit.callbacks.listener import SurvivalEvent, tell_listeners
from lit_moeedit.callbacks.resources import from_datamodule
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Evaluation
from lit_moeedit.reports import SurvivalPoint, Survivors
from lit_moeedit.reports.plain import restored, to_plain
from lit_moeedit.reports.survival import Change
from lit_moeedit.sharding.ranks import Ranks

if TYPE_CHECKING:
    from lit_moeedit.callbacks.edit_making import EditMaking

log = logging.getLogger(__name__)
T = TypeVar("T")

SURVIVAL_CHARTS = ("efficacy_accuracy", "generalization", "specificity_retained", "margin_median")
"""Metrics of the survival curve that loggers get."""
FIRST, LONGEST = 32, 1024
"""Shortest and longest interval of ``auto``, in optimizer steps."""
_ASKED = 2
"""Maximum number of paraphrases, and of neighbours, of a fact that are measured at a point."""
_KEPT = ("efficacy", "efficacy_accuracy", "generalization", "generalization_accuracy", "specificity_retained")


@dataclass(frozen=True)
class Survival:
    """The curve of one callback so far; it survives in checkpoints.

    Attributes:
        points: its points, in the order in which they were measured.
        right_after: keys of the edited facts whose new target was generated just after their edit.
        generated: keys of the facts whose new target was generated at the last point.
        margins: by fact key, the margin at the last point, see :class:`~lit_moeedit.callbacks.listener.SurvivalEvent`.
    """

    points: tuple[SurvivalPoint, ...] = ()
    right_after: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    margins: dict[str, float] = field(default_factory=dict)

    def with_edit(self, facts: Sequence[Fact], after: Evaluation) -> Self:
        """Add an edit, with the evaluation of its facts just after it."""
        exact = zip(facts, after.edits_exact.tolist(), strict=True)
        return replace(self, right_after=(*self.right_after, *(fact.key for fact, is_exact in exact if is_exact)))

    def without(self, keys: Collection[str]) -> Self:
        """Forget facts whose edits were replaced; the points stay."""
        return replace(
            self,
            right_after=tuple(key for key in self.right_after if key not in keys),
            generated=tuple(key for key in self.generated if key not in keys),
            margins={key: margin for key, margin in self.margins.items() if key not in keys},
        )

    def with_point(self, event: SurvivalEvent, after: Change | None) -> Self:
        """Add a point."""
        exact = zip(event.facts, event.evaluation.edits_exact.tolist(), strict=True)
        generated = tuple(fact.key for fact, is_exact in exact if is_exact)
        lost = (set(self.generated) - set(generated)) & {fact.key for fact in event.facts}
        point = SurvivalPoint(
            event.epoch,
            event.step,
            len(event.facts),
            len(generated),
            metrics_of(event),
            after,
            tuple(fact.subject for fact in event.facts if fact.key in lost),
            event.name,
        )
        return replace(self, points=(*self.points, point), generated=generated, margins=dict(event.margins))

    @property
    def share(self) -> float:
        """Share of the measured edits generated just after their edit that were generated at the last point."""
        began = set(self.right_after) & self.margins.keys()
        return len(began & set(self.generated)) / len(began) if began else 1.0

    def state(self) -> dict[str, Any]:
        """Return the curve as plain values."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def of_state(cls, where: str, state: object) -> Self:
        """Make a curve from the result of :meth:`state`.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        found: Self = restored(cls, state, f"{where}, survival")
        return found


@dataclass(frozen=True)
class SurvivalCurve:
    """The settings of the curve, with the meaning that they have for :class:`~lit_moeedit.callbacks.KnowledgeEditing`.

    Attributes:
        every_n_steps: optimizer steps between two points, or ``auto``; ``None`` or 0 for no curve.
        facts: maximum number of facts that are measured.

    Raises:
        ValueError: if a setting is out of range.
    """

    every_n_steps: int | Literal["auto"] | None = "auto"
    facts: int = 64

    def __post_init__(self) -> None:
        every = self.every_n_steps
        if every not in ("auto", None) and (not isinstance(every, int) or every < 0):
            raise ValueError(
                f"survival_every_n_steps must be a number of steps, 'auto', or None or 0 for no curve, got {every!r}"
            )
        if self.facts < 1:
            raise ValueError(f"survival_facts must be at least 1, got {self.facts}")

    @property
    def is_on(self) -> bool:
        """``True`` if there is a curve."""
        return bool(self.every_n_steps)

    def is_due(self, survival: Survival, step: int) -> bool:
        """Tell if a point is due after ``step`` optimizer steps, some time after an edit.

        With ``auto``, the interval doubles with the steps since the latest edit or renewal: most edits that are lost
        are lost early.
        """
        if not self.is_on or not survival.points:
            return self.is_on
        last = survival.points[-1].step
        if isinstance(self.every_n_steps, int):
            return step - last >= self.every_n_steps
        since = last - max((point.step for point in survival.points if point.after), default=0)
        return step - last >= min(max(FIRST, since), LONGEST)

    def choose(self, facts: Sequence[Fact]) -> list[Fact]:
        """Choose the facts to measure: all, or those with the lowest keys.

        Keys are digests, so this is a random sample with a fixed seed, the same after a resume and on every rank. It
        changes only with the facts that are edited.
        """
        if len(facts) <= self.facts:
            return list(facts)
        keys = set(sorted(fact.key for fact in facts)[: self.facts])
        return [fact for fact in facts if fact.key in keys]

    def measure(
        self,
        editing: EditMaking,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        after: Change | None = None,
        end: tuple[int, int] | None = None,
    ) -> None:
        """Measure a point with the weights in the module, and let listeners and loggers know. Every rank calls this.

        Args:
            editing: the callback that made the edits.
            trainer: the trainer.
            pl_module: the module.
            after: the change just before the point.
            end: epoch and optimizer step at which training ended; ``None`` for those of the trainer.
        """
        with Ranks.current().together():
            self.tell(editing, trainer, pl_module, self.add_point(editing, trainer, pl_module, after, end))

    def add_point(
        self,
        editing: EditMaking,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        after: Change | None = None,
        end: tuple[int, int] | None = None,
    ) -> SurvivalEvent | None:
        """Measure a point, and add it to the curve; nobody is told yet. Arguments as for :meth:`measure`.

        Returns:
            The point; ``None`` without a curve or edits.
        """
        facts = self.choose(editing.applied_facts)
        if not self.is_on or not facts:
            return None
        asked = [asked_at_a_point(fact) for fact in facts]
        before = editing.neighbours_before
        evaluation = editing.evaluate(pl_module, asked, {fact.key: list(_spread(before[fact.key])) for fact in facts})
        moment = end or (trainer.current_epoch, trainer.global_step)
        event = SurvivalEvent(facts, evaluation, margins_of(facts, evaluation), *moment, editing.name)
        editing.survival = editing.survival.with_point(event, after)
        return event

    def tell(
        self, editing: EditMaking, trainer: L.Trainer, pl_module: L.LightningModule, event: SurvivalEvent | None
    ) -> None:
        """Let listeners and loggers know the last point, if there is one. Every rank calls this."""
        if event is None:
            return
        metrics = editing.survival.points[-1].metrics
        prefix = f"{editing.metrics_prefix}/survival"
        log_now(trainer, {f"{prefix}/{name}": metrics[name] for name in SURVIVAL_CHARTS if name in metrics}, event.step)
        tell_listeners(trainer, lambda listener: listener.on_survival(trainer, pl_module, event))

    def finish(self, editing: EditMaking, trainer: L.Trainer, pl_module: L.LightningModule) -> Survivors | None:
        """Measure the edits that are left at the end, and log one line about them. Every rank calls this.

        Returns:
            The edits that are left; ``None`` without a curve or edits.
        """
        facts = editing.applied_facts
        if not self.is_on or not facts:
            return None
        generated = set(editing.generated(pl_module, facts))
        began = set(editing.survival.right_after)
        contradictions: Mapping[str, str] = from_datamodule(trainer, "contradictions", facts) or {}
        survivors = Survivors(
            edits=len(facts),
            generated=len(generated),
            right_after=sum(fact.key in began for fact in facts),
            lost=tuple(fact.subject for fact in facts if fact.key in began - generated),
            contradicted=tuple(fact.subject for fact in facts if fact.key in contradictions),
        )
        log.info("%s%s", editing.heading, survivors)
        return survivors


def margins_of(facts: Sequence[Fact], evaluation: Evaluation) -> dict[str, float]:
    """Return the margin of each fact by its key, in nats.

    It is the mean log-probability of the new target minus that of the old one; of a fact without an old one, the mean
    log-probability of the new one.
    """
    new, true = evaluation.log_new, evaluation.log_true
    margins = new - true.where(~true.isnan(), 0.0)
    return dict(zip((fact.key for fact in facts), margins.tolist(), strict=True))


def metrics_of(event: SurvivalEvent) -> dict[str, float]:
    """Return the metrics of a point, without those for which nothing was counted."""
    margins = list(event.margins.values())
    found = {name: event.evaluation.metrics[name] for name in _KEPT}
    found |= {"margin_min": min(margins), "margin_median": median(margins)}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def asked_at_a_point(fact: Fact) -> Fact:
    """Return a fact with those of its paraphrases and neighbours that a point of the curve asks about."""
    return replace(fact, paraphrases=_spread(fact.paraphrases), neighbours=_spread(fact.neighbours))


def _spread(items: Sequence[T]) -> tuple[T, ...]:
    """Select some items at equal distances, because neighbours of one kind stand together."""
    return tuple(items[:: max(1, -(-len(items) // _ASKED))][:_ASKED])
