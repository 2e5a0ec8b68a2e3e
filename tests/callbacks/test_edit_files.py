"""Edits of a run as files: written when they are kept, applied in another run, with the bits that they had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.edits import Edit, EditConflictError, SavedEdits, apply, read_edits, verify
from lit_moeedit.models.experts import expert_layers
from tests.callbacks.conftest import _data, _editor, _module, _trainer


def frozen(dtype: str = "bfloat16", experts: bool = True) -> Any:
    """A module of whose model only the embeddings train."""
    module = _module(dtype=dtype)
    module.configure_model()
    module.model.requires_grad_(not experts)
    module.model.model.embed_tokens.requires_grad_(True)
    return module


def fit(folder: Path, editing: KnowledgeEditing, module: Any, **changes: Any) -> Any:
    trainer = _trainer(folder, [editing], max_epochs=3, **changes)
    trainer.fit(module, _data(samples_per_epoch=16))
    return trainer


def experts_of(module: Any) -> list[torch.Tensor]:
    return [layer.down_proj.detach().clone() for layer in expert_layers(module.model).values()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_run_applies_the_edits_of_a_frozen_base(tmp_path: Path, dtype: str) -> None:
    module = frozen(dtype)
    editing = KnowledgeEditing(
        _editor(), at={"every_n_epochs": 1, "batch": 3}, save_edits=True, renew_every_n_steps=2, max_renewals=1
    )
    fit(tmp_path / "one", editing, module)
    edits = read_edits(tmp_path / "one" / "logs")
    kinds = [edit.name for edit in edits]
    assert [name.partition("-")[0] for name in kinds].count("edit") == 2
    assert [name[-4:] for name in kinds] == [f"{number:04d}" for number in range(1, len(kinds) + 1)]
    assert [edit.order for edit in edits] == [*range(1, len(edits) + 1)]
    assert [fact.key for fact in edits[0].facts] == [fact.key for fact in editing.facts[:3]]
    assert edits[0].metrics_after["efficacy"] >= edits[0].metrics_before["efficacy"]
    assert editing.state_dict()["facts"] == {fact.key: fact.to_dict() for fact in editing.applied_facts}
    assert all(presence.status == "applied" for presence in verify(module.model, edits))

    other = frozen(dtype)
    again = KnowledgeEditing(SavedEdits(str(tmp_path / "one" / "logs" / "edits")), at={"epoch": 1})
    trainer = fit(tmp_path / "two", again, other)
    assert len(again.applied_facts) == 6
    for first, second in zip(experts_of(module), experts_of(other), strict=True):
        assert torch.equal(first, second)
    assert "edit/efficacy" in trainer.callback_metrics


def test_a_resumed_run_goes_on_with_its_files(tmp_path: Path) -> None:
    for name, epochs, resumed in (("one", 2, False), ("two", 3, True)):
        editing = KnowledgeEditing(_editor(), at={"every_n_epochs": 1, "batch": 3}, save_edits=str(tmp_path / name))
        trainer = _trainer(tmp_path, [editing], max_epochs=epochs)
        checkpoint = tmp_path / "last.ckpt" if resumed else None
        trainer.fit(frozen(), _data(samples_per_epoch=16), ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    first, second = read_edits(tmp_path / "two")
    assert list(second.made_on) == [first.id] and second.order == 2
    assert [edit.name for edit in read_edits(tmp_path / "one")] == [first.name]


def test_a_run_that_is_resumed_from_before_an_edit_does_not_write_it_twice(tmp_path: Path) -> None:
    """After a crash, all files of the folder can be applied together."""
    for epochs in (2, 3, 3):
        editing = KnowledgeEditing(_editor(), at={"every_n_epochs": 1, "batch": 3}, save_edits=str(tmp_path / "edits"))
        trainer = _trainer(tmp_path, [editing], max_epochs=epochs)
        checkpoint = tmp_path / "2.ckpt" if epochs > 2 else None
        module = frozen()
        trainer.fit(module, _data(samples_per_epoch=16), ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
    edits = read_edits(tmp_path / "edits")
    assert [edit.name for edit in edits] == ["edit-0001", "edit-0002"]
    other = frozen()
    apply(other.model, edits)
    assert all(map(torch.equal, experts_of(other), experts_of(module)))


def test_a_name_that_another_edit_has_in_the_folder_of_a_resumed_run(tmp_path: Path) -> None:
    for name, epochs, seed in (("other", 2, 1), ("one", 2, 0), ("other", 3, 0)):
        editing = KnowledgeEditing(
            _editor(), at={"every_n_epochs": 1, "batch": 3 - seed}, save_edits=str(tmp_path / name)
        )
        trainer = _trainer(tmp_path, [editing], max_epochs=epochs)
        checkpoint = tmp_path / "2.ckpt" if epochs > 2 else None
        trainer.fit(frozen(), _data(samples_per_epoch=16), ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
    foreign, first, second = (Edit.load(path) for path in sorted((tmp_path / "other").iterdir()))
    assert first.id == Edit.load(tmp_path / "one" / "edit-0001").id != foreign.id
    assert list(second.made_on) == [first.id]
    assert editing.state_dict()["edit_files"] == [str(tmp_path / "other" / name) for name in (first.name, second.name)]


def test_experts_that_train_are_another_base_for_each_edit(tmp_path: Path) -> None:
    editing = KnowledgeEditing(_editor(), at={"every_n_epochs": 1, "batch": 3}, save_edits=str(tmp_path / "edits"))
    fit(tmp_path, editing, frozen("float32", experts=False))
    first, second = sorted(read_edits(tmp_path / "edits"), key=lambda edit: edit.name)
    assert not second.made_on
    assert all(first.changes[name].after != change.before for name, change in second.changes.items())
    assert all(change.base == change.before for change in second.layers)


def test_edits_of_several_callbacks_are_one_chain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, data = frozen(), _data(samples_per_epoch=16)
    data.setup("fit")
    facts = data.edit_facts()
    editings = [
        KnowledgeEditing(
            _editor(), facts[3 * i : 3 * i + 3], at={"epoch": i}, name=name, save_edits=str(tmp_path / name)
        )
        for i, name in enumerate(("one", "two"))
    ]
    _trainer(tmp_path, editings, max_epochs=2).fit(module, data)
    edits = read_edits(tmp_path / "two")
    assert [(edit.order, len(edit.made_on)) for edit in edits] == [(1, 0), (2, 1)]
    assert [edit.id for edit in read_edits(tmp_path / "one")] == [edits[0].id]
    other = frozen()
    apply(other.model, edits)
    assert all(map(torch.equal, experts_of(other), experts_of(module)))

    again = KnowledgeEditing(SavedEdits(str(tmp_path / "two")), save_edits=str(tmp_path / "three"))
    fit(tmp_path / "again", again, other := frozen())
    assert [edit.id for edit in read_edits(tmp_path / "three")] == [edit.id for edit in edits]
    assert all(map(torch.equal, experts_of(other), experts_of(module)))
    assert "is not part of the chain" not in caplog.text and "made on the same weights" not in caplog.text


class Changing(L.Callback):
    """Changes an expert before the second epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                expert_layers(pl_module.model)[0].down_proj[0, 0, 0].add_(1)


