"""The state of a callback belongs to the weights that it is about, whatever models and trainers it sees."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.editing import EditMemory
from lit_moeedit.module import LitMoE
from lit_moeedit.per_model import PerModel
from tests.callbacks.conftest import CONFIG

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "in eval mode at the start", "not resumable", "logs dir")
]


@pytest.fixture
def runs(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Callbacks that outlive runs, and ``start(fn, module)``, which gives them to a new trainer."""
    memory = EditMemory()
    editing = KnowledgeEditing(tiny.editor(layers=[1], memory=memory))
    callbacks = [editing, RoutingMonitor(), EditReport(console=False)]
    made = SimpleNamespace(editing=editing, monitor=callbacks[1], memory=memory, data=tiny.data(samples_per_epoch=16))

    def start(fn: str, module: Any, **keys: Any) -> Any:
        made.trainer = make_trainer(tmp_path, callbacks, **keys.pop("trainer", {}))
        quiet = {"verbose": False} if fn == "validate" else {}
        getattr(made.trainer, fn)(module, datamodule=made.data, **quiet, **keys)
        return made.trainer

    made.start = start
    made.summary = lambda: json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    made.module = lambda seed=0: tiny.module(config={"initializer_range": 0.1 + seed / 100})
    return made


def plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def test_another_model_is_edited_and_reported_by_itself(runs: Any) -> None:
    first, second = runs.module(), runs.module(1)
    runs.start("fit", first)
    one = (runs.summary(), plain(runs.editing.state_dict()), plain(runs.monitor.state_dict()))
    drawn = set(runs.data.state_dict()["excluded"])
    excluded: list[set[str]] = []
    original = runs.data.train_dataloader
    runs.data.train_dataloader = lambda: excluded.append(set(runs.data.state_dict()["excluded"])) or original()
    runs.start("fit", second)
    assert [len(call) for call in runs.editing.editor.calls] == [6, 6]
    other = (runs.summary(), plain(runs.editing.state_dict()), plain(runs.monitor.state_dict()))
    assert other[0]["edits"] == one[0]["edits"] == 6
    assert other[0]["before"] != one[0]["before"] and other[0]["perplexity"] != one[0]["perplexity"]
    assert other[0]["seconds"]["edit"] != one[0]["seconds"]["edit"]
    assert other[1]["memory"] != one[1]["memory"] and other[1]["edits_made"] == 1
    assert len(other[1]["memory"][1]["facts"]) == 6
    assert other[2]["probabilities"] != one[2]["probabilities"]
    # the data module taught the second model what it left out after the edit of the first
    assert excluded == [set()] and set(runs.data.state_dict()["excluded"]) == drawn
    # and with the first one everything goes on
    runs.start("validate", first)
    assert len(runs.editing.editor.calls) == 2
    assert plain(runs.editing.state_dict()) == one[1] and plain(runs.monitor.state_dict()) == one[2]
    assert float(runs.trainer.callback_metrics["edit/efficacy"]) == one[0]["after_training"]["efficacy"]


def test_a_model_that_is_gone_leaves_nothing(runs: Any) -> None:
    runs.start("fit", runs.module())
    runs.trainer = None
    runs.start("fit", runs.module(1))
    assert len(runs.editing.editor.calls) == 2 and runs.summary()["edits"] == 6


def test_a_report_alone_does_not_repeat_that_of_another_model(
    runs: Any, tiny: Any, make_trainer: Any, tmp_path: Path, caplog: Any
) -> None:
    report = EditReport(console=False)
    make_trainer(tmp_path, [KnowledgeEditing(tiny.editor()), report]).fit(runs.module(), runs.data)
    (tmp_path / "summary.json").unlink()
    make_trainer(tmp_path, [report]).fit(runs.module(1), runs.data)
    assert not (tmp_path / "summary.json").exists() and "no facts were edited in this run" in caplog.text


def test_a_new_object_with_the_weights_that_were_left_goes_on(runs: Any) -> None:
    first = runs.module()
    runs.start("fit", first)
    remembered = plain(runs.editing.state_dict())
    again = LitMoE(config=dict(CONFIG))
    again.configure_model()
    again.load_state_dict(first.state_dict())
    runs.start("validate", again)
    assert len(runs.editing.editor.calls) == 1 and plain(runs.editing.state_dict()) == remembered
    assert "edit/efficacy" in runs.trainer.callback_metrics


