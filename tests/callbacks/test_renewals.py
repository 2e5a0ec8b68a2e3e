"""Renewals of edits that training has undone: when they come, what they reuse, and after a resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditHold, EditListener, KnowledgeEditing
from lit_moeedit.callbacks.listener import SurvivalEvent
from lit_moeedit.callbacks.renewals import _is_last_step
from lit_moeedit.callbacks.survival import Survival, SurvivalCurve
from lit_moeedit.editing import TargetOptimizer
from lit_moeedit.editing import editor as editor_module
from lit_moeedit.editing.held_states import edit_prompts, measure_states, relative_distance
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.solvers import Tucker, Woodbury

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(folder, …)``: an edit before the second of four epochs of 4 steps; counts searches and passes over text."""
    searched: list[int] = []
    passes: list[int] = []
    optimize, moments = TargetOptimizer.optimize, editor_module.second_moments

    def search(self: Any, model: Any, layer: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        searched.append(len({row.edit for row in rows}))
        return optimize(self, model, layer, rows, *args, **kwargs)

    def read(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        return moments(*args, **kwargs)

    monkeypatch.setattr(TargetOptimizer, "optimize", search)
    monkeypatch.setattr(editor_module, "second_moments", read)

    def fit(folder: str = "run", callbacks: Any = (), ckpt: Any = None, editor: Any = None, **settings: Any) -> Any:
        searched.clear(), passes.clear()
        keys = {"renew_below": 0.95, "survival_every_n_steps": 4, **settings}
        editing = KnowledgeEditing(editor or tiny.editor(steps=12), at={"epoch": 1}, **keys)
        module, trainer = tiny.module(), make_trainer(tmp_path / folder, [editing, *callbacks], max_epochs=4)
        trainer.fit(module, tiny.data(), **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        weights = tiny.weights(module)
        return SimpleNamespace(editing=editing, searched=list(searched), passes=len(passes), weights=weights)

    return fit


def points(editing: KnowledgeEditing) -> list[tuple[int, str | None]]:
    return [(point.step, point.after) for point in editing.survival.points]


def test_a_renewal_by_need_reuses_targets_and_moments(run: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", "lit_moeedit"):
        found = run()
    assert found.searched == [6] and found.passes == 1  # those of the edit
    assert found.editing.renewals >= 1
    for before, after in zip(found.editing.survival.points, found.editing.survival.points[1:], strict=False):
        if after.after == "renewal":
            assert before.step == after.step and before.generated < after.generated == 6
        else:
            assert after.step == before.step + 4
    assert "of 6 facts 5 were lost, now 0 (known targets 5, searched anew 0)" in caplog.text
    # seen: training loses five of the six edits in an epoch
    assert found.editing.survivors is not None and found.editing.survivors.generated == 6


def test_the_last_step_is_a_point_of_renewals_by_need(run: Any) -> None:
    found = run(survival_every_n_steps=1000)  # no other point comes
    first, *others = points(found.editing)
    assert first == (4, "edit") and others == [(16, None), (16, "renewal")]
    left = found.editing.survival.points
    assert left[1].generated < 6 and left[2].generated == found.editing.survivors.generated == 6


def test_renewals_at_the_end_leave_training_alone(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = run(renew_at="end")
    assert points(found.editing)[1:] == [(8, None), (12, None), (16, None), (16, "renewal")]
    assert found.editing.survivors.generated == 6 and "not renewed" not in caplog.text


def test_a_run_that_ends_early_says_that_nothing_was_renewed(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 10

    found = run(callbacks=[Stop()], renew_at="end", survival_every_n_steps=100)
    assert found.editing.renewals == 0 and found.editing.survivors.generated < 6
    assert "edits are not renewed at the end: the run has not ended with its last planned step" in caplog.text


@pytest.mark.parametrize(("step", "is_last"), [(4, False), (5, True), (6, True)])
def test_two_optimizers_may_step_over_the_last_step(step: int, is_last: bool) -> None:
    trainer = SimpleNamespace(callbacks=[], max_epochs=-1, current_epoch=0, max_steps=5, global_step=step)
    assert _is_last_step(trainer) is is_last


def test_a_last_point_that_fails_renews_nothing(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither by the point before it, after which too little was left."""
    add_point = SurvivalCurve.add_point

    def fail(curve: SurvivalCurve, editing: Any, trainer: Any, *args: Any) -> Any:
        if trainer.global_step == 16:
            raise RuntimeError("no memory")
        return add_point(curve, editing, trainer, *args)

    monkeypatch.setattr(SurvivalCurve, "add_point", fail)
    monkeypatch.setattr(Survival, "share", 0.0)
    found = run(survival_every_n_steps=1000, renew_at="end")
    assert points(found.editing) == [(4, "edit")] and found.editing.renewals == 0
    assert "the last point of the survival curve failed: no memory" in caplog.text


def test_edits_that_hold_are_not_renewed_by_need(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    every_fact_is_generated(monkeypatch)
    found = run()
    assert found.editing.renewals == 0 and found.searched == [6]
    assert points(found.editing) == [(4, "edit"), (8, None), (12, None), (16, None)]


class Distances(EditListener):
    """By fact, the squared relative distance of its hidden states from its goal, at each point of the curve."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_survival(self, trainer: L.Trainer, pl_module: L.LightningModule, event: SurvivalEvent) -> None:
        editing = trainer.callbacks[0]  # type: ignore[attr-defined]
        prompts = edit_prompts(editing.tokenizer, event.facts, editing.editor.contexts, editing.editor.token)
        model = find_model(pl_module)
        layer = expert_layers(model)[max(editing.editor.layers)]
        states = {key: measure_states(model, layer, own, 0, 512) for key, own in prompts.items()}
        goals = editing._kept.goals
        self.found.append({key: float(relative_distance(states[key], goal)) for key, goal in goals.items()})


def every_fact_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = KnowledgeEditing.evaluate

    def hold(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        return replace(found, edits_exact=torch.ones_like(found.edits_exact))

    monkeypatch.setattr(KnowledgeEditing, "evaluate", hold)


@pytest.mark.parametrize("are_lost", [True, False], ids=["some lost", "none lost"])
def test_all_edits_are_brought_back(run: Any, monkeypatch: pytest.MonkeyPatch, are_lost: bool) -> None:
    """Also those that are still generated, and if all are: their hidden states have moved, too."""
    distances = Distances()
    if not are_lost:
        every_fact_is_generated(monkeypatch)
    found = run(callbacks=[distances], renewal="all", renew_at="end", renew_below=None, survival_every_n_steps=1000)
    assert points(found.editing) == [(4, "edit"), (16, None), (16, "renewal")] and found.searched == [6]
    assert found.editing.renewals == 1 and found.passes == 1
    _, before, after = distances.found
    assert set(before) == set(after) and len(before) == 6
    # seen: at most 0.06 of what it was
    assert all(after[key] < 0.1 * before[key] for key in before)


def test_a_resumed_run_brings_all_edits_back_as_the_whole_one(run: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = {"renewal": "all", "renew_at": "end", "renew_below": None, "survival_every_n_steps": 1000}
    whole = run(callbacks=[kept], **settings)
    again = run("again", ckpt=tmp_path / "kept" / "epoch=1.ckpt", **settings)
    assert whole.editing.renewals == again.editing.renewals == 1 and again.searched == [] and again.passes == 0
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


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


def test_edits_are_replaced_by_those_of_the_present_weights(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing has learned since, that is the edit itself: made once more on top it would be larger."""
    every_fact_is_generated(monkeypatch)
    edited, replaced, again = (
        run(callbacks=[AtRest()], **settings)
        for settings in ({"renew_below": None}, {"renewal": "replace", **AT_END}, {"renewal": "anew", **AT_END})
    )
    assert replaced.editing.renewals == 1 and replaced.searched == [6, 6] and replaced.passes == 2
    names = [name for name in edited.weights if name.endswith("down_proj")]
    change = sum(float((edited.weights[name] - replaced.weights[name]).norm()) for name in names)
    size = sum(float(own.square_norm()) ** 0.5 for own in replaced.editing._kept.changes[0].deltas.values())
    assert len(replaced.editing._kept.changes) == 1 and change < 1e-3 * size
    assert again.editing.renewals == 0  # nothing is lost


def test_a_resumed_run_replaces_as_the_whole_one(run: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = {"renewal": "replace", "renew_below": None, "renew_every_n_steps": 4}
    whole = run(callbacks=[kept], **settings)
    # with the change of a renewal, which has taken the place of that of the edit
    again = run("again", ckpt=tmp_path / "kept" / "epoch=2.ckpt", **settings)
    assert whole.editing.renewals == again.editing.renewals == 3 and again.searched == [6]
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


@pytest.fixture
def replaced(run: Any, tmp_path: Path) -> Path:
    """The checkpoint of a run that has changes to take out."""
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    assert len(run(callbacks=[kept], renewal="replace", **AT_END).editing._kept.changes) == 1
    return tmp_path / "kept" / "epoch=2.ckpt"


@pytest.mark.parametrize("other", ["facts", "layers"])
def test_changes_of_other_facts_or_layers_stay(
    run: Any, tiny: Any, replaced: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without them facts that a resumed run does not list would be lost unseen."""
    facts = tiny.data().corpus.edits
    own = {"facts": list(facts[:4])} if other == "facts" else {"editor": tiny.editor(layers=[1], steps=12)}
    found = run("again", ckpt=replaced, renewal="replace", **AT_END, **own)
    assert "the changes of some edits (6 of 6 facts) stay in the weights, and others are added" in caplog.text
    assert found.editing.renewals == 1
    assert [len(change.facts) for change in found.editing._kept.changes] == ([6, 4] if other == "facts" else [6, 6])


def test_another_kind_of_renewal_takes_nothing_out(run: Any, replaced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it adds is not known, so a later run takes nothing out of it either."""

    class Forget(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            editing = trainer.callbacks[0]  # type: ignore[attr-defined]
            editing._kept = replace(editing._kept, changes=())

    settings = {"renewal": "anew", **AT_END}
    lost = KnowledgeEditing._lost
    monkeypatch.setattr(KnowledgeEditing, "_lost", lambda *a: [*lost(*a), "a fact"])
    found, expected = (
        run(name, ckpt=replaced, callbacks=own, **settings) for name, own in (("a", ()), ("b", [Forget()]))
    )
    assert found.editing.renewals == expected.editing.renewals == 1 and found.editing._kept.changes == ()
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())


def test_a_change_that_is_taken_out_is_forgotten_in_the_transaction(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
        run(renewal="replace", **AT_END)
    assert calls == [0, 0] and seen[0].renewals == 1 and seen[0]._kept.changes == ()


def test_a_run_without_the_edited_facts_renews_nothing(run: Any, tiny: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    facts = list(tiny.data().corpus.edits)
    run(callbacks=[kept], renew_below=None, facts=facts[:3])
    settings = {"renewal": "anew", "renew_below": None, "renew_every_n_steps": 1}
    found = run("again", ckpt=tmp_path / "kept" / "epoch=2.ckpt", facts=facts[3:], **settings)
    assert found.editing.renewals == 0 and not found.editing.applied_facts


def test_changes_that_are_not_known_stay(run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(callbacks=[kept], renew_below=None)
    found = run("again", ckpt=tmp_path / "kept" / "epoch=2.ckpt", renewal="replace", **AT_END)
    assert found.editing.renewals == 1 and len(found.editing._kept.changes) == 1
    assert "the changes of some edits (6 of 6 facts) stay in the weights, and others are added" in caplog.text


def test_edits_whose_hidden_states_are_not_known_stay_as_they_are(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as those of a checkpoint of a run without renewals."""

    class Forget(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            editing = trainer.callbacks[0]  # type: ignore[attr-defined]
            editing._kept = replace(editing._kept, goals={})

    every_fact_is_generated(monkeypatch)
    settings = {"renew_below": None, "survival_every_n_steps": 1000}
    found = run(callbacks=[Forget()], renewal="all", renew_at="end", **settings)
    assert found.editing.renewals == 0 and found.passes == 1
    assert "6 of 6 edits are not brought back: their hidden states are not known" in caplog.text
    assert "not renewed at the end" not in caplog.text
    plain = run("plain", **settings)
    assert all(torch.equal(found.weights[name], weight) for name, weight in plain.weights.items())


def test_a_renewal_that_falls_short_keeps_the_goals(run: Any) -> None:
    """The next one aims where the edit did, and not where a clamped renewal came to."""
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(EditListener):
        def on_survival(self, trainer: L.Trainer, pl_module: L.LightningModule, event: SurvivalEvent) -> None:
            kept.append(dict(trainer.callbacks[0]._kept.goals))  # type: ignore[attr-defined]

    found = run(callbacks=[Keep()], renewal="all", renew_below=None, renew_every_n_steps=4)
    assert found.editing.renewals == 3 and len(kept) > 4 and len(kept[0]) == 6
    assert all(torch.equal(own[key], goal) for own in kept for key, goal in kept[0].items())


def test_a_renewal_after_which_more_is_lost_is_undone(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = iter([[], ["a fact"], ["a fact"]])
    monkeypatch.setattr(KnowledgeEditing, "_lost", lambda *_: next(lost))
    found = run(renewal="all", renew_at="end", renew_below=None, survival_every_n_steps=1000)
    assert found.editing.renewals == 0 and "a renewal was undone: more facts were lost" in caplog.text
    plain = run("plain", renew_below=None, survival_every_n_steps=1000)
    assert all(torch.equal(found.weights[name], weight) for name, weight in plain.weights.items())


def test_the_number_of_renewals_is_limited(run: Any) -> None:
    assert run(max_renewals=1).editing.renewals == 1


def test_anew_searches_and_reads_the_text_again(run: Any) -> None:
    found = run(renewal="anew", max_renewals=1)
    assert found.searched == [6, 6] and found.passes == 2
    assert found.editing.state_dict()["kept"] is None


@pytest.mark.parametrize("is_there", [True, False], ids=["moments on disk", "moments gone"])
def test_a_resumed_run_renews_as_the_whole_one(run: Any, tmp_path: Path, is_there: bool, caplog: Any) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run(callbacks=[kept], max_renewals=2)
    assert whole.editing.renewals == 2
    if not is_there:
        shutil.rmtree(tmp_path / "run" / "logs" / "moments")
    # a renewal in the checkpoint, and one to come
    again = run("again", ckpt=tmp_path / "kept" / "epoch=1.ckpt", max_renewals=2)
    assert again.editing.renewals == 2 and again.searched == []
    assert again.passes == (0 if is_there else 1)
    assert ("second moments of the edit are not in" in caplog.text) is not is_there
    if is_there:
        assert points(again.editing) == points(whole.editing)
        assert again.editing.survival == whole.editing.survival
        assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_the_editors_cache_holds_the_moments(run: Any, tiny: Any, tmp_path: Path) -> None:
    found = run(editor=tiny.editor(steps=12, cache=str(tmp_path / "cache")), max_renewals=1)
    assert found.editing.renewals == 1 and found.passes == 1
    assert not (tmp_path / "run" / "logs" / "moments").exists()
    assert found.editing.state_dict()["kept"]["folder"] == str(tmp_path / "cache")


@pytest.mark.parametrize("solver", [Tucker(energy=1.0), Woodbury()], ids=["Tucker", "Woodbury"])
def test_other_solvers_and_preservations_reuse_targets_and_moments(run: Any, tiny: Any, solver: Any) -> None:
    found = run(editor=tiny.editor((1,), steps=25, solver=solver, preserve=CovariancePenalty(1.0)), max_renewals=1)
    assert found.editing.renewals == 1 and found.searched == [6] and found.passes == 1
    before, renewed = next(
        pair
        for pair in zip(found.editing.survival.points, found.editing.survival.points[1:], strict=False)
        if pair[1].after == "renewal"
    )
    assert before.generated < renewed.generated


def test_facts_whose_known_targets_are_stale_are_searched_for(run: Any) -> None:
    class Stale(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            editing = trainer.callbacks[0]  # type: ignore[attr-defined]
            kept = editing._kept
            if trainer.global_step == 5:
                # far from every hidden state that gives an answer
                editing._kept = replace(kept, goals={key: -100 * goal for key, goal in kept.goals.items()})

    found = run(callbacks=[Stale()], max_renewals=1)
    first, second = found.searched
    assert first == 6 and 0 < second < 6 and found.passes == 1
    assert found.editing.renewals == 1
    renewed = next(point for point in found.editing.survival.points if point.after == "renewal")
    assert renewed.generated >= 5


def test_settings_that_do_not_fit_are_refused(tiny: Any) -> None:
    for settings, message in (
        ({"renew_below": 0.0}, r"renew_below is a share in \(0, 1\]"),
        ({"renew_below": 0.9, "renew_every_n_steps": 8}, "renew_every_n_steps or renew_below, not both"),
        ({"renew_at": "end", "renew_every_n_steps": 8}, "renew_every_n_steps or renew_at: end, not both"),
        ({"renewal": "replace"}, "renewal: replace needs a moment"),
        ({"renewal": "replace", "renew_at": "end", "save_edits": True}, "no edit file can say: leave out save_edits"),
        ({"renewal": "all"}, "renewal: all needs a moment: renew_at: end, renew_below or renew_every_n_steps"),
        ({"renew_at": "end", "survival_every_n_steps": 0}, "renew_at: end is due at points of the survival curve"),
        ({"renew_below": 0.9, "renew_at": "start"}, "renew_at must be one of points, end, got 'start'"),
        ({"renew_below": 0.9, "survival_every_n_steps": None}, "renew_below is due at points of the survival curve"),
        ({"renewal": "never"}, "renewal must be one of reuse, all, anew, replace"),
    ):
        with pytest.raises(ValueError, match=message):
            KnowledgeEditing(tiny.editor(), **settings)


def test_edits_of_longer_targets_are_held_and_renewed_after_a_resume(run: Any, tiny: Any, tmp_path: Path) -> None:
    """Facts with targets of different lengths have different numbers of rows, here and in checkpoints."""
    data = tiny.data
    longer = {0: "Lima Oslo Rome", 3: "Tokyo Madrid"}

    def data_with_longer_targets(**changes: Any) -> Any:
        found = data(**changes)
        for number, target in longer.items():
            found.corpus.edits[number] = replace(found.corpus.edits[number], target_new=target)
        return found

    tiny.data = data_with_longer_targets
    settings = {"contexts": ["", "Note:"], "target_tokens": "every", "steps": 40}
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    hold = EditHold(rows=2)
    whole = run(callbacks=[kept, hold], editor=tiny.editor(**settings), max_renewals=2)
    assert whole.searched == [6] and whole.editing.renewals == 2
    rows = sorted(len(goal) for goal in whole.editing._kept.goals.values())
    assert rows[-1] > rows[0] == 2
    assert sorted({len(own) for own in hold._states[whole.editing.label].values()})[-1] == rows[-1]
    resumed = EditHold(rows=2)
    checkpoint = tmp_path / "kept" / "epoch=1.ckpt"
    again = run("again", [resumed], ckpt=checkpoint, editor=tiny.editor(**settings), max_renewals=2)
    assert again.searched == [] and points(again.editing) == points(whole.editing)
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    # of an editor with other edit tokens, the goals of longer targets are of no use
    facts, keys = whole.editing.applied_facts, list(whole.editing._kept.goals)
    assert list(whole.editing._goals(facts, keys)) == keys
    whole.editing.editor.target_tokens = "first"
    short = [key for key, goal in whole.editing._kept.goals.items() if len(goal) == 2]
    assert 0 < len(short) < len(keys)
    assert {key for key, goal in whole.editing._goals(facts, keys).items() if goal is not None} == set(short)
