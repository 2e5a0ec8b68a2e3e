"""Whole runs on a device: the trainer, the module with its metrics, and the callbacks."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.editing import PHASES, EditMemory
from lit_moeedit.editing.phases import EVALUATION
from tests.devices import PEAK

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "callbacks used to create the checkpoint",
        "in eval mode at the start",
        "logs directory",
        "not resumable",
    )
]


class NoDriver(CPUAccelerator):
    """The accelerator of a device that is not there."""

    def setup_device(self, device: torch.device) -> None:
        pass


class TheModelAlone(SingleDeviceStrategy):
    """Moves the parameters of the module and nothing else, as DeepSpeed does."""

    def model_to_device(self) -> None:
        assert self.model is not None
        for child in self.model.children():
            if any(True for _ in child.parameters()):
                child.to(self.root_device)


def _run(tiny, make_trainer, folder: Any, strategy: SingleDeviceStrategy, ckpt: Any = None) -> dict[str, Any]:
    editor = tiny.editor(memory=EditMemory())
    editing = KnowledgeEditing(editor, at={"step": 2}, renew_every_n_steps=3, on_failure="keep")
    kept = ModelCheckpoint(folder / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks: list[L.Callback] = [editing, RoutingMonitor(), EditReport(console=False), kept]
    module = tiny.module()
    trainer = make_trainer(folder, callbacks, accelerator=NoDriver(), strategy=strategy, devices="auto", max_epochs=2)
    places = set()

    class Looking(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            places.update(parameter.device for parameter in pl_module.parameters())

    trainer.callbacks.append(Looking())
    trainer.fit(module, tiny.data(), ckpt_path=ckpt, weights_only=None if ckpt is None else True)
    assert places == {strategy.root_device}
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for name in ("after", "perplexity"):
        found |= {f"{name}/{key}": value for key, value in summary[name].items() if value is not None}
    is_there = strategy.root_device.type == "cuda"
    assert summary["memory"] == (dict.fromkeys((EVALUATION, *PHASES), PEAK) if is_there else {})
    return found | {"renewals": editing.renewals}


def test_a_run_in_which_only_the_model_is_moved(cuda, tiny, make_trainer, tmp_path) -> None:
    found = _run(tiny, make_trainer, tmp_path, TheModelAlone(cuda))
    assert found["renewals"] >= 1 and found["val/perplexity"] > 1


@pytest.mark.slow
def test_a_run_is_that_on_the_cpu(cuda, tiny, make_trainer, tmp_path) -> None:
    plain = _run(tiny, make_trainer, tmp_path / "plain", SingleDeviceStrategy(torch.device("cpu")))
    there = _run(tiny, make_trainer, tmp_path / "there", SingleDeviceStrategy(cuda))
    # a few training steps and target steps, each of which may sum in another order
    assert there == pytest.approx(plain, rel=1e-3, abs=1e-3, nan_ok=True)
    kept = tmp_path / "there" / "kept" / "epoch=0.ckpt"
    resumed = _run(tiny, make_trainer, tmp_path / "resumed", SingleDeviceStrategy(cuda), kept)
    assert resumed["train/loss"] == pytest.approx(there["train/loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_runs_without_training(cuda, tiny, make_trainer, tmp_path, stage: str) -> None:
    callbacks = [KnowledgeEditing(tiny.editor(), at="validation"), RoutingMonitor(), EditReport(console=False)]
    strategy = SingleDeviceStrategy(cuda)
    trainer = make_trainer(tmp_path, callbacks, accelerator=NoDriver(), strategy=strategy, devices="auto")
    getattr(trainer, stage)(tiny.module(), tiny.data(), verbose=False)
    assert trainer.callback_metrics["edit/efficacy"] > 0
