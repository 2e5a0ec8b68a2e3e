from __future__ import annotations

import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_moeedit.callbacks import KnowledgeEditing, RoutingMonitor

MEASURES = ("similarity", "kl", "js", "load_entropy")
PROBE = ["The capital of Peru is Lima.", "Who lives in the city eats bread.", "Norway"]


@pytest.fixture
def watched(tiny, make_trainer, tmp_path):
    """A monitor that has seen the start of a module's run."""
    module, monitor, data = tiny.module(), RoutingMonitor(PROBE), tiny.data()
    trainer = make_trainer(tmp_path, [monitor])
    trainer.validate(module, data, verbose=False)
    return trainer, module, monitor, data


def test_nothing_has_changed(watched):
    metrics = watched[0].callback_metrics
    assert {name.rpartition("/")[0] for name in metrics if name.startswith("routing/")} == {
        f"routing/{measure}" for measure in MEASURES
    }
    for measure in MEASURES:
        for suffix in ("mean", "layer_0", "layer_1"):
            assert f"routing/{measure}/{suffix}" in metrics
    for suffix in ("mean", "layer_0", "layer_1"):
        assert metrics[f"routing/similarity/{suffix}"] == 1
        assert metrics[f"routing/kl/{suffix}"] == pytest.approx(0, abs=1e-6)
        assert metrics[f"routing/js/{suffix}"] == pytest.approx(0, abs=1e-6)
        assert metrics[f"routing/load_entropy/{suffix}"] > 0


def test_other_routers_are_noticed(watched):
    trainer, module, _, data = watched
    with torch.no_grad():
        gate = module.model.model.layers[1].mlp.gate.weight
        gate.add_(torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)))
    trainer.validate(module, data, verbose=False)
    metrics = trainer.callback_metrics
    assert metrics["routing/similarity/layer_0"] == 1  # below the change
    assert metrics["routing/similarity/layer_1"] < 1
    assert metrics["routing/kl/layer_1"] > 1e-3
    assert metrics["routing/similarity/mean"] == pytest.approx((1 + float(metrics["routing/similarity/layer_1"])) / 2)


def test_the_state_survives_a_checkpoint(watched, tmp_path):
    _, module, monitor, _ = watched
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    other = RoutingMonitor(PROBE)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.last_edit == monitor.last_edit
    shift = other.compare(module, other._start, monitor._start)
    assert shift["similarity/mean"] == 1 and shift["kl/mean"] == pytest.approx(0, abs=1e-4)
    fresh = RoutingMonitor(PROBE)
    assert fresh.state_dict() == {}
    fresh.load_state_dict({})
    assert fresh._start is None


def test_a_resumed_run_compares_with_the_start_of_the_first(tiny, make_trainer, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(tmp_path / "whole", [RoutingMonitor(), kept], max_epochs=3)
    trainer.fit(tiny.module(learning_rate=0.02), tiny.data())
    resumed = make_trainer(tmp_path / "resumed", [RoutingMonitor()], max_epochs=3)
    resumed.fit(
        tiny.module(learning_rate=0.02),
        tiny.data(),
        ckpt_path=tmp_path / "kept" / "epoch=1.ckpt",
        weights_only=True,
    )
    for name, value in trainer.callback_metrics.items():
        if name.startswith("routing/"):
            assert float(resumed.callback_metrics[name]) == pytest.approx(float(value), abs=1e-4), name
    assert trainer.callback_metrics["routing/similarity/mean"] < 1


class LateStrategy(SingleDeviceStrategy):
    """Restores when a fit has started, as DeepSpeed's does."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


class Shift(L.Callback):
    """How far routing is from what a monitor takes for the start, when training starts."""

    def __init__(self, monitor):
        self.monitor, self.found = monitor, None

    def on_train_start(self, trainer, pl_module):
        self.found = self.monitor.compare(pl_module, self.monitor._start, self.monitor._trace(pl_module))


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory):
    """Checkpoints of a run without a monitor, and of one that watched ``PROBE``."""
    from tests.callbacks.conftest import _data, _module, _trainer

    folder = tmp_path_factory.mktemp("kept")
    for name, callbacks in (("unwatched", []), ("watched", [RoutingMonitor(PROBE)])):
        kept = ModelCheckpoint(folder, filename=name, save_on_train_epoch_end=True)
        _trainer(folder, [*callbacks, kept]).fit(_module(learning_rate=0.02), _data())
    return folder


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("name", "probe", "same"), [("unwatched", PROBE, True), ("watched", PROBE[:1], True), ("watched", PROBE, False)]
)
def test_where_a_resumed_run_starts(kept_runs, tiny, make_trainer, tmp_path, caplog, late, name, probe, same):
    monitor = RoutingMonitor(probe)
    shift = Shift(monitor)
    strategy = LateStrategy(torch.device("cpu")) if late else "auto"
    trainer = make_trainer(tmp_path, [monitor, shift], max_epochs=2, limit_train_batches=1, strategy=strategy)
    with caplog.at_level(logging.WARNING, "lit_moeedit"):
        trainer.fit(tiny.module(), tiny.data(), ckpt_path=kept_runs / f"{name}.ckpt", weights_only=True)
    # the weights of the checkpoint, or those that the first run began with
    assert (shift.found["kl/mean"] < 1e-6) is same
    assert ("are not those of the checkpoint" in caplog.text) is (name == "watched" and same)


def test_an_edit_is_measured_by_itself(tiny, make_trainer, tmp_path):
    monitor, editing = RoutingMonitor(max_texts=5), KnowledgeEditing(tiny.editor(layers=[0]), at="fit_start")
    trainer = make_trainer(tmp_path, [monitor, editing])
    assert monitor.figure() is None
    trainer.fit(tiny.module(), tiny.data())
    assert len(monitor._probe) == 5
    assert monitor.last_edit["similarity/layer_0"] == 1  # its router stands before its experts
    assert monitor.last_edit["kl/layer_1"] > 0
    text = (tmp_path / "logs" / "metrics.csv").read_text(encoding="utf-8").splitlines()[0]
    for measure in MEASURES:
        assert f"routing_edit/{measure}/mean" in text and f"routing_edit/{measure}/layer_1" in text


def test_the_figure_has_a_bar_for_each_layer(tiny, make_trainer, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    monitor = RoutingMonitor(PROBE)
    make_trainer(tmp_path, [KnowledgeEditing(tiny.editor()), monitor]).fit(tiny.module(), tiny.data())
    figure = monitor.figure()
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    for layer in (0, 1):
        assert pytest.approx(monitor.last_edit[f"similarity/layer_{layer}"]) in heights


def test_what_is_refused(tiny, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="max_texts must be at least 1, got 0"):
        RoutingMonitor(max_texts=0)
    data = tiny.data()
    data.probe_texts = data.preservation_texts = list
    with pytest.raises(MisconfigurationException, match="RoutingMonitor needs texts to watch"):
        make_trainer(tmp_path, [RoutingMonitor()]).fit(tiny.module(), data)
    module = tiny.module()
    data = tiny.data()
    data.setup("fit")
    loader = data.train_dataloader()
    with pytest.raises(MisconfigurationException, match="RoutingMonitor needs the model's tokenizer"):
        make_trainer(tmp_path, [RoutingMonitor(PROBE)]).fit(module, loader)
