"""Runs of the Trainer under ``ModelParallelStrategy``: edits in the middle of `fit`, checkpoints and resumes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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


def several(folder: str) -> dict[str, Any]:
    return {
        "plain ddp": fit("ddp", f"{folder}/plain_ddp", edits=False, gradient_clip_val=0.5),
        "plain": fit("fsdp2", f"{folder}/plain", edits=False, gradient_clip_val=0.5),
        "ddp": fit("ddp", f"{folder}/ddp"),
        "fsdp2": fit("fsdp2", f"{folder}/fsdp2"),
    }


def test_a_run_edits_and_trains_as_under_ddp(tmp_path: Path) -> None:
    found = run_ranks(several, 2, str(tmp_path), group=False)
    for rank in found:
        # the norm is summed in another order
        assert distance(rank["plain"]["weights"], rank["plain ddp"]["weights"]) < 1e-5
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
