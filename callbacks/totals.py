"""Sums over the edits of a run, and the averages that they give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.editing import PHASES
from lit_moeedit.editing.by_fact import intervals
from lit_moeedit.editing.further import STATEMENTS

Sums = dict[str, list[float]]
"""By metric, its weight and its sum: over the facts for which it was measured, or over what counts of them."""
FactSums = dict[str, list[list[float]]]
"""By metric that is a mean over facts, what holds of each fact, and what counts."""


@dataclass
class EditTotals:
    """Sums over the edits of one callback, from which their averages and intervals are computed.

    Attributes:
        name: name of the callback.
        facts: number of facts edited, without those of undone edits.
        before: metrics before the edits.
        after: metrics after them.
        seconds: seconds of their phases.
        memory: peak of each phase's memory, in bytes, the highest of all edits.
        by_fact: by moment (``before``, ``after``), sums fact by fact. They alone grow with the number of facts.
    """

    name: str | None = None
    facts: int = 0
    before: Sums = field(default_factory=dict)
    after: Sums = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    by_fact: dict[str, FactSums] = field(default_factory=dict)

    def add(
        self,
        facts: int,
        kept: bool,
        before: Mapping[str, float],
        after: Mapping[str, float],
        seconds: Mapping[str, float],
        memory: Mapping[str, int] | None = None,
        by_fact: Mapping[str, FactSums] | None = None,
    ) -> None:
        """Add an edit of ``facts`` facts; a metric that was not measured (NaN) has no weight.

        With the sums ``by_fact`` of a moment, an edit has the weight of what counts in it, such as its paraphrases, so
        that averages over edits are those of all their facts together.
        """
        self.facts += facts if kept else 0
        for moment, sums, metrics in (("before", self.before, before), ("after", self.after, after)):
            known = (by_fact or {}).get(moment, {})
            for metric, value in metrics.items():
                counted, total = sums.setdefault(metric, [0, 0.0])
                own = _weight(metric, facts, known)
                if not math.isnan(value):
                    sums[metric] = [counted + own, total + own * value]
            if known:
                _add_sums(self.by_fact.setdefault(moment, {}), known)
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        for phase, peak in (memory or {}).items():
            self.memory[phase] = max(peak, self.memory.get(phase, 0))

    def state(self) -> dict[str, Any]:
        """Return the sums as plain values."""
        plain = asdict(self)
        return plain if self.by_fact else {name: value for name, value in plain.items() if name != "by_fact"}


def _weight(metric: str, facts: int, by_fact: FactSums) -> float:
    """Return the weight of a metric of some facts: how much counts of them, such as paraphrases, or their number."""
    is_by_fact = metric in by_fact and metric != STATEMENTS
    return sum(by_fact[metric][1]) if is_by_fact else facts


def plain_sums(by_fact: Mapping[str, Tensor]) -> FactSums:
    """Return sums of an evaluation as plain values."""
    return {name: sums.tolist() for name, sums in by_fact.items()}


def joined(parts: Iterable[FactSums]) -> FactSums:
    """Join sums over different facts.

    The statements of :data:`~lit_moeedit.editing.further.STATEMENTS` are the same ones each time, so theirs are added.

    Example:
        >>> joined([{"efficacy": [[1.0], [1.0]]}, {"efficacy": [[0.0], [1.0]]}])
        {'efficacy': [[1.0, 0.0], [1.0, 1.0]]}
        >>> joined([{STATEMENTS: [[1.0], [1.0]]}, {STATEMENTS: [[0.0], [1.0]]}])
        {'held_out_accuracy': [[1.0], [2.0]]}
    """
    found: FactSums = {}
    for part in parts:
        _add_sums(found, part)
    return found


def _add_sums(found: FactSums, part: FactSums) -> None:
    """Add sums to others in place."""
    for name, sums in part.items():
        earlier = found.setdefault(name, [[], []])
        if name == STATEMENTS and len(earlier[0]) == len(sums[0]):
            found[name] = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(earlier, sums, strict=True)]
        else:
            for one, two in zip(earlier, sums, strict=True):
                one.extend(two)


def read_fact_sums(where: str, state: Mapping[str, Any], name: str) -> dict[str, FactSums]:
    """Read sums fact by fact, by moment or label, of a state in a checkpoint; none if an earlier version wrote it.

    Raises:
        CheckpointError: naming the field that is not as it should be.
    """
    shape: Any = {str: {str: [[(int, float)]]}}
    check_fields(where, state, (name,), **{name: shape})
    found: dict[str, FactSums] = dict(state.get(name) or {})
    if any(len(sums) != 2 or len(sums[0]) != len(sums[1]) for part in found.values() for sums in part.values()):
        raise CheckpointError(f"{where}: field {name!r} should hold two lists of the same length each")
    return found


def intervals_of(sums: FactSums) -> dict[str, list[float]]:
    """Compute the intervals of metrics from sums fact by fact, see :func:`lit_moeedit.editing.by_fact.intervals`."""
    tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in sums.items()}
    return {name: list(bounds) for name, bounds in intervals(tensors).items()}


def read_totals(where: str, state: Mapping[str, Any]) -> list[EditTotals]:
    """Read the sums of a state in a checkpoint; older states have each edit by itself.

    Args:
        where: name of the state, for errors.
        state: the state.

    Raises:
        CheckpointError: naming the field that is not as it should be.
    """
    numbers = (int, float)
    metrics, sums = {str: numbers}, {str: [numbers]}
    is_old = "totals" not in state
    name = "edits" if is_old else "totals"
    shapes: dict[str, Any] = {name: [dict]}
    check_fields(where, state, **shapes)
    found: dict[str | None, EditTotals] = {}
    for index, entry in enumerate(state[name]):
        inner = f"{where}, {name}[{index}]"
        shape: Any = metrics if is_old else sums
        shapes = {"name": str, "facts": int, "before": shape, "after": shape, "seconds": metrics, "memory": {str: int}}
        check_fields(inner, entry, ("name", "memory"), **shapes)
        if not entry["seconds"].keys() >= {*PHASES, "edit"}:
            raise CheckpointError(f"{inner} should hold the seconds of {', '.join((*PHASES, 'edit'))}")
        totals = found.setdefault(entry.get("name"), EditTotals(entry.get("name")))
        if is_old:
            check_fields(inner, entry, kept=bool)
            totals.add(*(entry[field] for field in ("facts", "kept", "before", "after", "seconds")))
            continue
        if any(len(pair) != 2 for part in ("before", "after") for pair in entry[part].values()):
            raise CheckpointError(f"{inner}: fields 'before' and 'after' should hold a number of facts and a sum each")
        totals.facts, totals.seconds = entry["facts"], dict(entry["seconds"])
        totals.before, totals.after = dict(entry["before"]), dict(entry["after"])
        totals.memory = dict(entry.get("memory") or {})
        totals.by_fact = read_fact_sums(inner, entry, "by_fact")
    return list(found.values())


def mean_of(parts: Iterable[Sums]) -> dict[str, float]:
    """Average metrics over the facts of several sums; NaN for what was not measured at all.

    Example:
        >>> mean_of([{"efficacy": [1, 1.0], "score": [0, 0.0]}, {"efficacy": [3, 0.0]}])
        {'efficacy': 0.25, 'score': nan}
    """
    means: dict[str, list[float]] = {}
    for sums in parts:
        for metric, (counted, total) in sums.items():
            before = means.get(metric, [0, 0.0])
            means[metric] = [before[0] + counted, before[1] + total]
    return {metric: total / counted if counted else math.nan for metric, (counted, total) in means.items()}


def mean_metrics(parts: Sequence[tuple[int, Mapping[str, float], FactSums]]) -> dict[str, float]:
    """Average metrics over parts of the facts, with the weights of :meth:`EditTotals.add`.

    Args:
        parts: number of facts, their metrics, and sums of these fact by fact, as far as they are known; a part for
            which nothing was counted (NaN) has no weight.

    Example:
        >>> one = (1, {"score": 1.0, "generalization": 0.0}, {"generalization": [[0.0], [4.0]]})
        >>> two = (3, {"score": 0.0, "generalization": 1.0}, {"generalization": [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]})
        >>> mean_metrics([one, two])
        {'score': 0.25, 'generalization': 0.2}
    """
    means = {}
    for name in dict.fromkeys(name for _, metrics, _ in parts for name in metrics):
        counted = [
            (_weight(name, facts, by_fact), metrics[name])
            for facts, metrics, by_fact in parts
            if not math.isnan(metrics.get(name, math.nan))
        ]
        total = sum(weight for weight, _ in counted)
        means[name] = sum(weight / total * value for weight, value in counted) if total else math.nan
    return means
