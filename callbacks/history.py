"""The history of a run's edits, fact by fact, from which its report is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from lit_moeedit.callbacks.listener import EditEvent, RetentionEvent
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, Measured
from lit_moeedit.editing.outcomes import contradicted_reason, undone_reason
from lit_moeedit.reports import FactRow, Guard, Retention
from lit_moeedit.reports.plain import restored, to_plain


@dataclass(frozen=True)
class History:
    """The measurements of each fact of each edit of a run; they survive in checkpoints.

    Attributes:
        rows: the facts, in the order of their edits.
        retention: metrics at the validations after an edit, of callbacks with a name under ``<name>/<metric>``.
        guards: what the guards measured.
        relative_change: of the last edit of each layer, by layer index.
        held_at: the optimizer step at which a fact's new target was last generated, by ``<name>/<key>``.
        lost_at: the optimizer step of the first validation since then at which it was not.
        edits: number of edits.
    """

    rows: tuple[FactRow, ...] = ()
    retention: tuple[Retention, ...] = ()
    guards: tuple[Guard, ...] = ()
    relative_change: dict[int, float] = field(default_factory=dict)
    held_at: dict[str, int] = field(default_factory=dict)
    lost_at: dict[str, int] = field(default_factory=dict)
    edits: int = 0

    def with_edit(self, event: EditEvent) -> Self:
        """Add an edit."""
        result, edits = event.result, self.edits + 1
        rows, held = [], {}
        broken = "; ".join(str(figure) for figure in event.guards if figure.is_broken)
        undone = f"a guard undid the edit, {broken}" if broken and not result.kept else None
        for t, fact in enumerate(result.facts):
            reason = event.reasons.get(fact.key, undone)
            row = FactRow(
                key=fact.key,
                subject=fact.subject,
                prompt=fact.prompt,
                target_new=fact.target_new,
                target_true=fact.target_true,
                edit=edits,
                kept=result.kept,
                measured={moment: found[t] for moment, found in event.measured.items()},
                reason=None if reason is None else str(reason),
                name=event.name,
                epoch=event.epoch,
                step=event.step,
            )
            rows.append(row)
            if reason is None and result.kept:
                held[_place(row.name, row.key)] = event.step
        guards = (Guard(f.name, f.limit, f.value, f.is_broken, edits, f.meaning) for f in event.guards)
        change = result.relative_change if result.kept else {}
        return replace(
            self,
            rows=(*(_replaced(row, result, edits) for row in self.rows), *rows),
            guards=(*self.guards, *guards),
            relative_change=self.relative_change | change,
            held_at=self.held_at | held,
            edits=edits,
        )

    def with_retention(self, event: RetentionEvent) -> Self:
        """Add what a validation found to be left."""
        metrics = {
            name if event.name is None else f"{event.name}/{name}": value
            for name, value in event.evaluation.metrics.items()
            if value == value
        }
        # the callbacks of a trainer measure one after the other
        earlier = self.retention
        if earlier and (earlier[-1].epoch, earlier[-1].step) == (event.epoch, event.step):
            earlier, metrics = earlier[:-1], earlier[-1].metrics | metrics
        exact = list(zip(event.facts, event.evaluation.edits_exact.tolist(), strict=True))
        held = {_place(event.name, fact.key): event.step for fact, holds in exact if holds}
        lost = {_place(event.name, fact.key): event.step for fact, holds in exact if not holds}
        retention = (*earlier, Retention(event.epoch, event.step, metrics))
        return replace(
            self,
            retention=retention,
            held_at=self.held_at | held,
            lost_at={place: step for place, step in (lost | self.lost_at).items() if place not in held},
        )

    def with_end(
        self,
        name: str | None,
        facts: Sequence[Fact],
        measured: Iterable[Measured],
        step: int,
        contradictions: Mapping[str, str],
    ) -> Self:
        """Add the measurements at the end of the run.

        Args:
            name: name of the callback that edited the facts.
            facts: the facts.
            measured: their measurements.
            step: optimizer steps done.
            contradictions: by fact key, a training text with the old answer.
        """
        found = dict(zip((fact.key for fact in facts), measured, strict=True))
        return replace(
            self,
            rows=tuple(
                self._ended(row, found[row.key], step, contradictions) if row.name == name and row.key in found else row
                for row in self.rows
            ),
        )

    def _ended(self, row: FactRow, end: Measured, step: int, contradictions: Mapping[str, str]) -> FactRow:
        after, reason = row.measured.get("after"), row.reason
        if not row.kept:  # no record was kept of the neighbours that were answered right before
            end = replace(end, neighbours=(0, 0))
        if end.holds:
            reason = None
        elif row.kept and after is not None and after.holds:
            if row.key in contradictions:
                reason = str(contradicted_reason(contradictions[row.key], row.step))
            else:
                place = _place(row.name, row.key)
                reason = str(undone_reason(self.held_at.get(place), self.lost_at.get(place, step)))
        return replace(row, measured={**row.measured, "end": end}, reason=reason)

    def state(self) -> dict[str, Any]:
        """Return the history as plain values."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def of_state(cls, where: str, state: object) -> Self:
        """Make a history from the result of :meth:`state`.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        found: Self = restored(cls, state, f"{where}, history")
        return found


def _replaced(row: FactRow, result: EditResult, edit: int) -> FactRow:
    """Note in the row of an earlier edit that this one has given its prompt another target."""
    is_replaced = result.kept and row.kept and row.replaced_by is None
    is_replaced = is_replaced and any(own.prompt == row.prompt and own.key != row.key for own in result.facts)
    return replace(row, replaced_by=edit, reason=None) if is_replaced else row


def _place(name: str | None, key: str) -> str:
    return f"{name or ''}/{key}"
