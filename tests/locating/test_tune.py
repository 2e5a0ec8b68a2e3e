"""Settings chosen by trial edits: against edits made by hand, without a trace, the same on all ranks."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact, Neighbour
from lit_moeedit.editing import Editor, Location, Place, TargetOptimizer, evaluate
from lit_moeedit.editing.locating import Trial, tune
from lit_moeedit.editing.locating.trials import Trials
from lit_moeedit.editing.locating.tuning import candidates, choose_settings
from lit_moeedit.preservation import CovariancePenalty, OutputPenalty
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers.deltas import ExpertDeltas
from tests.processes import run_ranks
from tests.sharding import small_edits

SETTINGS = "lit_moeedit.editing.locating.tuning"
OUTPUT = "lit_moeedit.preservation.shaping.OutputPenalty"


def editor(**settings: Any) -> Editor:
    targets = TargetOptimizer(steps=6, learning_rate=0.5, clamp=2.0)
    return Editor([0, 1], **{"token": "last", "targets": targets, "tune": True, **settings})


@pytest.fixture
def telling(facts: list[Fact]) -> list[Fact]:
    """Facts with paraphrases and neighbours, and one with neither."""
    first = facts[0]
    others = [replace(fact, paraphrases=first.paraphrases, neighbours=first.neighbours) for fact in facts[1:3]]
    return [first, *others, replace(facts[3], paraphrases=(), neighbours=())]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{SETTINGS}.FEWEST", 2)


def trial(efficacy: float | None, general: float, kept: float) -> Trial:
    return Trial(Place((0,), "last", 0.3, 0, OUTPUT, 0.05), 0.1, efficacy, general, kept, 1.0, 8)


@pytest.mark.parametrize(
    ("trials", "best", "careful"),
    [
        # the highest score, or the most paraphrases of those that keep as many neighbours but for one in a hundred
        ([trial(1.0, 0.5, 0.9), trial(1.0, 0.7, 0.9), trial(1.0, 0.6, 1.0), trial(1.0, 0.9, 0.88)], 3, 1),
        ([trial(1.0, 0.5, 0.9), trial(1.0, 0.99, 0.4)], 0, 0),
        # of those that generate as many targets
        ([trial(1.0, 0.5, 0.9), trial(0.875, 0.9, 1.0)], 0, 0),
        # the given settings are as good as others, and the first
        ([trial(1.0, 0.5, 0.9), trial(1.0, 0.5, 0.9)], 0, 0),
        ([trial(1.0, 0.5, 0.9), trial(1.0, 0.5, 1.0)], 1, 0),
        # the weights cannot hold the edit of the given settings
        ([trial(None, 0.0, 0.0), trial(1.0, 0.5, 0.9), trial(1.0, 0.6, 0.9)], 2, 2),
        ([trial(None, 0.0, 0.0), trial(1.0, 0.5, math.nan), trial(1.0, 0.6, math.nan)], 1, 1),
        ([trial(None, 0.0, 0.0), trial(0.0, 0.5, 0.9), trial(0.0, 0.6, 0.9)], 1, 2),
        # nothing is known of neighbours, or of an edit
        ([trial(1.0, 0.5, math.nan), trial(1.0, 0.9, math.nan)], 0, 0),
        ([trial(None, 0.5, 0.5), trial(None, 0.9, 0.9)], 0, 0),
    ],
)
def test_the_rule(trials: list[Trial], best: int, careful: int) -> None:
    assert choose_settings(trials) == best and choose_settings(trials, "neighbours") == careful


def test_what_is_tried_begins_with_the_given_settings() -> None:
    tried = candidates(editor(preserve=OutputPenalty(0.2), phrasings=3))
    assert tried[0] == Place((0, 1), "last", 0.2, 3, OUTPUT, 0.05) and len(tried) == len(set(tried)) == 18
    assert {place.layers for place in tried} == {(0, 1), (1,)}
    assert {place.phrasings for place in tried} == {3, 8, 2} and {place.stop for place in tried} == {0.05, 0.3}


def test_no_search_for_targets_ends_before_the_given_stop() -> None:
    tried = candidates(editor(targets=TargetOptimizer(stop=0.5)))
    assert {place.stop for place in tried} == {0.5} and len(tried) == 14


def test_each_trial_is_the_edit_with_its_settings_and_leaves_no_trace(
    model: PreTrainedModel,
    tokenizer: Any,
    telling: Any,
    texts: Any,
    unchanged: Any,
    few: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, values in (("STRENGTHS", (1.0, 0.01)), ("STRENGTHS_ALONE", (1e-3,)), ("FURTHER", ((2, 1.0, 2.0),))):
        monkeypatch.setattr(f"{SETTINGS}.{name}", values)
    before = evaluate(model, tokenizer, telling)
    expected = []
    for place in candidates(editor()):
        own, changed = deepcopy(model), editor(preserve=OutputPenalty(place.strength or 0.0), tune=False)
        changed.layers, changed.phrasings, changed.targets.stop = place.layers, place.phrasings or 0, place.stop or 0.0
        changed.edit(own, tokenizer, telling, texts)
        expected.append(evaluate(own, tokenizer, telling, before.neighbours_exact).metrics)
    unchanged(model)
    searches: list[int] = []
    search = TargetOptimizer.optimize
    monkeypatch.setattr(TargetOptimizer, "optimize", lambda *a, **k: (searches.append(1), search(*a, **k))[1])
    with torch.inference_mode():  # in which Lightning validates
        found = tune(model, tokenizer, telling, texts, editor=editor())
    assert len(searches) == 2 and [trial.place for trial in found.trials] == candidates(editor())
    for trial, metrics in zip(found.trials, expected, strict=True):
        assert trial.facts == 4 and trial.efficacy == metrics["efficacy_accuracy"]
        assert trial.generalization == metrics["generalization_accuracy"]
        assert trial.specificity_retained == pytest.approx(metrics["specificity_retained"], nan_ok=True)
    assert found.chosen == choose_settings(found.trials)


def test_settings_that_differ_in_nothing_share_a_trial(
    model: PreTrainedModel, tokenizer: Any, telling: Any, texts: Any, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = ((2, 1.0, 0.0), (8, 1.0, 0.0))
    for name, values in (("STRENGTHS", (1.0, 0.01)), ("STRENGTHS_ALONE", ()), ("FURTHER", numbers)):
        monkeypatch.setattr(f"{SETTINGS}.{name}", values)
    edited, edit = list[Place](), Trials._edit
    monkeypatch.setattr(Trials, "_edit", lambda self, own, *a: (edited.append(own.place), edit(self, own, *a))[1])

    for prompts, own in (((), 0), (("People ask where a sea lies, which is near",), 2)):
        found: Any = lambda self, model, tokenizer, facts, *args, **kwargs: [[*prompts] for _ in facts]  # noqa: B023, E731
        monkeypatch.setattr(Editor, "find_phrasings", found)
        edited.clear()
        tried = tune(model, tokenizer, telling, texts, editor=editor()).trials
        assert edited == [trial.place for trial in tried[: 3 if prompts else 2]] and len(tried) == 4
        for number in (2, 3):
            assert tried[number] == replace(tried[own], place=candidates(editor())[number])
    change = editor(phrasings=2, tune=False).edit(deepcopy(model), tokenizer, telling, texts).relative_change
    assert tried[2].change == pytest.approx(math.hypot(*change.values())) != pytest.approx(tried[0].change)


def test_an_editor_edits_with_what_it_has_chosen(
    model: PreTrainedModel,
    tokenizer: Any,
    telling: Any,
    texts: Any,
    few: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", "lit_moeedit")
    monkeypatch.setattr(f"{SETTINGS}.choose_settings", lambda *_: 8)  # weak, at the target layer alone
    tuned, other = editor(), deepcopy(model)
    assert tuned.finds_place and not tuned.is_resolved and tuned.place is None
    tuned.edit(model, tokenizer, telling, texts)
    place = Place((1,), "last", 0.3 * 1e-3, 0, OUTPUT, 0.05)
    chosen = "layer 1 at last with strength 0.0003, targets to 0.05 nats chosen of 18 places"
    assert tuned.place == place and chosen in caplog.text
    plain = editor(preserve=OutputPenalty(0.3 * 1e-3), tune=False)
    plain.layers = (1,)
    plain.edit(other, tokenizer, telling, texts)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tuned.place = None  # such as for another model
    assert tuned.layers == (0, 1) and tuned.strength == 0.3 and not tuned.is_resolved


def test_a_trial_that_overflows_the_weights_is_one_without_an_edit(
    model: PreTrainedModel,
    tokenizer: Any,
    telling: Any,
    texts: Any,
    unchanged: Any,
    few: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(f"{SETTINGS}.STRENGTHS", (1.0, 3.0, 0.1))
    expected = tune(model, tokenizer, telling, texts, editor=editor()).trials
    overflowing_trial(monkeypatch, 1)
    found = tune(model, tokenizer, telling, texts, editor=editor())
    unchanged(model)
    assert (
        "a trial of layers 0, 1 at last with strength 0.9, targets to 0.05 nats made no edit: a delta has"
        in caplog.text
    )
    assert found.trials[1] == Trial(expected[1].place, expected[1].nll, facts=4) and found.chosen != 1
    for number in {*range(len(expected))} - {1}:
        assert found.trials[number].to_dict() == expected[number].to_dict()


def overflowing_trial(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let the deltas of a trial not be finite, as a weak preservation can make them in float16."""
    trials: list[Place] = []
    edit, is_finite = Trials._edit, ExpertDeltas.is_finite
    patch.setattr(Trials, "_edit", lambda self, trial, *a: (trials.append(trial.place), edit(self, trial, *a))[1])
    patch.setattr(ExpertDeltas, "is_finite", lambda self: len(trials) != number + 1 and is_finite(self))


