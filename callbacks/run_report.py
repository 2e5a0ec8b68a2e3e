"""The report of a run, from a history, a summary and the callbacks, as plain values of ``lit_moeedit.reports``."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning as L

from lit_moeedit.callbacks.edit_hold import EditHold
from lit_moeedit.callbacks.edit_replay import EditReplay
from lit_moeedit.callbacks.history import History
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.callbacks.summary import COSTS
from lit_moeedit.editing import Moment
from lit_moeedit.models.experts import UnsupportedModelError, find_model
from lit_moeedit.reports import Cost, LossByPart, MissingAutopsy, Model, Report, Routing
from lit_moeedit.reports.report import State
from lit_moeedit.sharding.shards import whole_shape

_MOMENTS: dict[str, Moment] = {"before": "before", "after": "after", "after_training": "end"}
_PACKAGES = ("lit-moeedit", "torch", "transformers", "lightning")


def make_report(
    state: State,
    started: datetime,
    history: History,
    summary: Mapping[str, Any],
    trainer: L.Trainer,
    model: Model,
) -> Report:
    """Make the report of a run as it is now.

    Args:
        state: state of the run.
        started: when it started.
        history: its edits, fact by fact.
        summary: the content of ``summary.json``.
        trainer: the trainer, of whose callbacks it tells.
        model: the model.
    """
    editings, monitors = callbacks_of(trainer, KnowledgeEditing), callbacks_of(trainer, RoutingMonitor)
    replays, holds = callbacks_of(trainer, EditReplay), callbacks_of(trainer, EditHold)
    routing = monitors[0].last_edit if monitors else {}
    seconds = summary["seconds"]
    return Report(
        model=model,
        state=state,
        started=started,
        ended=datetime.now(started.tzinfo),
        rows=history.rows,
        metrics=_metrics(summary),
        intervals=_intervals(summary),
        edited_layers=tuple(sorted({index for editing in editings for index in editing.editor.layers})),
        relative_change=history.relative_change,
        routing=_routing(routing) if routing else None,
        retention=history.retention,
        costs=tuple(Cost(phase, seconds[phase], summary["memory"].get(phase)) for phase in COSTS if seconds[phase] > 0),
        survival=tuple(point for editing in editings for point in editing.survival.points),
        survivors={editing.name or "": editing.survivors for editing in editings if editing.survivors is not None},
        replay={replay.name or "": replay.replayed for replay in replays if replay.replayed is not None},
        hold={hold.name or "": hold.result for hold in holds if hold.result is not None},
        autopsy=LossByPart.of(summary.get("autopsy")),
        missing_autopsy=MissingAutopsy.of(summary.get("autopsy")),
        guards=history.guards,
        warnings=tuple(f"{name} could not be measured: {text}" for name, text in summary.get("failed", {}).items()),
        settings={
            **{editing.label: _settings(editing) for editing in editings},
            **{replay.label: replay.settings for replay in replays},
            **{hold.label: hold.settings for hold in holds},
        },
        versions=_versions(),
    )


def _metrics(summary: Mapping[str, Any]) -> dict[Moment, dict[str, float]]:
    found: dict[Moment, dict[str, float]] = {}
    for name, moment in _MOMENTS.items():
        values = {**(summary[name] or {}), "perplexity": summary["perplexity"][name]}
        known = {key: value for key, value in values.items() if value is not None and not math.isnan(value)}
        if known:
            found[moment] = known
    return found


def _intervals(summary: Mapping[str, Any]) -> dict[Moment, dict[str, tuple[float, float]]]:
    found = {moment: summary["intervals"][name] for name, moment in _MOMENTS.items()}
    return {
        moment: {name: (low, high) for name, (low, high) in bounds.items()}
        for moment, bounds in found.items()
        if bounds
    }


def describe_model(module: L.LightningModule) -> Model:
    """Describe the model in a module, whose weights must be there."""
    try:
        model = find_model(module)
    except UnsupportedModelError:
        return Model()
    count = sum(whole_shape(parameter).numel() for parameter in model.parameters())
    name, family = getattr(model.config, "_name_or_path", ""), getattr(model.config, "model_type", None)
    return Model(name or type(model).__name__, family, count)


def _routing(metrics: Mapping[str, float]) -> Routing:
    def by_layer(kind: str) -> dict[int, float]:
        beginning = f"{kind}/layer_"
        return {int(k.removeprefix(beginning)): value for k, value in metrics.items() if k.startswith(beginning)}

    return Routing(metrics.get("similarity/mean"), metrics.get("kl/mean"), by_layer("similarity"), by_layer("kl"))


def _settings(editing: KnowledgeEditing) -> dict[str, Any]:
    """Return the settings of a callback that tell how its edits were made, as plain values."""
    editor = editing.editor
    return {
        "method": editor.name,
        "at": str(editing.schedule),
        "on_failure": editing.on_failure,
        "renewal": {name: value for name, value in vars(editing.renewal).items() if value is not None},
        "survival": vars(editing.curve),
        "guards": {name: value for name, value in vars(editing.guards).items() if value},
        "editor": {name: _plain(value) for name, value in vars(editor).items() if not name.startswith("_")},
    }


def _plain(value: Any, depth: int = 3) -> Any:
    """Return a setting as plain values: an object as its public settings, of what has none the name of its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, int | float | str) for item in value):
        return list(value)
    public = {name: item for name, item in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if not depth or not public:
        return type(value).__name__
    return {"class": type(value).__name__, **{name: _plain(item, depth - 1) for name, item in public.items()}}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            continue
    return found
