"""Edits that fail or break a guard in a run, and what its report tells of each fact."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditListener, EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.history import History
from lit_moeedit.data import Statement
from lit_moeedit.editing import TargetOptimizer
from lit_moeedit.editing.outcomes import FailedEditError
from lit_moeedit.reports import read_rows
from tests.processes import start_ranks

NOT_OVER = "The run has not ended."


class Noting(EditListener):
    """Notes the weights before and after each edit, and the events."""

    def __init__(self, weights: Any) -> None:
        self.weights, self.before, self.after, self.events = weights, {}, {}, []  # type: ignore[var-annotated]

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Any) -> None:
        self.before = self.weights(pl_module)

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: Any) -> None:
        self.after = self.weights(pl_module)
        self.events.append(event)

    @property
    def is_unchanged(self) -> bool:
        return all(torch.equal(self.after[name], tensor) for name, tensor in self.before.items())


@pytest.fixture
def run(tiny, make_trainer, tmp_path):
    """``run(editor, …)`` fits, with an edit before the second epoch; returns callback, notes and module."""

    def fit(editor=None, folder="run", callbacks=(), data=None, epochs=3, ckpt=None, **settings):
        editing = KnowledgeEditing(editor or tiny.editor(), **{"at": {"epoch": 1}, **settings})
        noting, module = Noting(tiny.weights), tiny.module()
        trainer = make_trainer(tmp_path / folder, [editing, noting, *callbacks], max_epochs=epochs)
        resumed = {"ckpt_path": ckpt, "weights_only": True} if ckpt else {}
        trainer.fit(module, data or tiny.data(), **resumed)
        return editing, noting, module

    return fit


@pytest.fixture
def hopeless(tiny):
    return tiny.editor(targets=TargetOptimizer(steps=1, learning_rate=1e-3))


class TestOnFailure:
    def test_an_edit_of_which_most_facts_fail_is_undone_and_ends_the_run(
        self, run, hopeless, tiny, make_trainer, tmp_path
    ):
        editing = KnowledgeEditing(hopeless, at={"epoch": 1})
        noting, report = Noting(tiny.weights), EditReport(console=False)
        trainer = make_trainer(tmp_path, [editing, noting, report], max_epochs=3, logger=False)
        with pytest.raises(FailedEditError) as caught:
            trainer.fit(tiny.module(), tiny.data())
        lines = str(caught.value).split("\n")
        assert lines[0] == "6 of 6 facts are not generated after the edit:"
        assert lines[1].startswith(
            f"  6x target not found, such as {editing.facts[0].prompt!r}: no target vector was found"
        )
        assert "after 1 step; try more steps" in lines[1]
        assert "on_failure: undo" in lines[-1] and "on_failure: keep" in lines[-1]
        assert noting.is_unchanged and not noting.events[0].result.kept
        # a resumed run edits them again
        assert len(editing.pending_facts) == 6 and editing.state_dict()["undone"] == []
        rows = read_rows(tmp_path / "edits.jsonl")
        assert len(rows) == 6 and not any(row.kept for row in rows)
        assert all(row.reason and "no target vector was found" in row.reason for row in rows)
        assert (tmp_path / "report.html").exists()

    def test_undo(self, run, hopeless, caplog):
        with caplog.at_level(logging.WARNING, "lit_moeedit"):
            editing, noting, _ = run(hopeless, on_failure="undo")
        assert noting.is_unchanged and len(editing.state_dict()["undone"]) == 6 and editing.applied_facts == []
        assert "6x target not found" in caplog.text and len(noting.events) == 1

    def test_keep(self, run, hopeless):
        editing, noting, _ = run(hopeless, on_failure="keep")
        assert not noting.is_unchanged and len(editing.applied_facts) == 6
        assert {reason.code for reason in noting.events[0].reasons.values()} == {"target_not_found"}

    def test_a_guard_that_was_asked_for_comes_first(self, run, hopeless, caplog):
        with caplog.at_level(logging.WARNING, "lit_moeedit"):
            editing, noting, _ = run(hopeless, min_efficacy=1.0)
        assert noting.is_unchanged and len(editing.state_dict()["undone"]) == 6
        assert (
            "min_efficacy (edited prompts for which the new answer is more likely than the old one): " in caplog.text
            and "is below the limit 1" in caplog.text
        )

    def test_another_word_is_refused(self, tiny):
        with pytest.raises(ValueError, match="on_failure must be one of raise, undo, keep, got 'ignore'"):
            KnowledgeEditing(tiny.editor(), on_failure="ignore")  # type: ignore[arg-type]


class TestGuards:
    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"max_perplexity_ratio": 1e-3}, "max_perplexity_ratio"),
            ({"min_routing_similarity": 1.0}, "min_routing_similarity"),
        ],
    )
    def test_an_edit_that_breaks_a_guard_of_the_probe_is_undone(self, run, caplog, settings, name, tmp_path):
        with caplog.at_level(logging.WARNING, "lit_moeedit"):
            editing, noting, _ = run(tiny_editor(), callbacks=[EditReport(console=False)], **settings)
        assert noting.is_unchanged and len(editing.state_dict()["undone"]) == 6
        (figure,) = (figure for figure in noting.events[0].guards if figure.is_broken)
        assert figure.name == name and f"; {name}: {figure.value:.3f} is " in caplog.text
        assert f"edit_after/{name[4:]}" in noting.events[0].metrics
        assert name in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        rows = read_rows(tmp_path / "run" / "edits.jsonl")
        lost = [row for row in rows if not row.measured["end"].holds]
        assert lost and all(row.reason == f"a guard undid the edit, {figure}" for row in lost)

    def test_an_edit_within_the_limits_is_kept(self, run):
        editing, noting, _ = run(max_perplexity_ratio=1e6, min_routing_similarity=1e-6, callbacks=[RoutingMonitor()])
        assert len(editing.applied_facts) == 6
        values = {figure.name: figure.value for figure in noting.events[0].guards}
        assert values.keys() == {"max_perplexity_ratio", "min_routing_similarity"}
        assert 0 < values["min_routing_similarity"] < 1 and values["max_perplexity_ratio"] > 0

    def test_without_text_there_is_nothing_to_guard(self, run, tiny):
        data = tiny.data()
        data.probe_texts = data.preservation_texts = lambda: []  # type: ignore[method-assign]
        with pytest.raises(
            MisconfigurationException, match="max_perplexity_ratio and min_routing_similarity need text"
        ):
            run(tiny.editor(preserve="none"), data=data, max_perplexity_ratio=2.0)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_perplexity_ratio": 0.0}, "max_perplexity_ratio must be positive and finite"),
            ({"max_perplexity_ratio": float("nan")}, "max_perplexity_ratio must be positive and finite"),
            ({"min_routing_similarity": 1.5}, r"min_routing_similarity is a fraction in \[0, 1\], got 1.5"),
        ],
    )
    def test_limits_out_of_range(self, tiny, settings, message):
        with pytest.raises(ValueError, match=message):
            KnowledgeEditing(tiny.editor(), **settings)


def tiny_editor() -> Any:
    from tests.callbacks.conftest import _editor

    return _editor()


class TestFacts:
    def test_each_fact_has_a_row_with_its_measurements(self, run, tmp_path):
        run(callbacks=[EditReport(console=False)], at={"every_n_epochs": 1, "batch": 3})
        rows = read_rows(tmp_path / "run" / "edits.jsonl")
        assert [row.edit for row in rows] == [1, 1, 1, 2, 2, 2] and all(row.kept for row in rows)
        assert [(row.epoch, row.step) for row in rows] == [(1, 4)] * 3 + [(2, 8)] * 3
        for row in rows:
            assert list(row.measured) == ["before", "after", "end"]
            assert row.measured["after"].p_new > row.measured["before"].p_new
            for one in row.measured.values():
                assert one.holds == one.generated.startswith(row.target_new)
            assert (row.reason is None) == row.measured["end"].holds
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert rows[0].prompt in page and NOT_OVER not in page

    def test_training_that_undoes_an_edit_is_the_reason(self, run, tiny, tmp_path):
        """The statements of edited facts stay in the training text, but are given under other prompts."""
        data = tiny.data(drop_edited=False, samples_per_epoch=64)
        run(callbacks=[EditReport(console=False)], data=data, epochs=8)
        rows = read_rows(tmp_path / "run" / "edits.jsonl")
        lost = [row for row in rows if row.measured["after"].holds and not row.measured["end"].holds]
        assert lost
        for row in lost:
            assert row.reason is not None and "the training text contradicts it since the edit at step" in row.reason
            assert f"{row.target_true}" in row.reason

    def test_a_run_that_is_resumed_has_the_facts_edited_before(self, run, tmp_path):
        kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        run(callbacks=[EditReport(console=False), kept])
        run(callbacks=[EditReport(console=False)], folder="again", ckpt=tmp_path / "kept" / "epoch=1.ckpt")
        first, second = (read_rows(tmp_path / folder / "edits.jsonl") for folder in ("run", "again"))
        assert [row.key for row in second] == [row.key for row in first]
        assert [row.measured["before"] for row in second] == [row.measured["before"] for row in first]
        assert all("end" in row.measured for row in second)

    def test_rows_and_page_are_there_from_the_edit_on(self, run, tmp_path):
        found = []

        class Looking(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.current_epoch == 1 and not found:
                    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
                    found.extend([read_rows(tmp_path / "run" / "edits.jsonl"), page])

        run(callbacks=[EditReport(console=False), Looking()])
        assert [list(row.measured) for row in found[0]] == [["before", "after"]] * 6
        assert NOT_OVER in found[1]

    @pytest.mark.slow
    def test_a_run_that_is_killed_leaves_what_was_measured(self, tmp_path):
        (outcome,) = start_ranks(killed_after_its_edit, 1, str(tmp_path), group=False)
        assert outcome.exitcode == -signal.SIGKILL
        rows = read_rows(tmp_path / "edits.jsonl")
        assert len(rows) == 6 and all(list(row.measured) == ["before", "after"] for row in rows)
        assert NOT_OVER in (tmp_path / "report.html").read_text(encoding="utf-8")


def killed_after_its_edit(folder: str) -> None:
    from tests.callbacks.conftest import _data, _module, _trainer

    class Killing(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    callbacks = [KnowledgeEditing(tiny_editor(), at={"epoch": 1}), EditReport(console=False), Killing()]
    _trainer(folder, callbacks, max_epochs=3, logger=False).fit(_module(), _data())


def test_undone_by_training_names_the_steps_between_which_it_happened(run, tmp_path):
    """The last validation that found the fact, and the first that did not."""
    reports: list[EditReport] = []

    class Forgetting(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.start = [parameter.detach().clone() for parameter in pl_module.parameters()]

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 11:  # after the validation at step 8
                for parameter, old in zip(pl_module.parameters(), self.start, strict=True):
                    parameter.data.copy_(old)

    reports.append(EditReport(console=False))
    run(callbacks=[Forgetting(), *reports], epochs=3)
    history: History = reports[0].measured.history
    assert set(history.held_at.values()) <= {4, 8} and 8 in history.held_at.values()
    assert [one.step for one in history.retention] == [8, 12] and set(history.lost_at.values()) <= {8, 12}
    rows = read_rows(tmp_path / "run" / "edits.jsonl")
    lost = [row for row in rows if row.measured["after"].holds and not row.measured["end"].holds]
    assert lost and all(row.reason is not None for row in lost)
    for row in lost:
        held, gone = (steps[f"/{row.key}"] for steps in (history.held_at, history.lost_at))
        assert f"training has undone the edit after step {held} and by step {gone}" in str(row.reason)


def test_statements_with_another_answer_contradict_a_fact(tiny):
    data = tiny.data()
    data.setup("fit")
    fact, other = data.corpus.edits[:2]
    found = data.contradictions([fact, other])
    assert found == {one.key: f"{one.prompt} {one.target_true}" for one in (fact, other)}
    data.facts_edited([fact])
    assert list(data.contradictions([fact, other])) == [other.key]
    data.corpus.train.append(Statement(fact.prompt, fact.target_new, "new"))
    assert list(data.contradictions([fact, other])) == [other.key]