def test_layers_and_token_are_found_first(
    model: PreTrainedModel, tokenizer: Any, telling: Any, texts: Any, few: None
) -> None:
    found = Editor("auto", token="auto", tune=True, targets=TargetOptimizer(steps=2))
    found.edit(model, tokenizer, telling, texts)
    assert (
        found.place is not None and found.place.strength is not None and found.place.token in ("subject_last", "last")
    )


def test_facts_by_which_nothing_can_be_told_keep_the_given_settings(
    model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lit_moeedit")
    tuned = editor(phrasings=1)
    tuned.edit(model, tokenizer, facts, texts)
    assert tuned.place == Place((0, 1), "last", 0.3, 1, OUTPUT, 0.05)
    assert "the editor is not tuned: of 2 facts with paraphrases and neighbours nothing could be told" in caplog.text
    assert "with strength 0.3, targets to 0.05 nats, 1 further prompts, without trials" in caplog.text


def test_what_does_not_fit_is_refused(
    model: PreTrainedModel, tokenizer: Any, telling: Any, texts: Any, few: None
) -> None:
    for preserve in ("none", "nullspace", CovariancePenalty(0.0)):
        with pytest.raises(ValueError, match="tune needs a preservation with a strength above 0"):
            editor(preserve=preserve)
    with pytest.raises(ValueError, match="tune must be true, false or 'neighbours', got 'score'"):
        editor(tune="score")
    with pytest.raises(ValueError, match="the editor needs preservation text to be tuned"):
        tune(model, tokenizer, telling, editor=editor())
    for wrong, message in (
        (editor(tune=False, preserve="none"), "a preservation with a strength above 0 to be tuned"),
        (Editor("auto"), "needs layers and a token to be tuned"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(model, tokenizer, telling, texts, editor=wrong)
    with pytest.raises(ValueError, match="tune_facts must be at least 2, got 1"):
        tune(model, tokenizer, telling, editor=editor(), tune_facts=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"strength": 0},
        {"strength": "1"},
        {"strength": math.inf},
        {"strength": True},
        {"phrasings": -1},
        {"stop": -1},
        {"stop": "0"},
        {"stop": math.nan},
    ],
)
def test_a_damaged_place_is_refused(changes: dict[str, Any]) -> None:
    place = Place((0,), "last", 0.3, 2, OUTPUT, 0.15)
    assert Place.from_dict(json.loads(json.dumps(place.to_dict()))) == place
    with pytest.raises(ValueError, match=r"expected a (strength above 0 and a number of phrasings|stop of at least 0)"):
        Place.from_dict(place.to_dict() | changes)


def test_the_table_fits_into_80_columns() -> None:
    place = Place((45, 46, 47), "subject_last", 3e-5, 8, OUTPUT, 0.15)
    console = Console(width=80, record=True, file=StringIO())
    console.print(
        Location(
            (Trial(place, 10.25, 1.0, 0.5, 1.0, 12.345, 8), Trial(replace(place, stop=None), 9.0)),
            0,
            None,
            {"edits": 1.0},
        ).table()
    )
    text = console.export_text()
    assert "…" not in text and "45, 46, 47" in text and "3e-05" in text and "12.345" in text and "0.75" in text


def tuned_on_a_rank(kind: str) -> tuple[Any, list[Trial], bool]:
    """Each rank would choose other settings by itself."""
    model, optimizers, read = small_edits.prepared(kind)
    before = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{SETTINGS}.choose_settings", lambda *_: 5 + Ranks.current().rank)
        found = small_tune(model, optimizers=optimizers)
    is_same = all(torch.equal(a, b) for a, b in zip(before, read(), strict=True))
    return found.place, list(found.trials), is_same


def small_tune(model: PreTrainedModel, **settings: Any) -> Location:
    neighbours = (Neighbour("The sea lies in", "Italy"), Neighbour("In Russia one hears", "Russian"))
    paraphrases = small_edits.FACTS[0].paraphrases
    facts = [replace(fact, paraphrases=paraphrases, neighbours=neighbours) for fact in small_edits.FACTS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{SETTINGS}.FEWEST", 3)
        own = small_edits.editor(tune=True)
        return tune(model, small_edits.tokenizer(), facts, small_edits.TEXTS, editor=own, **settings)


def tuned_where_one_rank_overflows() -> list[Trial]:
    with pytest.MonkeyPatch.context() as patch:
        if Ranks.current().rank:
            overflowing_trial(patch, 2)
        return list(small_tune(small_edits.model()).trials)


def test_all_ranks_leave_out_a_trial_that_overflows_on_one() -> None:
    alone = small_tune(small_edits.model()).trials
    for trials in run_ranks(tuned_where_one_rank_overflows, 2):
        assert [trial.efficacy is None for trial in trials] == [number == 2 for number in range(len(alone))]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_ranks_with_sharded_weights_choose_as_one_process() -> None:
    alone = small_tune(small_edits.model()).trials
    for place, trials, is_same in run_ranks(tuned_on_a_rank, 2, "zero 3"):
        assert place == alone[5].place and is_same
        for trial, expected in zip(trials, alone, strict=True):
            assert (trial.place, trial.efficacy) == (expected.place, expected.efficacy)
            # float32, summed in another order
            assert trial.change == pytest.approx(expected.change, rel=1e-3)


def test_a_place_of_another_editor_is_taken_as_far_as_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    place = Place((1,), "last", 0.003, 2, OUTPUT, 0.15)
    for own, expected, message in (
        (editor(), place, ""),
        (Editor("auto", token="auto", tune=True), place, ""),
        (Editor("auto", token="auto"), Place((1,), "last"), ""),
        (editor(tune=False), Place((0, 1), "last"), ""),
        # layers that were given stay, and so does a strength of another kind
        (Editor([2, 3], token="last", tune=True), Place((2, 3), "last", 0.3, 0, OUTPUT, 0.05), "not tuned"),
        (
            editor(preserve=CovariancePenalty(100.0)),
            Place((1,), "last", 100.0, 0, OUTPUT.replace("OutputPenalty", "CovariancePenalty"), 0.05),
            "the strength 0.003 of the edits so far is one of",
        ),
    ):
        caplog.clear()
        caplog.set_level("INFO", "lit_moeedit")
        own.place = place
        assert own.place == expected and (message in caplog.text if message else not caplog.records)
        own.place = None
        assert (not own.is_resolved or not own.finds_place) and own.targets.stop == 0.05
    # of an earlier version, whose places have no stop
    own = editor()
    own.place = place
    own.place = replace(place, stop=None, phrasings=None)
    assert own.place == replace(place, stop=0.05, phrasings=0)
    given = Editor("auto")
    given.preserve, given.phrasings = None, 4
    given.place = None
    assert given.preserve is None and given.phrasings == 4


def test_the_yaml_of_what_was_chosen_makes_the_editor() -> None:
    place = Place((1,), "last", 0.003, 2, OUTPUT, 0.15)
    given = replace(place, stop=0.05)
    location = Location((Trial(given, 0.1, facts=8), Trial(place, 0.1, facts=8)), 1, None, {})
    assert "targets" not in yaml.safe_load(replace(location, chosen=0).yaml())
    found = yaml.safe_load(location.yaml())
    assert found == {
        "layers": [1], "token": "last", "phrasings": 2,
        "preserve": {"class_path": OUTPUT, "init_args": {"strength": 0.003}},
        "targets": {"class_path": "lit_moeedit.editing.TargetOptimizer", "init_args": {"stop": 0.15}},
    }  # fmt: skip


def test_neighbours_that_were_never_answered_tell_nothing(
    model: PreTrainedModel, tokenizer: Any, telling: Any, texts: Any, few: None, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(f"{SETTINGS}.STRENGTHS", (1.0,))
    unknown = [replace(fact, neighbours=(Neighbour("A lake", "Zzyzx"),)) for fact in telling[:3]]
    assert tune(model, tokenizer, unknown, texts, editor=editor()).chosen == 0
    assert "no neighbour is answered right before the edit" in caplog.text
