"""Further measures in runs: in logs, summary and report, and without a trace in training."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.callbacks.totals import EditTotals, intervals_of, mean_of
from lit_moeedit.data.facts import Probe
from lit_moeedit.editing.further import MEASURES
from lit_moeedit.metrics import bootstrap_interval
from lit_moeedit.preservation import NullSpace

AT_EACH = {"generation_exact", "generation_contained", "fluency", "portability", "probability_gap",
           "log_probability_gap", "copy_accuracy", "held_out_accuracy", "other_style_perplexity"}  # fmt: skip
OF_AN_EDIT = {"weight_growth_max", "weight_growth_mean", "null_space_rank_mean", "null_space_rank_min",
              "template_routing_similarity"}  # fmt: skip


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("lit_moeedit.editing.further.FLUENCY_TOKENS", 8)
    # two texts take less time than sixty
    monkeypatch.setattr("lit_moeedit.callbacks.measures.neutral_texts", lambda: ["<b>One</b> text.", "Another."])

    def fit(name: str, at: Any = None, epochs: int = 2, **settings: Any) -> SimpleNamespace:
        facts = [
            replace(fact, probes=(Probe("portability", fact.prompt, (fact.target_new, "another")),))
            for fact in tiny.corpus().edits
        ]
        # a strict threshold leaves the tiny experts some directions
        editor = tiny.editor(preserve=NullSpace(0.5))
        editing = KnowledgeEditing(editor, facts, at or {"epoch": 1}, on_failure="keep", **settings)
        trainer = make_trainer(tmp_path / name, [editing, EditReport(console=False)], max_epochs=epochs)
        module = tiny.module()
        trainer.fit(module, tiny.data())
        with (tmp_path / name / "logs" / "metrics.csv").open() as file:
            logged = {key for row in csv.DictReader(file) for key, value in row.items() if value}
        return SimpleNamespace(
            folder=tmp_path / name,
            weights=tiny.weights(module),
            random=torch.get_rng_state(),
            summary=json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8")),
            page=(tmp_path / name / "report.html").read_text(encoding="utf-8"),
            logged=logged,
        )

    return fit


def test_measures_are_everywhere_and_leave_training_bit_identical(run: Any) -> None:
    plain, found = run("plain"), run("measured", measure=list(MEASURES))
    assert plain.weights.keys() == found.weights.keys()
    assert all(torch.equal(value, found.weights[name]) for name, value in plain.weights.items())
    assert torch.equal(plain.random, found.random)

    for moment, names in (("before", AT_EACH), ("after", AT_EACH | OF_AN_EDIT), ("after_training", AT_EACH)):
        metrics, usual = found.summary[moment], plain.summary[moment]
        assert {name: metrics[name] for name in usual} == usual
        # the facts have probes of one kind, so nothing is known of the others
        assert {name for name, value in metrics.items() if value is not None and name not in usual} == names
        intervals = found.summary["intervals"][moment]
        assert {"efficacy", "generation_exact", "portability", "held_out_accuracy"} <= intervals.keys()
        for name, (low, high) in intervals.items():
            # the metrics are float32
            assert low - 1e-6 <= metrics[name] <= high + 1e-6, name
        assert plain.summary["intervals"][moment].items() <= intervals.items()
    assert {f"edit_before/{name}" for name in AT_EACH} <= found.logged
    assert {f"edit_after/{name}" for name in AT_EACH | OF_AN_EDIT} <= found.logged
    assert not any("fluency" in name for name in plain.logged)
    assert found.summary["after"]["portability"] == found.summary["after"]["efficacy_accuracy"]
    for text in (
        "generation exact",
        "null space rank min",
        "variety of the words",
        "bootstrap interval over the facts",
    ):
        assert text in found.page, text


@pytest.mark.slow
def test_intervals_of_several_edits_are_over_all_facts(run: Any) -> None:
    found = run("batches", at={"every_n_epochs": 1, "batch": 3}, epochs=3)
    assert found.summary["edits"] == 6
    low, high = found.summary["intervals"]["after"]["efficacy_accuracy"]
    right = round(6 * found.summary["after"]["efficacy_accuracy"])
    # which of the facts they are does not change how wide it is, but the draws are of facts in their order
    bounds = [
        bootstrap_interval(torch.tensor(values)).tolist()
        for values in ([1.0] * right + [0.0] * (6 - right), [0.0] * (6 - right) + [1.0] * right)
    ]
    assert [low, high] == pytest.approx(bounds[0], abs=0.2) and 0 <= low <= right / 6 <= high <= 1
    assert found.summary["before"]["efficacy_accuracy"] == 0.0
    assert found.summary["intervals"]["before"]["efficacy_accuracy"] == [0.0, 0.0]


def test_unknown_names_are_refused_at_construction(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"measure has 'portabilty' \(did you mean 'portability'\?\)"):
        KnowledgeEditing(tiny.editor(), measure=["portabilty"])


def test_what_cannot_be_measured_is_said(tiny: Any, make_trainer: Any, tmp_path: Path, caplog: Any) -> None:
    editing = KnowledgeEditing(
        tiny.editor(), at="fit_start", on_failure="keep", measure=["reversed", "general_ability"]
    )
    data = tiny.data()
    data.held_out_statements = lambda: []
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, [editing], max_epochs=1).fit(tiny.module(), data)
    assert "no fact has probes for measure: reversed, so nothing is measured there" in caplog.text
    assert "no held_out_statements() of a data module, so no held_out_accuracy is measured" in caplog.text


def test_facts_without_probes_have_no_weight_among_edits() -> None:
    totals = EditTotals()
    # of 20 facts each, one has a probe, which is right, and all have one, which are wrong
    for right, probed in ((1, 1), (0, 20)):
        sums = [[float(i < right) for i in range(20)], [float(i < probed) for i in range(20)]]
        by_fact = {"after": {"portability": sums}}
        totals.add(20, True, {}, {"portability": right / probed}, {}, by_fact=by_fact)
    assert mean_of([totals.after]) == {"portability": 1 / 21}
    low, high = intervals_of(totals.by_fact["after"])["portability"]
    assert low <= 1 / 21 <= high
    assert EditTotals().state().keys() == totals.state().keys() - {"by_fact"}


def test_averages_over_edits_are_those_of_their_facts_together() -> None:
    totals = EditTotals()
    # 10 facts with one paraphrase each, all right; 10 with nine, all wrong
    for right, prompts in ((10.0, 1.0), (0.0, 9.0)):
        by_fact = {"after": {"generalization": [[right / 10] * 10, [prompts] * 10]}}
        totals.add(10, True, {}, {"generalization": right / (10 * prompts)}, {}, by_fact=by_fact)
    assert mean_of([totals.after]) == {"generalization": 10 / 100}
    low, high = intervals_of(totals.by_fact["after"])["generalization"]
    assert low <= 0.1 <= high