def test_a_memory_of_two_editors_goes_to_a_new_object_with_the_weights(
    tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    memory, facts, data = EditMemory(), tiny.corpus().edits, tiny.data(samples_per_epoch=16)
    editings = [
        KnowledgeEditing(tiny.editor(layers=[1], memory=memory), facts=own, name=name)
        for name, own in {"one": facts[:3], "two": facts[3:]}.items()
    ]

    def start(fn: str, module: Any) -> Any:
        getattr(make_trainer(tmp_path, editings), fn)(module, datamodule=data)
        return plain(memory.state_dict())

    first, second = tiny.module(), tiny.module(config={"initializer_range": 0.11})
    one = start("fit", first)
    assert len(one[1]["facts"]) == 6
    other = start("fit", second)
    # copies of both: of the model that was left last, and of the one before
    for module, expected in ((second, other), (first, one)):
        again = LitMoE(**dict(module.hparams))
        again.configure_model()
        again.load_state_dict(module.state_dict())
        assert start("validate", again) == expected
    assert [len(editing.editor.calls) for editing in editings] == [2, 2]
    assert start("validate", first) == one and start("validate", second) == other


def test_other_weights_in_the_same_object_are_edited_anew(runs: Any, caplog: Any) -> None:
    module = runs.module()
    module.configure_model()
    start = copy.deepcopy(module.state_dict())
    runs.start("fit", module)
    module.load_state_dict(start)
    runs.start("fit", module)
    assert [len(call) for call in runs.editing.editor.calls] == [6, 6]
    assert "these are other weights, which are edited anew" in caplog.text
    assert runs.summary()["edits"] == 6 and len(runs.editing.state_dict()["memory"][1]["facts"]) == 6


def test_the_same_weights_trained_on_elsewhere_go_on(runs: Any, make_trainer: Any, tmp_path: Path, caplog: Any) -> None:
    module = runs.module()
    module.hparams["learning_rate"] = 1e-6
    runs.start("fit", module)
    make_trainer(tmp_path / "elsewhere", [], max_steps=1).fit(module, runs.data)
    runs.start("fit", module)
    assert len(runs.editing.editor.calls) == 1
    assert "taken to be edited still" in caplog.text


def test_a_checkpoint_brings_its_state_to_another_model(runs: Any, tmp_path: Path) -> None:
    runs.start("fit", runs.module())
    runs.trainer.save_checkpoint(tmp_path / "it.ckpt")
    state = plain(runs.editing.state_dict())
    second = runs.module(1)
    runs.start("fit", second)
    third = runs.module()
    runs.start("fit", third, ckpt_path=tmp_path / "it.ckpt", trainer={"max_epochs": 2}, weights_only=True)
    assert len(runs.editing.editor.calls) == 2
    found, curve = plain(runs.editing.state_dict()), state.pop("survival")["points"]
    assert found.pop("survival")["points"][: len(curve)] == curve  # it goes on in the second epoch
    assert found == state
    # a checkpoint without such a state is of weights without edits
    checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    runs.start("fit", third, ckpt_path=tmp_path / "other.ckpt", trainer={"max_epochs": 2}, weights_only=True)
    assert len(runs.editing.editor.calls) == 3


def test_a_new_trainer_counts_epochs_and_steps_anew(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    editing = KnowledgeEditing(tiny.editor(), at={"every_n_epochs": 1, "batch": 2}, renew_every_n_steps=2)
    module, seen = tiny.module(), []
    editing._renew = lambda *args: seen.append(editing._last_step)  # type: ignore[method-assign]
    for _ in range(2):
        make_trainer(tmp_path, [editing], max_epochs=2).fit(module, tiny.data(samples_per_epoch=16))
    assert [len(call) for call in editing.editor.calls] == [2, 2]
    assert seen and seen[-1] <= 2


def test_a_memory_of_an_editor_is_that_of_the_model_it_edits(
    tiny: Any, make_model: Any, tokenizer: Any, facts: Any
) -> None:
    editor = tiny.editor(layers=[1], memory=EditMemory(), preserve="none")
    models = [make_model("qwen3_moe") for _ in range(2)]
    alone = tiny.editor(layers=[1], memory=EditMemory(), preserve="none")
    alone.edit(copy.deepcopy(models[1]), tokenizer, facts[:1])
    editor.edit(models[0], tokenizer, facts)
    known = plain(editor.memory.state_dict())
    editor.edit(models[1], tokenizer, facts[:1])
    assert plain(editor.memory.state_dict()) == plain(alone.memory.state_dict())
    editor.memory.switch(models[0])
    assert plain(editor.memory.state_dict()) == known


def test_a_value_for_each_model() -> None:
    values: PerModel[list[int]] = PerModel(list)
    first, second, third = (torch.nn.Linear(1, 1) for _ in range(3))
    assert values.switch(first, [1]) == [1] and values.switch(first, [2]) == [2]
    assert values.switch(second, [2]) == [] and values.switch(first, [3]) == [2]
    assert values.switch(None, [2]) == [] and values.model is None
    # what was restored belongs to the model that comes, instead of what was known of it
    assert values.switch(second, [7]) == [7]
    like = [7]
    assert values.switch(third, like, lambda value: value == [7]) == [7]
    assert values.model is third
    del third
    assert values.model is None and values.switch(first, [8]) == [2]
    # neither weak references nor a model go into a pickle: spawned processes get the callbacks of a trainer
    again = pickle.loads(pickle.dumps(values))
    assert again.switch(first, [9]) == [9]
