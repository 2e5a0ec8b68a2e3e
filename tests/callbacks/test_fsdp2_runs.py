"""Runs of the Trainer under ``ModelParallelStrategy``: edits in the middle of `fit`, checkpoints and resumes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_moeedit.callbacks import EditReplay, EditReport, KnowledgeEditing, RoutingMonitor
from tests.processes import run_ranks


def strategy(name: str) -> Any:
    """Lightning's, for two processes of a CPU; DDP in the same processes is what it is compared with."""
    return name if name == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def full(weight: Any) -> Tensor:
    whole: Tensor = weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()
    return whole.float().clone()


def fit(name: str, folder: str, edits: bool = True, checkpoint: str | None = None, **changes: Any) -> dict[str, Any]:
    """Train for three epochs and edit before the second, with replay, monitor and report; keep all checkpoints."""
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    torch.use_deterministic_algorithms(True)
    editing = KnowledgeEditing(_editor(), at={"epoch": 1}, max_perplexity_ratio=1e6, min_routing_similarity=1e-6)
    monitor = RoutingMonitor(probe=["The capital of Italy is Rome."])
    kept = ModelCheckpoint(Path(folder) / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks: list[Any] = [editing, EditReplay(), monitor, EditReport(console=False), kept] if edits else []
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    trainer = _trainer(folder, callbacks, strategy=strategy(name), devices=size, max_epochs=3, **changes)
    module, data = _module(), _data(batch_size=4, samples_per_epoch=16)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    weights = {key: full(weight) for key, weight in module.named_parameters()}
    found = {"weights": weights, "logged": {key: float(value) for key, value in trainer.callback_metrics.items()}}
    if edits:
        found |= {
            "state": editing.state_dict(),
            "calls": len(editing.editor.calls),
            "metrics": editing.evaluate(module).metrics,
            "routing": monitor.last_edit,
        }
    return found


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of all weights, relative to their size."""
    difference = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return (difference / sum(float(value.square().sum()) for value in first.values())) ** 0.5


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def adapted(name: str, folder: str) -> dict[str, Any]:
    """A run that trains LoRA of the attention on a frozen base, which is edited before the second of two epochs."""
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    editing = KnowledgeEditing(_editor(), at={"epoch": 1})
    trainer = _trainer(folder, [editing], strategy=strategy(name), devices=2, max_epochs=2)
    module = _module(adapter={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    trainer.fit(module, _data(batch_size=4, samples_per_epoch=16))
    return {key: full(weight) for key, weight in module.named_parameters()}


def validated_in_inference_mode(folder: str) -> str:
    """What the callback says where Lightning would evaluate in inference mode: everywhere but with gloo."""
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    trainer = _trainer(folder, [KnowledgeEditing(_editor(), at="validation")], strategy=strategy("fsdp2"), devices=2)
    with patch("lit_moeedit.callbacks.resources.dist", SimpleNamespace(get_backend=lambda: "nccl")):
        try:
            trainer.validate(_module(), _data(batch_size=4))
        except MisconfigurationException as error:
            return str(error)
    return "validated"


def several(folder: str) -> dict[str, Any]:
    return {
        "ddp": fit("ddp", f"{folder}/ddp", gradient_clip_val=0.5),
        "fsdp2": fit("fsdp2", f"{folder}/fsdp2", gradient_clip_val=0.5),
    }


def test_inference_mode_is_refused(tmp_path: Path) -> None:
    for message in run_ranks(validated_in_inference_mode, 2, str(tmp_path), group=False):
        assert message.startswith("KnowledgeEditing: under FSDP2 no forward outside of inference mode")


# test_fsdp2_adapters has a run with an edit and a resume in the default suite
@pytest.mark.slow
def test_a_run_edits_and_trains_as_under_ddp(tmp_path: Path) -> None:
    found = run_ranks(several, 2, str(tmp_path), group=False)
    for rank in found:
        run, ddp = rank["fsdp2"], rank["ddp"]
        assert run["calls"] == 1
        assert len(run["state"]["applied"]) == 6
        assert run["logged"].keys() == ddp["logged"].keys()
        assert same(run["weights"], found[0]["fsdp2"]["weights"])
        # float32 in another order, through four steps of Adam, whose first ones have the size of the learning rate
        # whatever the gradient's
        assert distance(run["weights"], ddp["weights"]) < 0.01
        assert run["metrics"] == pytest.approx(ddp["metrics"], abs=0.2, nan_ok=True)
        assert run["routing"].keys() == ddp["routing"].keys()
    assert (tmp_path / "fsdp2" / "summary.json").exists()


def plain_and_adapted(folder: str) -> dict[str, Any]:
    found = {}
    for name in ("ddp", "fsdp2"):
        found[name] = fit(name, f"{folder}/{name}", edits=False, gradient_clip_val=0.5)["weights"]
        found[f"adapted {name}"] = adapted(name, f"{folder}/adapted_{name}")
    return found


@pytest.mark.slow
def test_training_and_adapters_are_those_of_ddp(tmp_path: Path) -> None:
    for rank in run_ranks(plain_and_adapted, 2, str(tmp_path), group=False):
        # the norm is summed in another order
        assert distance(rank["fsdp2"], rank["ddp"]) < 1e-5
        assert distance(rank["adapted fsdp2"], rank["adapted ddp"]) < 1e-4


def resumed(folder: str, precision: str) -> list[dict[str, Any]]:
    """An uninterrupted run, and those that begin with its checkpoints before and after the edit."""
    runs = [fit("fsdp2", f"{folder}/whole", precision=precision)]
    for epoch in (0, 1):
        checkpoint = f"{folder}/whole/kept/epoch={epoch}.ckpt"
        runs.append(fit("fsdp2", f"{folder}/from_{epoch}", checkpoint=checkpoint, precision=precision))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    for whole, before, after in run_ranks(resumed, 2, str(tmp_path), precision, group=False):
        assert (whole["calls"], before["calls"], after["calls"]) == (1, 1, 0)
        for run in (before, after):
            assert run["state"] == whole["state"]
            assert same(run["weights"], whole["weights"])
