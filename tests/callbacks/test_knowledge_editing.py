"""The callback in real runs of the Trainer on one CPU."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.listener import EditListener
from lit_moeedit.data.facts import FactError
from lit_moeedit.editing import TargetOptimizer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "callbacks used to create the checkpoint",
        "in eval mode at the start",
        "logs directory",
        "not resumable",
    )
]


def _same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{different[:3]} differ"


@pytest.fixture
def run(tiny, make_trainer, tmp_path):
    """``run(at, …)`` makes every object anew, fits, and returns all of it."""

    def fit(at="fit_start", folder="run", callbacks=(), epochs=4, ckpt=None, editing=None, **trainer_arguments):
        editor = tiny.editor()
        editing = KnowledgeEditing(editor, at=at) if editing is None else editing
        module, data = tiny.module(), tiny.data()
        trainer = make_trainer(tmp_path / folder, [editing, *callbacks], max_epochs=epochs, **trainer_arguments)
        trainer.fit(module, data, **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        return SimpleNamespace(trainer=trainer, module=module, data=data, editing=editing, editor=editing.editor)

    return fit


def _every_epoch(folder):
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "calls", "calls_after"),
    [
        # checkpoints are named by the epoch they end; a resume after epoch e starts with epoch e + 1
        ({"epoch": 2}, [6], {1: [6], 2: []}),
        ({"step": 6}, [6], {0: [6], 1: []}),
        ({"every_n_epochs": 1, "batch": 2}, [2, 2, 2], {0: [2, 2, 2], 1: [2, 2], 2: [2]}),
    ],
    ids=["epoch", "step", "batches"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(run, tiny, tmp_path, at, calls, calls_after):
    whole = run(at, callbacks=[_every_epoch(tmp_path / "kept")])
    assert [len(call) for call in whole.editor.calls] == calls
    done = [key for call in whole.editor.calls for key in call]
    assert len(done) == len(set(done)) == 6
    for epoch, expected in calls_after.items():
        resumed = run(at, f"from_{epoch}", ckpt=tmp_path / "kept" / f"epoch={epoch}.ckpt")
        assert resumed.trainer.current_epoch == 4
        assert [len(call) for call in resumed.editor.calls] == expected
        assert [key for call in resumed.editor.calls for key in call] == done[len(done) - sum(expected) :]
        assert resumed.editing.state_dict() == whole.editing.state_dict()
        assert resumed.data.state_dict() == whole.data.state_dict()
        _same(tiny.weights(resumed.module), tiny.weights(whole.module))


def test_a_checkpoint_of_the_step_of_the_edit_holds_the_edit(run, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    run({"step": 2}, callbacks=[kept], epochs=1)
    before, at = (torch.load(tmp_path / "kept" / f"step={n}.ckpt", weights_only=True) for n in (1, 2))

    def applied(checkpoint):
        return next(state for name, state in checkpoint["callbacks"].items() if "KnowledgeEditing" in name)["applied"]

    assert len(applied(before)) == 0 and len(applied(at)) == 6
    resumed = run({"step": 2}, "again", ckpt=tmp_path / "kept" / "step=2.ckpt", epochs=2)
    assert resumed.editor.calls == []
    # keys as they were before callbacks had names, and another setting
    at["callbacks"] = {name.partition("{")[0]: state for name, state in at["callbacks"].items()}
    torch.save(at, tmp_path / "old.ckpt")
    resumed = run({"step": 1}, "old", ckpt=tmp_path / "old.ckpt", epochs=2)
    assert resumed.editor.calls == [] and len(resumed.editing.applied_facts) == 6


def test_a_second_fit_does_not_edit_again(run, tiny, make_trainer, tmp_path):
    first = run("fit_start", epochs=1)
    trainer = make_trainer(tmp_path / "more", [first.editing], max_epochs=1)
    trainer.fit(first.module, first.data)
    assert len(first.editor.calls) == 1


# -- renewal ----------------------------------------------------------------------------------------------------------


def test_lost_edits_are_renewed_as_often_as_asked_and_not_after_a_resume(run, tiny, tmp_path):
    def renewing():
        # a hopeless number of target steps: every fact is always lost, so every renewal that is due happens
        return KnowledgeEditing(
            tiny.editor(steps=1), at={"step": 2}, renew_every_n_steps=3, max_renewals=2, on_failure="keep"
        )

    whole = run(editing=renewing(), callbacks=[_every_epoch(tmp_path / "kept")])
    assert [len(call) for call in whole.editor.calls] == [6, 6, 6]
    assert whole.editing.renewals == 2
    assert len(_logged(tmp_path / "run")["edit_renewed/before"]) == 2
    # 4 steps an epoch: the checkpoint lies between the edit at step 2 and the renewals at steps 5 and 8
    resumed = run(editing=renewing(), folder="again", ckpt=tmp_path / "kept" / "epoch=0.ckpt")
    assert [len(call) for call in resumed.editor.calls] == [6, 6]
    one, other = resumed.editing.state_dict(), whole.editing.state_dict()
    goals = [state["kept"].pop("goals") for state in (one, other)]
    assert torch.equal(*goals) and one == other
    _same(tiny.weights(resumed.module), tiny.weights(whole.module))


def test_edits_that_hold_are_not_renewed(run, tiny, monkeypatch):
    editing = KnowledgeEditing(tiny.editor(), at={"step": 2}, renew_every_n_steps=1)
    evaluate = editing.evaluate

    def hold(*args):
        found = evaluate(*args)
        return replace(found, edits_exact=torch.ones_like(found.edits_exact))

    monkeypatch.setattr(editing, "evaluate", hold)
    result = run(editing=editing, epochs=1)
    assert editing.renewals == 0
    assert [len(call) for call in result.editor.calls] == [6]


# -- training state ---------------------------------------------------------------------------------------------------


def test_an_edit_leaves_the_state_of_training_as_it_was(tiny, make_trainer, tmp_path):
    seen = []

    def state(module):
        return {
            "modes": {name: part.training for name, part in module.named_modules()},
            "trainable": {name: p.requires_grad for name, p in module.named_parameters()},
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()},
            "random": torch.get_rng_state(),
            "grad enabled": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    class Watched(KnowledgeEditing):
        def due(self, trainer, moment):
            # between the two batches whose gradients are added up
            return self.pending_facts if moment == "step" and trainer.fit_loop.batch_idx == 2 else []

        def _edit(self, trainer, pl_module, facts):
            before = state(pl_module)
            super()._edit(trainer, pl_module, facts)
            if facts:
                seen.append((before, state(pl_module)))

    module = tiny.module()
    module.configure_model()
    module.model.model.layers[0].self_attn.eval()  # a user's own choice
    module.model.model.embed_tokens.weight.requires_grad_(False)
    editing = Watched(tiny.editor())
    make_trainer(tmp_path, [editing], accumulate_grad_batches=2).fit(module, tiny.data())
    [(before, after)] = seen
    assert any(gradient is not None and gradient.any() for gradient in before["gradients"].values())
    assert before["modes"] == after["modes"] and len(set(before["modes"].values())) == 2
    assert before["trainable"] == after["trainable"] and len(set(before["trainable"].values())) == 2
    assert before["grad enabled"] == after["grad enabled"] and before["deterministic"] == after["deterministic"]
    assert torch.equal(before["random"], after["random"])
    for name, gradient in before["gradients"].items():
        other = after["gradients"][name]
        assert (gradient is None) == (other is None) and (gradient is None or torch.equal(gradient, other)), name


@pytest.mark.parametrize("at", ["fit_start", {"epoch": 1}, {"step": 3}, "validation"])
def test_an_exception_leaves_the_weights_bit_identical(tiny, make_trainer, tmp_path, monkeypatch, at):
    editor = tiny.editor()
    solve, calls = editor.solver.solve, []

    def fails_at_the_second_layer(problem):
        calls.append(problem)
        if len(calls) == 2:
            raise RuntimeError("the solver gave up")
        return solve(problem)

    monkeypatch.setattr(editor.solver, "solve", fails_at_the_second_layer)
    noted = {}

    class Watched(KnowledgeEditing):
        def _edit(self, trainer, pl_module, facts):
            if facts:
                noted["before"] = tiny.weights(pl_module)
            super()._edit(trainer, pl_module, facts)

    editing, module, data = Watched(editor, at=at), tiny.module(), tiny.data()
    with pytest.raises(RuntimeError, match="the solver gave up"):
        make_trainer(tmp_path, [editing], max_epochs=2).fit(module, data)
    _same(tiny.weights(module), noted["before"])
    assert editing.applied_facts == [] and len(editing.pending_facts) == 6 and data.state_dict() == {"excluded": []}
    monkeypatch.undo()
    make_trainer(tmp_path, [editing], max_epochs=2).fit(module, data)
    assert len(editing.applied_facts) == 6


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(run, precision):
    result = run({"epoch": 1}, epochs=2, precision=precision)
    assert len(result.editing.applied_facts) == 6
    assert torch.isfinite(torch.stack([p.float().sum() for p in result.module.parameters()])).all()
    assert 0 <= result.trainer.callback_metrics["edit/efficacy"] <= 1


# -- without training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_validate_and_test_can_edit(tiny, make_trainer, tmp_path, stage, inference_mode):
    editing, module = KnowledgeEditing(tiny.editor(), at="validation"), tiny.module()
    module.configure_model()
    before = tiny.weights(module)
    trainer = make_trainer(tmp_path, [editing], inference_mode=inference_mode)
    [metrics] = getattr(trainer, stage)(module, tiny.data(), verbose=False)
    assert len(editing.applied_facts) == 6
    assert {"edit/efficacy", "edit/generalization", "edit/specificity"} <= metrics.keys()
    changed = {name for name, tensor in tiny.weights(module).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)}
    # the weights are no tensors of inference mode: they can be trained further
    make_trainer(tmp_path / "fit", []).fit(module, tiny.data())


def test_validate_without_an_edit_says_nothing_of_edits(tiny, make_trainer, tmp_path):
    editing, module = KnowledgeEditing(tiny.editor(), at={"epoch": 1}), tiny.module()
    [metrics] = make_trainer(tmp_path, [editing]).validate(module, tiny.data(), verbose=False)
    assert editing.editor.calls == [] and not any(name.startswith("edit") for name in metrics)


def test_validation_of_a_checkpoint_measures_what_is_left_of_its_edits(run, tiny, make_trainer, tmp_path):
    whole = run("fit_start", epochs=1, callbacks=[_every_epoch(tmp_path / "kept")])
    editing = KnowledgeEditing(tiny.editor(), at="fit_start")
    [metrics] = make_trainer(tmp_path / "again", [editing]).validate(
        tiny.module(), tiny.data(), ckpt_path=tmp_path / "kept" / "epoch=0.ckpt", verbose=False, weights_only=True
    )
    assert editing.editor.calls == [] and len(editing.applied_facts) == 6
    for name in ("edit/efficacy", "edit/efficacy_accuracy", "edit/specificity"):
        assert metrics[name] == pytest.approx(float(whole.trainer.callback_metrics[name]))


def test_the_sanity_check_does_not_edit(tiny, make_trainer, tmp_path):
    seen = []

    class Watched(KnowledgeEditing):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(len(self.editor.calls))

    editing = Watched(tiny.editor(), at="validation")
    make_trainer(tmp_path, [editing], num_sanity_val_steps=1).fit(tiny.module(), tiny.data())
    assert seen == [0] and len(editing.editor.calls) == 1


# -- what is logged, kept, undone -------------------------------------------------------------------------------------


def _logged(folder):
    with (folder / "logs" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_retention_and_the_edit_itself_are_logged(run, tmp_path):
    result = run({"epoch": 1}, epochs=3)
    metrics = result.trainer.callback_metrics
    assert {"edit/efficacy", "edit/generalization", "edit/specificity", "edit/score"} <= metrics.keys()
    exact = result.editing.evaluate(result.module).metrics
    for name, value in metrics.items():
        if name.startswith("edit/"):
            assert float(value) == pytest.approx(exact[name.removeprefix("edit/")]), name
    logged = _logged(tmp_path / "run")
    assert len(logged["edit/efficacy"]) == 2  # validations after epochs 1 and 2; before them nothing was edited
    for name in ("edit_before/efficacy", "edit_after/efficacy", "edit_after/specificity", "edit_seconds/edit"):
        assert len(logged[name]) == 1, name
    assert logged["edit_after/efficacy"][0] > logged["edit_before/efficacy"][0]
    assert not any(value != value for values in logged.values() for value in values)


def test_an_edit_that_is_not_good_enough_is_undone(tiny, make_trainer, tmp_path, caplog):
    noted = {}

    class Watched(KnowledgeEditing):
        def _edit(self, trainer, pl_module, facts):
            before = tiny.weights(pl_module)
            super()._edit(trainer, pl_module, facts)
            if facts:
                noted["before"], noted["after"] = before, tiny.weights(pl_module)

        def should_keep(self, before, after):
            noted["inside"] = tiny.weights(module)
            noted["efficacy"] = after.metrics["efficacy"]
            return super().should_keep(before, after)

    hopeless = tiny.editor(targets=TargetOptimizer(steps=1, learning_rate=1e-3))
    editing = Watched(hopeless, at={"epoch": 1}, min_efficacy=1.0)
    module, data = tiny.module(), tiny.data()
    with caplog.at_level(logging.WARNING, "lit_moeedit"):
        make_trainer(tmp_path, [editing], max_epochs=4).fit(module, data)
    assert noted["efficacy"] < 1
    assert any(not torch.equal(noted["inside"][name], tensor) for name, tensor in noted["before"].items())
    _same(noted["before"], noted["after"])
    assert len(editing.editor.calls) == 1  # not tried again in every epoch
    assert editing.applied_facts == [] and editing.pending_facts == [] and len(editing.edited_facts) == 6
    assert len(editing.state_dict()["undone"]) == 6 and data.state_dict() == {"excluded": []}
    assert "undid the edit of 6 facts" in caplog.text


def test_facts_that_are_edited_and_not_said_are_named(tiny, make_trainer, tmp_path, caplog):
    events = []

    class Heard(EditListener):
        def on_edit_end(self, trainer, pl_module, event):
            events.append(event)

    hopeless = tiny.editor(targets=TargetOptimizer(steps=1, learning_rate=1e-3))
    editing = KnowledgeEditing(hopeless, at="fit_start", on_failure="keep")
    with caplog.at_level(logging.WARNING, "lit_moeedit"):
        make_trainer(tmp_path, [editing, Heard()], max_epochs=1).fit(tiny.module(), tiny.data())
    assert events[0].missed == editing.facts  # the model is not trained yet, and is hardly changed
    assert "6 of 6 facts are not generated after the edit:" in caplog.text
    assert f"6x target not found, such as {editing.facts[0].prompt!r}: " in caplog.text
    assert repr(editing.facts[5].prompt) not in caplog.text


def test_min_specificity_retained(tiny):
    editing = KnowledgeEditing(tiny.editor(), min_efficacy=0.5, min_specificity_retained=0.8)

    def evaluation(efficacy, retained):
        succeeded = torch.arange(10) < 10 * efficacy
        return SimpleNamespace(edits_succeeded=succeeded, metrics={"specificity_retained": retained})

    assert editing.should_keep(None, evaluation(0.5, 0.8))
    assert not editing.should_keep(None, evaluation(0.4, 0.9))
    assert not editing.should_keep(None, evaluation(0.9, 0.7))
    assert editing.should_keep(None, evaluation(0.9, float("nan")))  # no neighbour was said right before


def test_statements_of_edited_facts_leave_the_batches(tiny, make_trainer, tmp_path):
    drawn = {}

    class Reader(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            texts = trainer.datamodule.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
            drawn.setdefault(trainer.current_epoch, []).extend(texts)

    editing = KnowledgeEditing(tiny.editor(), at={"epoch": 2})
    data = tiny.data(samples_per_epoch=64)
    told = []
    original = data.facts_edited
    data.facts_edited = lambda facts: (told.append([fact.key for fact in facts]), original(facts))
    make_trainer(tmp_path, [editing, Reader()], max_epochs=4).fit(tiny.module(), data)
    assert told == [[fact.key for fact in editing.facts]]
    prompts = [text for fact in editing.facts for text in (fact.prompt, *fact.paraphrases)]

    def stating(epoch):
        return [text for text in drawn[epoch] if any(prompt in text for prompt in prompts)]

    assert stating(0) and stating(1)
    assert not stating(3)
    assert [len(texts) for texts in drawn.values()] == [64] * 4


def _without_truths(facts):
    return [{**fact.to_dict(), "target_true": None} for fact in facts]


@pytest.mark.parametrize(("steps", "kept"), [(1, False), (40, True)])
def test_edits_of_facts_without_a_truth_are_guarded_by_what_is_generated(
    tiny, make_trainer, tmp_path, caplog, steps, kept
):
    targets = TargetOptimizer(steps=steps, learning_rate=0.5 if kept else 1e-3, clamp=8.0, weight_decay=0.0)
    facts = _without_truths(tiny.data().edit_facts())[:2]
    events = []

    class Heard(EditListener):
        def on_edit_end(self, trainer, pl_module, event):
            events.append(event)

    editing = KnowledgeEditing(tiny.editor(targets=targets), facts=facts, min_efficacy=1.0)
    make_trainer(tmp_path, [editing, Heard()], max_epochs=1).fit(tiny.module(), tiny.data())
    (event,) = events
    assert event.result.kept is kept and len(editing.applied_facts) == 2 * kept
    assert event.after.edits_succeeded.tolist() == event.after.edits_exact.tolist()
    assert bool(event.after.edits_exact.all()) is kept
    assert "edit_after/efficacy" not in event.metrics and "edit_after/efficacy_accuracy" in event.metrics
    assert "nan" not in str(event) and "efficacy_accuracy" in str(event)


def test_facts_may_be_objects_of_any_format(tiny, make_trainer, tmp_path):
    fact = tiny.data().edit_facts()[0]
    rows = [{"who": fact.subject, "asked": fact.prompt, "answer": {"str": fact.target_new}}]
    columns = {"subject": "who", "prompt": "asked", "target_new": "answer"}
    editing = KnowledgeEditing(tiny.editor(), facts=rows, columns=columns)
    make_trainer(tmp_path / "columns", [editing], max_epochs=1).fit(tiny.module(), tiny.data())
    assert [found.key for found in editing.applied_facts] == [fact.key]
    editing = KnowledgeEditing(tiny.editor(), facts=[{**rows[0], "target_new": 5}])
    with pytest.raises(FactError, match="facts, row 1: has 'who', 'asked', 'answer', 'target_new', which is no known"):
        make_trainer(tmp_path / "bad", [editing], max_epochs=1).fit(tiny.module(), tiny.data())


def test_long_texts_are_cut_once_in_a_run(tiny, make_trainer, tmp_path, caplog):
    texts = tiny.data()
    texts.setup("fit")
    lines = [*texts.preservation_texts()[:20], "The capital of Chile is Santiago. " * 3000]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    editing = KnowledgeEditing(tiny.editor(), at={"every_n_epochs": 1, "batch": 2}, preservation=str(path))
    monitor = RoutingMonitor(probe=[*lines[:3], lines[-1]])
    make_trainer(tmp_path, [editing, monitor], max_epochs=3).fit(tiny.module(), tiny.data())
    assert len(editing.editor.calls) == 2
    # however many edits and traces there were
    for count in (21, 4):
        assert caplog.text.count(f"1 of {count} texts are cut before they are tokenized (the longest has 102,000") == 1


def test_facts_beyond_the_window_are_remarked_at_the_start(tiny, make_trainer, tmp_path, caplog):
    module = tiny.module(config={"max_position_embeddings": 4})
    editing = KnowledgeEditing(tiny.editor(), at={"epoch": 1})
    make_trainer(tmp_path, [editing], max_epochs=2).fit(module, tiny.data())
    assert caplog.text.count("6 of 6 facts have texts beyond the 4 tokens of the model's context window") == 1
