"""``auto`` for the editor's layers and token in a run: found at the first edit, kept in the state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
    # both runs tell where they have edited
    place = {**whole.editor.place.to_dict(), "found": True}
    for folder in ("whole", "resumed"):
        summary = json.loads((tmp_path / folder / "summary.json").read_text(encoding="utf-8"))
        assert summary["place"] == place
        logged = (tmp_path / folder / "logs" / "hparams.yaml").read_text(encoding="utf-8")
        for name in ("layers", "token"):
            assert yaml.safe_dump({f"edit_place/{name}": str(place[name])}).strip() in logged


@pytest.mark.parametrize(
    ("layers", "token", "own"),
    [([1], "last", "layer 1 at last"), ([0, 1], "subject_last", "layers 0, 1 at subject_last")],
)
def test_a_state_of_edits_at_another_place_is_told(
    tiny: Any, caplog: pytest.LogCaptureFixture, layers: list[int], token: str, own: str
) -> None:
    made = KnowledgeEditing(tiny.editor())
    made._applied = {"a": [True]}
    state = made.state_dict()
    KnowledgeEditing(tiny.editor()).load_state_dict(state)
    found = KnowledgeEditing(tiny.editor("auto", token="auto"))
    found.load_state_dict(state)  # goes on where the edits are
    assert found.place == {"layers": [0, 1], "token": "last", "found": True}
    assert not caplog.records
    other = KnowledgeEditing(tiny.editor(layers, token=token), name="late")
    other.load_state_dict(state)
    assert other.place == {"layers": layers, "token": token, "found": False}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        f"late: the edits in the checkpoint were made at layers 0, 1 at last, this run's editor is set to {own}: they"
        in (record.getMessage())
    )
    made._applied = {}  # nothing has been edited anywhere
    other.load_state_dict(made.state_dict())
    assert len(caplog.records) == 1


def test_callbacks_do_not_share_an_editor_that_finds_its_place(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    def fit(editor: Any) -> None:
        callbacks = [KnowledgeEditing(editor, name=name, at={"epoch": 9}) for name in ("early", "late")]
        make_trainer(tmp_path, callbacks, fast_dev_run=True).fit(tiny.module(), tiny.data())

    with pytest.raises(MisconfigurationException, match="early and late share one CountingEditor object with layers"):
        fit(tiny.editor("auto"))
    fit(tiny.editor())


def test_a_damaged_place_in_a_checkpoint_is_refused(tiny: Any) -> None:
    editing = KnowledgeEditing(tiny.editor("auto", token="auto"))
    state = editing.state_dict() | {"place": {"layers": ["0"], "token": "last"}}
    with pytest.raises(CheckpointError, match="field 'place': expected layers"):
        editing.load_state_dict(state)
