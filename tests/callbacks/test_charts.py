"""What loggers get: charts that do not grow with the layers, a summary, heat maps, and the whole configuration."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.charts import log_place, log_summary


class Charts(Logger):
    """A logger of which every name is a chart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    name = version = "charts"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.names |= metrics.keys()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


@pytest.fixture
def charts_at(tiny: SimpleNamespace, make_trainer: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def run(layers: int) -> Any:
        module = tiny.module(config={**tiny.module().hparams["config"], "num_hidden_layers": layers})
        charts, table = Charts(), CSVLogger(tmp_path, name="table", version=str(layers))
        editing = KnowledgeEditing(tiny.editor(steps=1), on_failure="keep")
        monitor = RoutingMonitor()
        trainer = make_trainer(tmp_path, [editing, monitor], logger=[charts, table], log_every_n_steps=1)
        trainer.fit(module, tiny.data())
        with (Path(table.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
            columns = next(csv.reader(file))
        return SimpleNamespace(charts=charts.names, columns=columns, trainer=trainer, monitor=monitor)

    return run


def test_charts_do_not_grow_with_the_layers(charts_at: Callable[..., Any]) -> None:
    four, twelve = charts_at(4), charts_at(12)
    assert four.charts == twelve.charts and 10 < len(four.charts) <= 20
    # every metric can be monitored, and is in the CSV file
    for run, layers in ((four, 4), (twelve, 12)):
        names = {f"routing/{kind}/layer_{i}" for kind in ("similarity", "kl") for i in range(layers)}
        assert names <= run.trainer.callback_metrics.keys() and names <= set(run.columns)
        assert "edit/efficacy_accuracy" in run.trainer.callback_metrics
        assert {"edit_before/efficacy", "edit_after/efficacy", "routing_edit/kl/layer_3"} <= set(run.columns)


def test_a_heat_map_of_each_quantity_marks_the_edited_layers(charts_at: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    monitor = charts_at(3).monitor
    figures = monitor.heat_maps()
    assert set(figures) == {f"routing/{kind}_by_layer" for kind in ("similarity", "kl", "js", "load_entropy")}
    figure = figures["routing/kl_by_layer"]
    axes, colours = figure.axes
    assert axes.get_title() == "KL divergence of routing since the start of the run" and colours.get_ylabel() == "nats"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["edited ▸ 0", "edited ▸ 1", "2"]
    shown = axes.images[0].get_array()
    assert shown.shape == (3, len(monitor.history))
    assert float(shown[2, -1]) == pytest.approx(monitor.history[-1]["kl/layer_2"])
    # a resumed run goes on with them
    other = RoutingMonitor()
    other.load_state_dict(monitor.state_dict())
    assert other.history == monitor.history and other.edited_layers == [0, 1]


def test_a_moment_is_a_text_in_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: dict[str, str] = {}
    writer = SimpleNamespace(add_text=lambda name, text, step: texts.update({name: text}))
    logger = TensorBoardLogger.__new__(TensorBoardLogger)
    monkeypatch.setattr(TensorBoardLogger, "experiment", writer)
    metrics = {"edit_before/efficacy": 0.25, "edit_after/efficacy": 1.0, "routing_edit/kl/layer_1": 2.0}
    log_summary(SimpleNamespace(loggers=[logger], global_step=3), metrics)  # type: ignore[arg-type]
    assert texts.keys() == {"edit_before", "edit_after"} and "| efficacy | 0.25 |" in texts["edit_before"]
    # so is the place that was found, as hyperparameters are those of the start
    place = {"layers": [3, 4], "token": "last", "found": True}
    log_place(SimpleNamespace(loggers=[logger], global_step=3), "edit_late", place)  # type: ignore[arg-type]
    assert "| layers | [3, 4] |" in texts["edit_late_place"] and "| token | last |" in texts["edit_late_place"]


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_loggers_get_the_facts_and_the_place(
    tiny: SimpleNamespace, make_trainer: Callable[..., Any], tmp_path: Path, package: str
) -> None:
    pytest.importorskip(package)
    stored = f"sqlite:///{tmp_path}/runs.db"
    logger: Any = (
        MLFlowLogger(tracking_uri=stored, artifact_location=str(tmp_path))
        if package == "mlflow"
        else TensorBoardLogger(tmp_path)
    )
    editing = KnowledgeEditing(tiny.editor("auto", steps=2, token="auto"), on_failure="keep")
    trainer = make_trainer(tmp_path, [editing, RoutingMonitor(), EditReport(console=False)], logger=logger)
    trainer.fit(tiny.module(), tiny.data())
    place = editing.place
    if package == "mlflow":
        run = logger.experiment.get_run(logger.run_id).data
        assert run.params["edit_place/layers"] == str(place["layers"])
        assert (tmp_path / logger.run_id / "artifacts" / "edits.md").read_text(encoding="utf-8").count("\n|") == 7
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir)
    events.Reload()
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert f"| layers | {place['layers']} |" in texts["edit_place/text_summary"]
    assert texts["edits/text_summary"].count("\n|") == 7 and "| end |" in texts["edits/text_summary"]
