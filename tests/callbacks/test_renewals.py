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
from lit_moeedit.editing.held_states import edit_prompts, measure_states, relative_distance
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.solvers import Tucker, Woodbury

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


def points(editing: KnowledgeEditing) -> list[tuple[int, str | None]]:
    return [(point.step, point.after) for point in editing.survival.points]


def test_a_renewal_by_need_reuses_targets_and_moments(renewing: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", "lit_moeedit"):
        found = renewing()
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


def test_the_last_step_is_a_point_of_renewals_by_need(renewing: Any) -> None:
    found = renewing(survival_every_n_steps=1000)  # no other point comes
    first, *others = points(found.editing)
    assert first == (4, "edit") and others == [(16, None), (16, "renewal")]
    left = found.editing.survival.points
    assert left[1].generated < 6 and left[2].generated == found.editing.survivors.generated == 6


def test_renewals_at_the_end_leave_training_alone(renewing: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = renewing(renew_at="end")
    assert points(found.editing)[1:] == [(8, None), (12, None), (16, None), (16, "renewal")]
    assert found.editing.survivors.generated == 6 and "not renewed" not in caplog.text


def test_a_run_that_ends_early_says_that_nothing_was_renewed(renewing: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 10

    found = renewing(callbacks=[Stop()], renew_at="end", survival_every_n_steps=100)
    assert found.editing.renewals == 0 and found.editing.survivors.generated < 6
    assert "edits are not renewed at the end: the run has not ended with its last planned step" in caplog.text


@pytest.mark.parametrize(("step", "is_last"), [(4, False), (5, True), (6, True)])
def test_two_optimizers_may_step_over_the_last_step(step: int, is_last: bool) -> None:
    trainer = SimpleNamespace(callbacks=[], max_epochs=-1, current_epoch=0, max_steps=5, global_step=step)
    assert _is_last_step(trainer) is is_last


def test_a_last_point_that_fails_renews_nothing(
    renewing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither by the point before it, after which too little was left."""
    add_point = SurvivalCurve.add_point

    def fail(curve: SurvivalCurve, editing: Any, trainer: Any, *args: Any) -> Any:
        if trainer.global_step == 16:
            raise RuntimeError("no memory")
        return add_point(curve, editing, trainer, *args)

    monkeypatch.setattr(SurvivalCurve, "add_point", fail)
    monkeypatch.setattr(Survival, "share", 0.0)
    found = renewing(survival_every_n_steps=1000, renew_at="end")
    assert points(found.editing) == [(4, "edit")] and found.editing.renewals == 0
    assert "the last point of the survival curve failed: no memory" in caplog.text


def test_edits_that_hold_are_not_renewed_by_need(renewing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    every_fact_is_generated(monkeypatch)
    found = renewing()
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
def test_all_edits_are_brought_back(renewing: Any, monkeypatch: pytest.MonkeyPatch, are_lost: bool) -> None:
    """Also those that are still generated, and if all are: their hidden states have moved, too."""
    distances = Distances()
    if not are_lost:
        every_fact_is_generated(monkeypatch)
    found = renewing(
        callbacks=[distances], renewal="all", renew_at="end", renew_below=None, survival_every_n_steps=1000
    )
    assert points(found.editing) == [(4, "edit"), (16, None), (16, "renewal")] and found.searched == [6]
    assert found.editing.renewals == 1 and found.passes == 1
    _, before, after = distances.found
    assert set(before) == set(after) and len(before) == 6
    # seen: at most 0.06 of what it was
    assert all(after[key] < 0.1 * before[key] for key in before)


def test_a_resumed_run_brings_all_edits_back_as_the_whole_one(renewing: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    settings = {"renewal": "all", "renew_at": "end", "renew_below": None, "survival_every_n_steps": 1000}
    whole = renewing(callbacks=[kept], **settings)
    again = renewing("again", ckpt=tmp_path / "kept" / "epoch=1.ckpt", **settings)
    assert whole.editing.renewals == again.editing.renewals == 1 and again.searched == [] and again.passes == 0
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_a_run_without_the_edited_facts_renews_nothing(renewing: Any, tiny: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    facts = list(tiny.data().corpus.edits)
    renewing(callbacks=[kept], renew_below=None, facts=facts[:3])
    settings = {"renewal": "anew", "renew_below": None, "renew_every_n_steps": 1}
    found = renewing("again", ckpt=tmp_path / "kept" / "epoch=2.ckpt", facts=facts[3:], **settings)
    assert found.editing.renewals == 0 and not found.editing.applied_facts


def test_edits_whose_hidden_states_are_not_known_stay_as_they_are(
    renewing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as those of a checkpoint of a run without renewals."""

    class Forget(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            editing = trainer.callbacks[0]  # type: ignore[attr-defined]
            editing._kept = replace(editing._kept, goals={})

    every_fact_is_generated(monkeypatch)
    settings = {"renew_below": None, "survival_every_n_steps": 1000}
    found = renewing(callbacks=[Forget()], renewal="all", renew_at="end", **settings)
    assert found.editing.renewals == 0 and found.passes == 1
    assert "6 of 6 edits are not brought back: their hidden states are not known" in caplog.text
    assert "not renewed at the end" not in caplog.text
    plain = renewing("plain", **settings)
    assert all(torch.equal(found.weights[name], weight) for name, weight in plain.weights.items())


def test_a_renewal_that_falls_short_keeps_the_goals(renewing: Any) -> None:
    """The next one aims where the edit did, and not where a clamped renewal came to."""
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(EditListener):
        def on_survival(self, trainer: L.Trainer, pl_module: L.LightningModule, event: SurvivalEvent) -> None:
            kept.append(dict(trainer.callbacks[0]._kept.goals))  # type: ignore[attr-defined]

    found = renewing(callbacks=[Keep()], renewal="all", renew_below=None, renew_every_n_steps=4)
    assert found.editing.renewals == 3 and len(kept) > 4 and len(kept[0]) == 6
    assert all(torch.equal(own[key], goal) for own in kept for key, goal in kept[0].items())


def test_a_renewal_after_which_more_is_lost_is_undone(
    renewing: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = iter([[], ["a fact"], ["a fact"]])
    monkeypatch.setattr(KnowledgeEditing, "_lost", lambda *_: next(lost))
    found = renewing(renewal="all", renew_at="end", renew_below=None, survival_every_n_steps=1000)
    assert found.editing.renewals == 0 and "a renewal was undone: more facts were lost" in caplog.text
    plain = renewing("plain", renew_below=None, survival_every_n_steps=1000)
    assert all(torch.equal(found.weights[name], weight) for name, weight in plain.weights.items())


def test_the_number_of_renewals_is_limited(renewing: Any) -> None:
    assert renewing(max_renewals=1).editing.renewals == 1


def test_anew_searches_and_reads_the_text_again(renewing: Any) -> None:
    found = renewing(renewal="anew", max_renewals=1)
    assert found.searched == [6, 6] and found.passes == 2
    assert found.editing.state_dict()["kept"] is None


@pytest.mark.parametrize("is_there", [True, False], ids=["moments on disk", "moments gone"])
def test_a_resumed_run_renews_as_the_whole_one(renewing: Any, tmp_path: Path, is_there: bool, caplog: Any) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = renewing(callbacks=[kept], max_renewals=2)
    assert whole.editing.renewals == 2
    if not is_there:
        shutil.rmtree(tmp_path / "run" / "logs" / "moments")
    # a renewal in the checkpoint, and one to come
    again = renewing("again", ckpt=tmp_path / "kept" / "epoch=1.ckpt", max_renewals=2)
    assert again.editing.renewals == 2 and again.searched == []
    assert again.passes == (0 if is_there else 1)
    assert ("second moments of the edit are not in" in caplog.text) is not is_there
    if is_there:
        assert points(again.editing) == points(whole.editing)
        assert again.editing.survival == whole.editing.survival
        assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_the_editors_cache_holds_the_moments(renewing: Any, tiny: Any, tmp_path: Path) -> None:
    found = renewing(editor=tiny.editor(steps=12, cache=str(tmp_path / "cache")), max_renewals=1)
    assert found.editing.renewals == 1 and found.passes == 1
    assert not (tmp_path / "run" / "logs" / "moments").exists()
    assert found.editing.state_dict()["kept"]["folder"] == str(tmp_path / "cache")


@pytest.mark.parametrize("solver", [Tucker(energy=1.0), Woodbury()], ids=["Tucker", "Woodbury"])
def test_other_solvers_and_preservations_reuse_targets_and_moments(renewing: Any, tiny: Any, solver: Any) -> None:
    found = renewing(editor=tiny.editor((1,), steps=25, solver=solver, preserve=CovariancePenalty(1.0)), max_renewals=1)
    assert found.editing.renewals == 1 and found.searched == [6] and found.passes == 1
    before, renewed = next(
        pair
        for pair in zip(found.editing.survival.points, found.editing.survival.points[1:], strict=False)
        if pair[1].after == "renewal"
    )
    assert before.generated < renewed.generated


def test_facts_whose_known_targets_are_stale_are_searched_for(renewing: Any) -> None:
    class Stale(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            editing = trainer.callbacks[0]  # type: ignore[attr-defined]
            kept = editing._kept
            if trainer.global_step == 5:
                # far from every hidden state that gives an answer
                editing._kept = replace(kept, goals={key: -100 * goal for key, goal in kept.goals.items()})

    found = renewing(callbacks=[Stale()], max_renewals=1)
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


def test_edits_of_longer_targets_are_held_and_renewed_after_a_resume(renewing: Any, tiny: Any, tmp_path: Path) -> None:
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
    whole = renewing(callbacks=[kept, hold], editor=tiny.editor(**settings), max_renewals=2)
    assert whole.searched == [6] and whole.editing.renewals == 2
    rows = sorted(len(goal) for goal in whole.editing._kept.goals.values())
    assert rows[-1] > rows[0] == 2
    assert sorted({len(own) for own in hold._states[whole.editing.label].values()})[-1] == rows[-1]
    resumed = EditHold(rows=2)
    checkpoint = tmp_path / "kept" / "epoch=1.ckpt"
    again = renewing("again", [resumed], ckpt=checkpoint, editor=tiny.editor(**settings), max_renewals=2)
    assert again.searched == [] and points(again.editing) == points(whole.editing)
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    # of an editor with other edit tokens, the goals of longer targets are of no use
    facts, keys = whole.editing.applied_facts, list(whole.editing._kept.goals)
    assert list(whole.editing._goals(facts, keys)) == keys
    whole.editing.editor.target_tokens = "first"
    short = [key for key, goal in whole.editing._kept.goals.items() if len(goal) == 2]
    assert 0 < len(short) < len(keys)
    assert {key for key, goal in whole.editing._goals(facts, keys).items() if goal is not None} == set(short)
