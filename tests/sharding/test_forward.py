"""Under ZeRO stage 3 a model whose modules read each other's weights runs at any moment, before any training, too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_moeedit.callbacks import KnowledgeEditing, RoutingMonitor
from lit_moeedit.sharding.zero3_passes import gathering_on_use
from tests.large_models import SMALL_QWEN
from tests.processes import run_ranks

MOMENTS: dict[str, Any] = {"never": None, "validation": "validation", "fit_start": "fit_start", "epoch": {"epoch": 1}}


def run(moment: str, folder: str, ranks: int) -> dict[str, Any]:
    """Train or validate Qwen3.5's text model, with an edit at the moment; what was logged, and the weights' state."""
    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    module = _module(config={**SMALL_QWEN, "model_type": "qwen3_5_moe_text", "num_hidden_layers": 2})
    editing = KnowledgeEditing(_editor(steps=2), at=MOMENTS[moment] or "fit_start", on_failure="keep")
    monitor = RoutingMonitor(probe=["The capital of Italy is Rome."])
    strategy = DeepSpeedCPUStrategy(stage=3, param_persistence_threshold=0) if ranks > 1 else "auto"
    callbacks = [editing, monitor] if MOMENTS[moment] else []
    keys = {"max_epochs": 2, "num_sanity_val_steps": 0, "logger": False}
    trainer = _trainer(folder, callbacks, strategy=strategy, devices=ranks, **keys)
    data = _data(batch_size=8 // ranks, samples_per_epoch=16)
    if moment in ("never", "validation"):
        trainer.validate(module, data, verbose=False)
    else:
        trainer.fit(module, data)
    weights: list[Any] = list(module.model.parameters())  # type: ignore[union-attr]
    return {
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "routing": monitor.last_edit,
        "edited": len(editing.applied_facts),
        "gathered": [tuple(w.shape) for w in weights if ranks > 1 and w.ds_status.name != "NOT_AVAILABLE"],
        "open": [name for name, part in module.named_modules() if getattr(part._parameters, "_in_forward", False)],
    }


def run_all(folder: str) -> dict[str, Any]:
    return {moment: run(moment, f"{folder}/{moment}", 2) for moment in MOMENTS}


@pytest.mark.deepspeed
@pytest.mark.slow
def test_linear_attention_runs_and_is_edited_before_training(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    first, second = run_ranks(run_all, 2, str(tmp_path), group=False)
    for moment, found in first.items():
        assert found["gathered"] == found["open"] == second[moment]["gathered"] == [], moment
        assert found["logged"] == pytest.approx(second[moment]["logged"], nan_ok=True)
        if moment != "never":
            assert found["edited"] == 6 and found["routing"]["similarity/mean"] < 1
    for moment in ("never", "validation"):
        alone = run(moment, str(tmp_path / "alone"), 1)
        assert found_all(first[moment]) == pytest.approx(found_all(alone), rel=1e-3, abs=1e-4)


def found_all(found: dict[str, Any]) -> dict[str, float]:
    """What one process finds, too: sums in another order move the target vectors a little."""
    numbers = {**found["logged"], **found["routing"]}
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def test_without_sharding_nothing_happens() -> None:
    layer = nn.Linear(2, 2)
    before = dict(vars(layer))
    with gathering_on_use(layer):
        assert layer(torch.ones(2)).shape == (2,)
    assert dict(vars(layer)) == before
