"""Runs whose editor chooses its settings: a resumed one keeps them, and what was edited before stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.editing import Place

OUTPUT = "lit_moeedit.preservation.shaping.OutputPenalty"
SETTINGS = "lit_moeedit.editing.locating.tuning"


@pytest.fixture
def fit(tiny: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(f"{SETTINGS}.FEWEST", 6)
    for name, values in (("STRENGTHS", (1.0, 0.01)), ("STRENGTHS_ALONE", ()), ("FURTHER", ())):
        monkeypatch.setattr(f"{SETTINGS}.{name}", values)

    def run(folder: str, checkpoint: Path | None = None, at: int = 1, **settings: Any) -> Any:
        editing = KnowledgeEditing(
            tiny.editor(**{"steps": 4, "tune": True, **settings}), at={"epoch": at}, on_failure="keep"
        )
        kept = ModelCheckpoint(
            tmp_path / folder / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        module = tiny.module()
        trainer = make_trainer(tmp_path / folder, [editing, EditReport(), kept], max_epochs=3)
        trainer.fit(module, tiny.data(), ckpt_path=checkpoint, weights_only=True)
        return editing, tiny.weights(module)

    return run


def test_a_resumed_run_edits_with_the_same_settings(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{SETTINGS}.choose_settings", lambda *_: 1)
    whole, weights = fit("whole")
    assert whole.editor.place == Place((0, 1), "last", 0.3 * 0.01, 0, OUTPUT, 0.05) and len(whole.applied_facts) == 6
    monkeypatch.setattr("lit_moeedit.editing.locating.tune", lambda *a, **k: pytest.fail("it was known"))
    resumed, others = fit("resumed", tmp_path / "whole" / "kept" / "epoch=1.ckpt")
    assert resumed.editor.place == whole.editor.place
    assert all(torch.equal(weight, weights[name]) for name, weight in others.items())
    for folder in ("whole", "resumed"):
        summary = json.loads((tmp_path / folder / "summary.json").read_text(encoding="utf-8"))
        assert summary["place"] == {**whole.editor.place.to_dict(), "found": True}
    logged = (tmp_path / "whole" / "logs" / "hparams.yaml").read_text(encoding="utf-8")
    assert "edit_place/strength: '0.003'" in logged


@pytest.mark.parametrize(("epoch", "is_tuned"), [(0, True), (1, False)], ids=["before the edit", "after it"])
def test_a_checkpoint_of_a_run_without_tuning(
    fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, epoch: int, is_tuned: bool
) -> None:
    """Where edits were made, later ones are made alike; before that the editor is still to be tuned."""
    calls: list[int] = []
    monkeypatch.setattr(f"{SETTINGS}.choose_settings", lambda *_: calls.append(1) or 1)
    fit("plain", tune=False)
    resumed, _ = fit("resumed", tmp_path / "plain" / "kept" / f"epoch={epoch}.ckpt")
    assert bool(calls) == is_tuned and len(resumed.applied_facts) == 6
    assert resumed.editor.place == Place((0, 1), "last", 0.3 * 0.01 if is_tuned else 0.3, 0, OUTPUT, 0.05)
    assert "the edits in the checkpoint were made at" not in caplog.text
