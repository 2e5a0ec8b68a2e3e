"""The memory of past edits in runs of the Trainer: it goes where the edits go, through checkpoints too."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.editing import EditMemory, TargetOptimizer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "in eval mode at the start", "not resumable")
]

BATCHES = {"every_n_epochs": 1, "batch": 2}


@pytest.fixture
def run(tiny, make_trainer, tmp_path):
    """``run(folder, …)`` makes every object anew, fits, and returns callback and weights."""

    def fit(folder, memory=None, ckpt=None, epochs=4, callbacks=(), editor=None, **settings):
        editor = tiny.editor(memory=memory, contexts=("", "Note:")) if editor is None else editor
        editing, module = KnowledgeEditing(editor, **{"at": BATCHES, "on_failure": "keep", **settings}), tiny.module()
        trainer = make_trainer(tmp_path / folder, [editing, *callbacks], max_epochs=epochs)
        trainer.fit(module, tiny.data(), **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        return editing, tiny.weights(module)

    return fit


def _same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _same_memory(a, b):
    a, b = a.editor.memory.state_dict(), b.editor.memory.state_dict()
    assert a.keys() == b.keys() and a
    for layer in a:
        for name, value in a[layer].items():
            assert torch.equal(value, b[layer][name]) if torch.is_tensor(value) else value == b[layer][name], name


# 6 facts in 2 contexts at 2 experts are 24 keys: more than 20, which still keep a row for each fact; 7 need the sketch
@pytest.mark.parametrize("limit", [*(pytest.param(limit, marks=pytest.mark.slow) for limit in (8192, 20)), 7])
def test_a_resumed_run_edits_with_the_memory_of_the_uninterrupted_one(run, tmp_path, limit):
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, weights = run("whole", EditMemory(limit), callbacks=[kept])
    assert [len(call) for call in whole.editor.calls] == [2, 2, 2]
    resumed, again = run("resumed", EditMemory(limit), tmp_path / "kept" / "epoch=1.ckpt")
    assert [len(call) for call in resumed.editor.calls] == [2, 2]
    _same(weights, again)
    _same_memory(whole, resumed)
    state = whole.editor.memory.state_dict()[0]
    assert {*state["facts"], *state["sketched"]} == {fact.prompt_key for fact in whole.facts}
    assert bool(state["sketched"]) is (limit == 7) and (len(state["facts"]) == 12) is (limit == 8192)
    # a memory that was not restored would have given other weights
    _, other = run("forgetful", None, tmp_path / "kept" / "epoch=1.ckpt")
    assert any(not torch.equal(other[name], weights[name]) for name in weights)


def test_a_checkpoint_that_names_facts_by_their_keys_goes_on(run, tmp_path):
    """One of an earlier version: what it remembers is left out of renewals, and counted once."""
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, weights = run("whole", EditMemory(), callbacks=[kept], epochs=3, renew_every_n_steps=3)
    path = tmp_path / "kept" / "epoch=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    keys = {fact.prompt_key: fact.key for fact in whole.facts}
    state = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("KnowledgeEditing"))
    for layer in state["memory"].values():
        layer["facts"] = [keys[name] for name in layer["facts"]]
    torch.save(checkpoint, path)
    resumed, again = run("resumed", EditMemory(), path, epochs=3, renew_every_n_steps=3)
    assert whole.renewals == resumed.renewals == 2
    _same(weights, again)
    _same_memory(whole, resumed)


def test_a_memory_may_be_added_to_a_run_that_had_none(run, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run("first", epochs=2, callbacks=[kept])
    editing, _ = run("second", EditMemory(), tmp_path / "kept" / "epoch=1.ckpt", epochs=3)
    remembered = [fact.prompt_key for fact in editing.facts[2:4] for _ in range(2)]
    assert editing.editor.memory.state_dict()[0]["facts"] == remembered


def test_an_edit_that_is_undone_is_not_remembered(tiny, run):
    hopeless = tiny.editor(targets=TargetOptimizer(steps=1, learning_rate=1e-3), memory=EditMemory())
    editing, _ = run("undone", editor=hopeless, min_efficacy=1.0)
    assert len(editing.edited_facts) == 6 and editing.applied_facts == []
    assert editing.editor.memory.state_dict() == {}


def test_renewed_facts_are_in_the_memory_once_with_their_newest_features(tiny, make_trainer, tmp_path):
    seen = []

    class Watched(KnowledgeEditing):
        def _renew(self, trainer, pl_module):
            seen.append(self.editor.memory.state_dict()[0])
            super()._renew(trainer, pl_module)
            seen.append(self.editor.memory.state_dict()[0])

    # a hopeless number of target steps: every fact is lost, so the renewal happens
    editor = tiny.editor(steps=1, memory=EditMemory())
    editing = Watched(editor, at={"step": 2}, renew_every_n_steps=1, max_renewals=1, on_failure="keep")
    make_trainer(tmp_path, [editing]).fit(tiny.module(), tiny.data())
    assert [len(call) for call in editing.editor.calls] == [6, 6] and editing.renewals == 1
    before, after = seen
    assert before["facts"] == after["facts"] == [fact.prompt_key for fact in editing.facts]
    assert before["key"].shape == after["key"].shape and not torch.equal(before["key"], after["key"])
