"""What callbacks do around an edit under ``ModelParallelStrategy``: replay, hold, renewals, survival curve, autopsy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditHold, EditReplay, EditReport, KnowledgeEditing
from lit_moeedit.editing import EditMemory
from lit_moeedit.models.experts import find_model
from lit_moeedit.sharding.backends import settle
from tests.callbacks.conftest import _data, _editor, _module, _trainer
from tests.callbacks.test_fsdp2_runs import full, same, strategy
from tests.processes import run_ranks

KINDS: dict[str, dict[str, Any]] = {
    "rows": {"share": 0.2},
    "a forward of their own": {"share": 0.2, "weight": 0.5},
}


def keepers(kinds: list[str]) -> list[Any]:
    """Callbacks that keep edits while the run trains on."""
    return [EditHold(rows=2) if kind == "hold" else EditReplay(**KINDS[kind]) for kind in kinds]


def weights(module: L.LightningModule) -> dict[str, Any]:
    settle(find_model(module))
    return {key: full(parameter) for key, parameter in module.named_parameters()}


def both_further_forwards(folder: str) -> list[dict[str, Any]]:
    """An edit, and three steps with two further forwards each, under DDP and FSDP2; the upper layer is not edited."""
    found = []
    for name in ("ddp", "fsdp2"):
        editing = KnowledgeEditing(_editor(steps=12), on_failure="keep", survival_every_n_steps=None)
        callbacks = [editing, *keepers(["a forward of their own", "hold"])]
        changes: dict[str, Any] = {"devices": 2, "max_steps": 3, "max_epochs": -1, "limit_val_batches": 0}
        trainer = _trainer(f"{folder}/{name}", callbacks, strategy=strategy(name), **changes)
        module = _module(config={"num_hidden_layers": 3})
        trainer.fit(module, _data(batch_size=4, samples_per_epoch=32))
        distance = float(trainer.logged_metrics["hold/distance"])
        found.append({"weights": weights(module), "held": callbacks[2].held, "distance": distance})
    return found


@pytest.mark.slow
def test_further_forwards_in_a_step_train_as_under_ddp(tmp_path: Path) -> None:
    for ddp, fsdp2 in run_ranks(both_further_forwards, 2, str(tmp_path), group=False):
        assert fsdp2["held"] == ddp["held"] != frozenset()
        assert fsdp2["distance"] == ddp["distance"] > 0
        # the sum of two ranks' gradients has one order
        assert same(fsdp2["weights"], ddp["weights"])


def fit(name: str, folder: str, kind: str, precision: Any, checkpoint: str | None = None) -> dict[str, Any]:
    """Train for four epochs of four steps, edit before the second, measure and renew by need every four steps."""
    torch.use_deterministic_algorithms(True)
    editing = KnowledgeEditing(
        _editor(steps=12, memory=EditMemory()),
        at={"epoch": 1},
        on_failure="keep",
        renew_below=0.95,
        survival_every_n_steps=4,
    )
    kept = ModelCheckpoint(Path(folder) / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callbacks = [editing, *keepers([kind]), EditReport(console=False, autopsy=True), kept]
    changes: dict[str, Any] = {"devices": 2, "max_epochs": 4, "precision": precision}
    trainer = _trainer(folder, callbacks, strategy=strategy(name), **changes)
    module = _module(config={"num_hidden_layers": 3})
    trainer.fit(module, _data(batch_size=4), ckpt_path=checkpoint, weights_only=True)
    return {"weights": weights(module), "points": editing.survival.points, "renewals": editing.renewals}


def all_fits(folder: str, kind: str, precision: Any) -> dict[str, Any]:
    found = {name: fit(name, f"{folder}/{name}", kind, precision) for name in ("ddp", "fsdp2")}
    checkpoint = f"{folder}/fsdp2/kept/epoch=1.ckpt"
    return found | {"resumed": fit("fsdp2", f"{folder}/resumed", kind, precision, checkpoint)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("rows", "32-true"), ("a forward of their own", "bf16-mixed"), ("hold", "32-true"), ("hold", "bf16-mixed")],
)
def test_edits_are_kept_renewed_and_examined_as_under_ddp(tmp_path: Path, kind: str, precision: Any) -> None:
    for rank in run_ranks(all_fits, 2, str(tmp_path), kind, precision, group=False):
        ddp, fsdp2, resumed = (rank[name] for name in ("ddp", "fsdp2", "resumed"))
        for run in (fsdp2, resumed):
            assert run["points"] == ddp["points"] and run["renewals"] == ddp["renewals"]
            assert same(run["weights"], ddp["weights"])
        assert len(ddp["points"]) >= 4 and ddp["renewals"] >= 1
    reports = [json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8")) for name in ("ddp", "fsdp2")]
    ddp, fsdp2 = (report["autopsy"] for report in reports)
    for part in ddp["parts"]:
        part["moved"] = pytest.approx(part["moved"], rel=1e-5)  # sums of float32 in another order
    assert len(ddp["parts"]) == 8 and fsdp2 == ddp
