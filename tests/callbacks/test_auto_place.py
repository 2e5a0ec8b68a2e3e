"""``auto`` for the editor's layers and token in a run: found at the first edit, kept in the state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.editing import Location


def _fit(tiny: Any, make_trainer: Any, folder: Path, checkpoint: Path | None = None) -> tuple[Any, Any, Any]:
    editing = KnowledgeEditing(tiny.editor("auto", steps=2, token="auto"), at={"epoch": 1}, renew_every_n_steps=5)
    kept = ModelCheckpoint(folder / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = make_trainer(folder, [editing, EditReport(), kept], max_epochs=3)
    module = tiny.module()
    trainer.fit(module, tiny.data(), ckpt_path=checkpoint, weights_only=True)
    return editing, module, trainer


def test_a_resumed_run_takes_the_same_place(
    tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, module, _ = _fit(tiny, make_trainer, tmp_path / "whole")
    assert whole.editor.place is not None and len(whole.applied_facts) == 6

    def not_again(*args: Any, **kwargs: Any) -> Location:
        raise AssertionError("the place was known")

    monkeypatch.setattr("lit_moeedit.editing.locating.locate", not_again)
    resumed, other, _ = _fit(tiny, make_trainer, tmp_path / "resumed", tmp_path / "whole" / "kept" / "epoch=1.ckpt")
    assert resumed.editor.place == whole.editor.place
    weights = tiny.weights(other)
    assert all(torch.equal(weight, weights[name]) for name, weight in tiny.weights(module).items())


def test_a_damaged_place_in_a_checkpoint_is_refused(tiny: Any) -> None:
    editing = KnowledgeEditing(tiny.editor("auto", token="auto"))
    state = editing.state_dict() | {"place": {"layers": ["0"], "token": "last"}}
    with pytest.raises(CheckpointError, match="field 'place': expected layers"):
        editing.load_state_dict(state)
