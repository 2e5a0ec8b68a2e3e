"""The measurements of a report, which survive in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lit_moeedit.callbacks.history import History
from lit_moeedit.callbacks.listener import EditEvent
from lit_moeedit.callbacks.totals import EditTotals, FactSums, plain_sums, read_fact_sums, read_totals
from lit_moeedit.checkpoint_fields import check_fields
from lit_moeedit.editing.phases import EVALUATION


@dataclass
class Measurements:
    """Everything that was measured of the edits in the weights of one model, as plain values.

    Attributes:
        totals: sums over the edits of each callback.
        final: metrics at the end of training, by the label of the editing callback.
        final_by_fact: their sums fact by fact, by the same label.
        history: the measurements of each fact.
        perplexity: perplexity by moment.
        failed: by name of a measurement that failed, its error.
        seconds: duration of the fits before this one, which it resumes.
    """

    totals: list[EditTotals] = field(default_factory=list)
    final: dict[str, dict[str, float]] = field(default_factory=dict)
    final_by_fact: dict[str, FactSums] = field(default_factory=dict)
    history: History = field(default_factory=History)
    perplexity: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def totals_of(self, name: str | None) -> EditTotals:
        """Return the sums over the edits of the callback of this name."""
        found = next((totals for totals in self.totals if totals.name == name), None)
        if found is None:
            found = EditTotals(name)
            self.totals.append(found)
        return found

    def add_edit(self, event: EditEvent, seconds: float) -> None:
        """Add an edit, with seconds of evaluation after it that the event does not have."""
        result = event.result
        spent = {**event.seconds, **result.seconds}
        spent[EVALUATION] = spent.get(EVALUATION, 0.0) + seconds
        metrics = event.before.metrics, event.after.metrics
        by_fact = {"before": plain_sums(event.before.by_fact), "after": plain_sums(event.after.by_fact)}
        totals = self.totals_of(event.name)
        totals.add(len(result.facts), result.kept, *metrics, spent, event.memory, by_fact)
        self.history = self.history.with_edit(event)

    def state(self) -> dict[str, Any]:
        """Return the measurements as plain values."""
        plain = {
            "totals": [totals.state() for totals in self.totals],
            "final": self.final,
            "history": self.history.state(),
            "perplexity": self.perplexity,
            "seconds": self.seconds,
        }
        further = {"final_by_fact": self.final_by_fact, "failed": self.failed}
        return plain | {name: value for name, value in further.items() if value}

    @classmethod
    def of_state(cls, where: str, state: Mapping[str, Any]) -> Self:
        """Make measurements from the result of :meth:`state`, of this or of an earlier version.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        totals = read_totals(where, state)
        numbers = {str: (int, float)}
        shapes: dict[str, Any] = {"history": dict, "perplexity": numbers, "failed": {str: str}, "final": {str: numbers}}
        # before there were totals there were neither seconds nor metrics at the end of training
        check_fields(where, state, ("failed", "final", "seconds", "history"), **shapes, seconds=(int, float))
        return cls(
            totals,
            dict(state.get("final") or {}),
            read_fact_sums(where, state, "final_by_fact"),
            # that of an earlier version has no history
            History.of_state(where, state.get("history") or {}),
            dict(state["perplexity"]),
            dict(state.get("failed") or {}),
            state.get("seconds") or 0.0,
        )
