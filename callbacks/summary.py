"""The content of ``summary.json``, from what was measured and what the callbacks of a run know."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L

from lit_moeedit.callbacks.edit_hold import EditHold
from lit_moeedit.callbacks.edit_replay import EditReplay
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.measurements import Measurements
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.callbacks.totals import EditTotals, intervals_of, joined, mean_metrics, mean_of
from lit_moeedit.editing import PHASES
from lit_moeedit.editing.phases import EVALUATION, LOCATE, OTHER

MOMENTS = ("before", "after", "after_training")
COSTS = (LOCATE, EVALUATION, *PHASES, OTHER)
"""Phases of an edit and around it; their seconds add up to all that the edit took."""


def summarize(measured: Measurements, trainer: L.Trainer, seconds: float) -> dict[str, Any]:
    """Compute the content of ``summary.json``, see :meth:`lit_moeedit.callbacks.EditReport.summary`.

    Args:
        measured: what was measured.
        trainer: the trainer, of whose callbacks it tells.
        seconds: duration of the fit.
    """
    editings, monitors = callbacks_of(trainer, KnowledgeEditing), callbacks_of(trainer, RoutingMonitor)
    replays, holds = callbacks_of(trainer, EditReplay), callbacks_of(trainer, EditHold)
    routing = summarize_routing(monitors[0].last_edit if monitors else {})
    edited = (index for editing in editings for index in editing.editor.layers)
    routing["first_edited_layer"] = min(edited, default=None)
    if len(monitors) > 1:
        routing["monitors"] = {monitor.label: summarize_routing(monitor.last_edit) for monitor in monitors[1:]}
    edits = measured.totals
    phases = {name: sum(totals.seconds.get(name, 0.0) for totals in edits) for name in (*COSTS, "edit")}
    memory = {name: max((totals.memory.get(name, 0) for totals in edits), default=0) for name in COSTS}
    summary = {
        **_summarize_edits(measured, editings, edits),
        "routing": routing,
        "perplexity": {moment: measured.perplexity.get(moment) for moment in MOMENTS},
        "seconds": {"fit": seconds, **phases},
        "memory": {name: peak for name, peak in memory.items() if peak},
        "renewals": sum(editing.renewals for editing in editings),
        "survival": [asdict(point) for editing in editings for point in editing.survival.points],
        "survivors": {e.name or "": asdict(e.survivors) for e in editings if e.survivors is not None},
        "replay": {r.name or "": asdict(r.replayed) for r in replays if r.replayed is not None},
        "hold": {h.name or "": asdict(h.result) for h in holds if h.result is not None},
        "intervals": _intervals(measured, editings, edits),
    }
    if len(editings) > 1:
        summary["editors"] = {
            editing.label: {
                **_summarize_edits(measured, [editing], [totals for totals in edits if totals.name == editing.name]),
                "renewals": editing.renewals,
                "intervals": _intervals(measured, [editing], [t for t in edits if t.name == editing.name]),
            }
            for editing in editings
        }
    return summary


def summarize_routing(shift: Mapping[str, float]) -> dict[str, Any]:
    """Select from the routing metrics of an edit, ``None`` for those that were not measured."""
    layers = {k.rpartition("_")[2]: value for k, value in shift.items() if k.startswith("similarity/layer")}
    return {"similarity": shift.get("similarity/mean"), "kl": shift.get("kl/mean"), "per_layer": layers}


def without_nan(value: Any) -> Any:
    """Replace every number that is not finite, which JSON does not know, by ``None``."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _summarize_edits(
    measured: Measurements, editings: Sequence[KnowledgeEditing], edits: Sequence[EditTotals]
) -> dict[str, Any]:
    final = {e.label: (len(e.applied_facts), measured.final.get(e.label)) for e in editings if e.applied_facts}
    known = [
        (facts, metrics, measured.final_by_fact.get(label, {}))
        for label, (facts, metrics) in final.items()
        if metrics is not None
    ]
    # a measurement that failed cannot be left out of a mean
    is_whole = len(known) == len(final) > 0
    return {
        "edits": sum(totals.facts for totals in edits),
        "solver": ", ".join(dict.fromkeys(editing.editor.name for editing in editings)) or None,
        "place": editings[0].place if len(editings) == 1 else None,
        "before": mean_of(totals.before for totals in edits),
        "after": mean_of(totals.after for totals in edits),
        "after_training": mean_metrics(known) if is_whole else None,
    }


def _intervals(
    measured: Measurements, editings: Sequence[KnowledgeEditing], edits: Sequence[EditTotals]
) -> dict[str, dict[str, list[float]]]:
    """Compute by moment the 95 % bootstrap intervals over all facts, of the metrics that are means over facts."""
    found = {moment: joined(totals.by_fact.get(moment, {}) for totals in edits) for moment in MOMENTS[:2]}
    labels = [editing.label for editing in editings if editing.applied_facts]
    # as for the metrics, nothing is said of a part
    is_whole = all(label in measured.final for label in labels)
    final = joined(measured.final_by_fact.get(label, {}) for label in labels if is_whole)
    return {moment: intervals_of(sums) for moment, sums in (found | {MOMENTS[2]: final}).items()}
