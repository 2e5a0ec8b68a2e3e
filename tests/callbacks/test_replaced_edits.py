"""Edits whose earlier changes a renewal takes out of the weights: what is taken out, what stays, and after a resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.editing import EditMemory
from lit_moeedit.models.experts import expert_layers, find_model
from tests.callbacks.test_renewals import every_fact_is_generated

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


class AtRest(L.Callback):
    """Lets no weight learn after the edit, and takes the experts' weights before and after it."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["lr"] if trainer.global_step < 4 else 0.0
        if trainer.global_step in (3, 4):
            self.weights = down_projections(pl_module)


def down_projections(module: L.LightningModule) -> dict[int, torch.Tensor]:
    return {layer.index: layer.down_proj.detach().clone() for layer in expert_layers(find_model(module)).values()}


AT_END = {"renew_at": "end", "renew_below": None, "survival_every_n_steps": 1000}


def test_edits_are_replaced_by_those_of_the_present_weights(renewing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has learned since, that is the edit itself: made once more on top it would be larger."""
    every_fact_is_generated(monkeypatch)
    edited, replaced, again = (
        renewing(callbacks=[AtRest()], **settings)
        for settings in ({"renew_below": None}, {"renewal": "replace", **AT_END}, {"renewal": "anew", **AT_END})
    )
    assert replaced.editing.renewals == 1 and replaced.searched == [6, 6] and replaced.passes == 2
    names = [name for name in edited.weights if name.endswith("down_proj")]
    change = sum(float((edited.weights[name] - replaced.weights[name]).norm()) for name in names)
    size = sum(float(own.square_norm()) ** 0.5 for own in replaced.editing._kept.changes[0].deltas.values())
    assert len(replaced.editing._kept.changes) == 1 and change < 1e-3 * size
    assert again.editing.renewals == 0  # nothing is lost


class NoTraining(L.Callback):
    """Lets no weight learn."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0


def test_a_stream_of_batches_that_is_replaced_is_one_batch(
    tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changes of all batches are taken out, and no row of the memory holds what is edited again."""
    every_fact_is_generated(monkeypatch)

    def run(folder: str, at: Any, **settings: Any) -> tuple[KnowledgeEditing, dict[str, torch.Tensor]]:
        editing = KnowledgeEditing(tiny.editor(steps=12, memory=EditMemory()), at=at, **settings)
        module, trainer = tiny.module(), make_trainer(tmp_path / folder, [editing, NoTraining()])
        trainer.fit(module, tiny.data())
        return editing, tiny.weights(module)

    whole, expected = run("whole", "fit_start")
    stream, found = run("stream", {"step": 1, "batch": 2}, renewal="replace", **AT_END)
    parts, without = run("parts", {"step": 1, "batch": 2})
    assert [len(call) for call in whole.editor.calls] == [6] and stream.renewals == 1
    assert [len(call) for call in stream.editor.calls] == [2, 2, 2, 6]
    assert [len(call) for call in parts.editor.calls] == [2, 2, 2]
    assert stream.editor.memory.size(0) == whole.editor.memory.size(0) and stream.editor.memory.size(0)[0] > 0
    size, change, difference = 0.0, 0.0, 0.0
    before = tiny.module()
    before.configure_model()
    for name, weight in tiny.weights(before).items():
        size += float((expected[name] - weight).square().sum())
        change += float((expected[name] - found[name]).square().sum())
        difference += float((expected[name] - without[name]).square().sum())
    # the weights of the first batches are rounded to float32, and then searched on
    assert change < 1e-6 * size < difference


def test_a_resumed_run_replaces_as_the_whole_one(renewing: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = {"renewal": "replace", "renew_below": None, "renew_every_n_steps": 4}
    whole = renewing(callbacks=[kept], **settings)
    # with the change of a renewal, which has taken the place of that of the edit
    again = renewing("again", ckpt=tmp_path / "kept" / "epoch=2.ckpt", **settings)
    assert whole.editing.renewals == again.editing.renewals == 3 and again.searched == [6]
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


@pytest.fixture
def replaced(renewing: Any, tmp_path: Path) -> Path:
    """The checkpoint of a run that has changes to take out."""
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    assert len(renewing(callbacks=[kept], renewal="replace", **AT_END).editing._kept.changes) == 1
    return tmp_path / "kept" / "epoch=2.ckpt"


@pytest.mark.parametrize("other", ["facts", "layers"])
def test_changes_of_other_facts_or_layers_stay(
    renewing: Any, tiny: Any, replaced: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without them facts that a resumed run does not list would be lost unseen."""
    facts = tiny.data().corpus.edits
    own = {"facts": list(facts[:4])} if other == "facts" else {"editor": tiny.editor(layers=[1], steps=12)}
    found = renewing("again", ckpt=replaced, renewal="replace", **AT_END, **own)
    assert "the changes of some edits (6 of 6 facts) stay in the weights, and others are added" in caplog.text
    assert found.editing.renewals == 1
    assert [len(change.facts) for change in found.editing._kept.changes] == ([6, 4] if other == "facts" else [6, 6])


def test_another_kind_of_renewal_takes_nothing_out(
    renewing: Any, replaced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it adds is not known, so a later run takes nothing out of it either."""

    class Forget(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            editing = trainer.callbacks[0]  # type: ignore[attr-defined]
            editing._kept = replace(editing._kept, changes=())

    settings = {"renewal": "anew", **AT_END}
    lost = KnowledgeEditing._lost
    monkeypatch.setattr(KnowledgeEditing, "_lost", lambda *a: [*lost(*a), "a fact"])
    found, expected = (
        renewing(name, ckpt=replaced, callbacks=own, **settings) for name, own in (("a", ()), ("b", [Forget()]))
    )
    assert found.editing.renewals == expected.editing.renewals == 1 and found.editing._kept.changes == ()
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())


def test_a_change_that_is_taken_out_is_forgotten_in_the_transaction(
    renewing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error right after it must not leave a change on record that the weights no longer have."""
    keep, calls, seen = KnowledgeEditing._keep, [], []

    def broken(self: KnowledgeEditing, *args: Any, **kwargs: Any) -> None:
        calls.append(len(self._kept.changes))
        if len(calls) > 1:
            seen.append(self)
            raise RuntimeError("broken off")
        keep(self, *args, **kwargs)

    monkeypatch.setattr(KnowledgeEditing, "_keep", broken)
    with pytest.raises(RuntimeError, match="broken off"):
        renewing(renewal="replace", **AT_END)
    assert calls == [0, 0] and seen[0].renewals == 1 and seen[0]._kept.changes == ()


def test_changes_that_are_not_known_stay(renewing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    renewing(callbacks=[kept], renew_below=None)
    found = renewing("again", ckpt=tmp_path / "kept" / "epoch=2.ckpt", renewal="replace", **AT_END)
    assert found.editing.renewals == 1 and len(found.editing._kept.changes) == 1
    assert "the changes of some edits (6 of 6 facts) stay in the weights, and others are added" in caplog.text