def test_an_edit_that_is_not_part_of_the_chain_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    editing = KnowledgeEditing(_editor(), at={"every_n_epochs": 1, "batch": 3}, save_edits=str(tmp_path / "edits"))
    trainer = _trainer(tmp_path, [editing, Changing()], max_epochs=3)
    trainer.fit(frozen(), _data(samples_per_epoch=16))
    assert re.search(r"edit-0002 is not part of the chain of \S+edit-0001: the experts were changed", caplog.text)
    # a run whose first edit is another, in the same folder
    editing = KnowledgeEditing(_editor(), at={"every_n_epochs": 1, "batch": 2}, save_edits=str(tmp_path / "edits"))
    _trainer(tmp_path, [editing], max_epochs=2).fit(frozen(), _data(samples_per_epoch=16))
    assert re.search("has edit-0001 beside edit-0003, made on the same .* in the weights are edit-0003", caplog.text)


def test_edits_of_another_base_are_refused_unless_any_base_will_do(tmp_path: Path) -> None:
    editing = KnowledgeEditing(_editor(), at="fit_start", save_edits=str(tmp_path / "edits"))
    fit(tmp_path, editing, frozen())
    other = frozen()
    with torch.no_grad():
        expert_layers(other.model)[0].down_proj[0, 0, 0] += 1
    before = experts_of(other)
    saved = str(tmp_path / "edits")
    with pytest.raises(EditConflictError, match="neither that of the base of edit 'edit-0001' nor"):
        fit(tmp_path / "other", KnowledgeEditing(SavedEdits(saved)), other)
    assert all(torch.equal(first, second) for first, second in zip(before, experts_of(other), strict=True))
    fit(tmp_path / "any", KnowledgeEditing(SavedEdits(saved, any_base=True)), other)
    assert not torch.equal(before[1], experts_of(other)[1])
    with pytest.raises(EditConflictError, match="has the edit 'edit-0001' already"):
        fit(tmp_path / "again", KnowledgeEditing(SavedEdits(saved), at={"epoch": 0}), editing_model(editing))


def editing_model(editing: KnowledgeEditing) -> Any:
    """The module of the run before, whose model has the edit."""
    module = frozen()
    module.model = editing._models.model
    return module


def test_edits_are_applied_as_a_whole_and_not_renewed(tmp_path: Path) -> None:
    editing = KnowledgeEditing(_editor(), at="fit_start", save_edits=str(tmp_path / "edits"))
    fit(tmp_path, editing, frozen())
    saved = SavedEdits(str(tmp_path / "edits"))
    assert saved.layers == (0, 1)
    with pytest.raises(ValueError, match="4 of their facts are not due now"):
        fit(tmp_path / "other", KnowledgeEditing(saved, at={"every_n_epochs": 1, "batch": 2}), frozen())
    with pytest.raises(ValueError, match="renew_every_n_steps must be None: SavedEdits cannot"):
        KnowledgeEditing(saved, renew_every_n_steps=5)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "edits").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match="edits"):
        fit(tmp_path, KnowledgeEditing(_editor(), at="fit_start", save_edits=str(tmp_path / "edits")), frozen())
