"""The autopsy at the end of a run, of weights that were kept after its last edit."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from markupsafe import escape

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.callbacks.listener import EditListener
from lit_moeedit.cli import run
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.models.parts import KEY_MAKERS, find_kinds, stored_tensors


class Spoiling(EditListener):
    """Moves weights of one kind after the edit, as training would, and remembers the weights at its end."""

    def __init__(self, kind):
        self.kind = kind

    def on_train_epoch_end(self, trainer, pl_module):
        model = find_model(pl_module)
        kinds = find_kinds(model, list(expert_layers(model)))
        generator = torch.Generator().manual_seed(trainer.current_epoch)
        if trainer.current_epoch == 2:
            with torch.no_grad():
                for name, tensor in stored_tensors(model).items():
                    if kinds[name] == self.kind:
                        tensor.add_(3 * tensor.std() * torch.randn(tensor.shape, generator=generator))

    def on_train_end(self, trainer, pl_module):
        self.end = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def test_a_run_tells_what_carried_the_loss(tiny, make_trainer, tmp_path, caplog):
    editing, spoiling = KnowledgeEditing(tiny.editor(), at={"epoch": 1}), Spoiling("gate/up-projections")
    trainer = make_trainer(
        tmp_path, [editing, spoiling, EditReport(console=False, autopsy=True), last := Spoiling("nothing")],
        max_epochs=3,
    )  # fmt: skip
    module = tiny.module(learning_rate=1e-9)  # so that nothing else moves
    with caplog.at_level("INFO", logger="lit_moeedit"):
        trainer.fit(module, tiny.data())
    assert "GB of just-edited weights are kept in main memory" in caplog.text
    assert all(torch.equal(spoiling.end[name], last.end[name]) for name in last.end)
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["autopsy"]
    count = summary["edits"]
    assert found["facts"] == count and found["layers"] == list(editing.editor.layers)
    for moment, key in (("edited", "after"), ("final", "after_training")):
        # metrics are float32
        assert found[moment]["generated"] / count == pytest.approx(summary[key]["efficacy_accuracy"], rel=1e-6)
    assert found["final"]["generated"] < found["edited"]["generated"]
    parts = {part["name"]: part for part in found["parts"]}
    assert "above and head" not in parts and {"down-projections", "attention", KEY_MAKERS} <= parts.keys()
    best = max(parts.values(), key=lambda part: part["moved"])
    assert best["name"] == "gate/up-projections" and best["explained"] >= 0.5
    assert found["verdict"].startswith("training moved the gate/up-projections of the edited layers")
    assert found["carrier"] == "gate/up-projections"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Which part carried the loss" in page and f"T{found['verdict'][1:]}" in page
    assert f'<tr class="edited"><th scope="row"><bdi>{best["name"]}</bdi></th>' in page
    assert page.count('class="bar"') == len(parts)


def test_a_run_resumed_after_its_edit_names_the_command_for_checkpoints(tiny, make_trainer, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    def fit(folder, epochs, **keys):
        callbacks = [KnowledgeEditing(tiny.editor(), at={"epoch": 0}), EditReport(console=False, autopsy=True), kept]
        trainer = make_trainer(tmp_path / folder, callbacks, max_epochs=epochs)
        trainer.fit(tiny.module(), tiny.data(), **keys)
        return json.loads((tmp_path / folder / "summary.json").read_text())

    assert "parts" in fit("first", 1)["autopsy"]
    edited, final = tmp_path / "kept" / "epoch=0.ckpt", tmp_path / "kept" / "epoch=1.ckpt"
    found = fit("second", 2, ckpt_path=edited, weights_only=True)["autopsy"]
    assert found["missing"].startswith("the run was resumed after its last edit")
    assert found["command"] == shlex.join(["lit-moeedit", "edits", "autopsy", str(final), "--edited", str(edited)])
    page = (tmp_path / "second" / "report.html").read_text(encoding="utf-8")
    assert f"<bdi>{escape(found['command'])}</bdi>" in page
    # the command does what the page says
    output = tmp_path / "autopsy.json"
    run(args=[*shlex.split(found["command"])[1:], f"--output={output}"])
    assert json.loads(output.read_text())["facts"] == 6


def test_no_autopsy_unless_it_is_asked_for(tiny, make_trainer, tmp_path):
    make_trainer(tmp_path, [KnowledgeEditing(tiny.editor(), at={"epoch": 0}), EditReport(console=False)],
                 max_epochs=1).fit(tiny.module(), tiny.data())  # fmt: skip
    assert "autopsy" not in json.loads((tmp_path / "summary.json").read_text())
