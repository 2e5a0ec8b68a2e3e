from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.measurements import Measurements
from lit_moeedit.callbacks.totals import mean_metrics
from lit_moeedit.editing import PHASES
from lit_moeedit.reports import read_rows

METRICS = {
    "efficacy",
    "efficacy_accuracy",
    "generalization",
    "generalization_accuracy",
    "specificity",
    "specificity_accuracy",
    "specificity_retained",
    "score",
    "utility",
}
PARTS = ("evaluation", *PHASES, "other")


def _no_nan(name):
    raise AssertionError(f"{name} is not JSON")


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_nan)


def _fractions(metrics):
    assert metrics.keys() >= METRICS
    assert all(value is None or 0 <= value <= 1 for value in metrics.values())


@pytest.fixture
def run(tiny, make_trainer, tmp_path):
    def fit(*callbacks, at=None, folder="run", ckpt=None, report=None, monitor=True, data=None, **keys):
        editing = KnowledgeEditing(tiny.editor(), at={"epoch": 1} if at is None else at)
        report = EditReport(console=False) if report is None else report
        made = [editing, *([RoutingMonitor()] if monitor else []), report, *callbacks]
        trainer = make_trainer(tmp_path / folder, made, **{"max_epochs": 3, **keys})
        trainer.fit(tiny.module(), data or tiny.data(), **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        return trainer

    return fit


def test_the_shape_of_the_summary(run, tmp_path):
    trainer = run()
    summary = _read(tmp_path / "run" / "summary.json")
    assert list(summary) == [
        "edits", "solver", "place", "before", "after", "after_training", "routing", "perplexity", "seconds", "memory",
        "renewals", "survival", "survivors", "replay", "hold", "intervals",
    ]  # fmt: skip
    assert summary["edits"] == 6 and summary["solver"] == "Woodbury"
    assert summary["place"] == {"layers": [0, 1], "token": "last", "found": False}
    for moment in ("before", "after", "after_training"):
        _fractions(summary[moment])
        assert {"specificity_retained_same_subject", "specificity_retained_same_relation"} <= summary[moment].keys()
    assert summary["after"]["efficacy"] > summary["before"]["efficacy"]
    assert summary["routing"].keys() >= {"similarity", "kl", "per_layer"}
    assert summary["routing"]["per_layer"].keys() == {"0", "1"}
    assert 0 < summary["routing"]["similarity"] <= 1 and summary["routing"]["kl"] >= 0
    assert summary["perplexity"].keys() >= {"before", "after"}
    assert all(value > 1 for value in summary["perplexity"].values())
    assert summary["perplexity"]["after_training"] == pytest.approx(
        float(trainer.callback_metrics["val/perplexity"]), rel=1e-4
    )
    assert summary["after_training"]["efficacy"] == pytest.approx(float(trainer.callback_metrics["edit/efficacy"]))
    seconds = summary["seconds"]
    assert seconds.keys() == {"fit", "edit", "locate", *PARTS} and summary["memory"] == {}
    assert all((value > 0) is (name != "locate") for name, value in seconds.items())
    assert seconds["fit"] > sum(seconds[name] for name in PARTS) > seconds["edit"]
    assert [path.name for path in (tmp_path / "run").glob("*summary*")] == ["summary.json"]


def test_what_was_not_measured_is_null(run, tiny, tmp_path):
    data = tiny.data()
    data.corpus.edits = [
        type(fact)(fact.subject, fact.prompt, fact.target_new, fact.target_true) for fact in data.corpus.edits
    ]
    run(monitor=False, data=data, report=EditReport("edits.json", console=False))
    text = (tmp_path / "run" / "edits.json").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    summary = _read(tmp_path / "run" / "edits.json")
    assert summary["after"]["generalization"] is None and summary["after"]["specificity_retained"] is None
    assert summary["routing"]["similarity"] is None and summary["routing"]["per_layer"] == {}


def test_a_resume_after_the_edit_keeps_what_was_measured(run, tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(kept)
    run(folder="resumed", ckpt=tmp_path / "kept" / "epoch=1.ckpt")
    whole, resumed = _read(tmp_path / "run" / "summary.json"), _read(tmp_path / "resumed" / "summary.json")
    for name in ("edits", "before", "after", "after_training", "routing"):
        assert resumed[name] == whole[name], name
    assert resumed["perplexity"] == pytest.approx(whole["perplexity"])
    assert {**resumed["seconds"], "fit": 0} == {**whole["seconds"], "fit": 0}


def test_several_edits_are_summed_up(run, tmp_path):
    run(at={"every_n_epochs": 1, "batch": 4}, max_epochs=3)
    summary = _read(tmp_path / "run" / "summary.json")
    assert summary["edits"] == 6
    for moment in ("before", "after", "after_training"):
        _fractions(summary[moment])


def test_the_mean_over_edits_counts_what_was_measured():
    nan = float("nan")
    mean = mean_metrics(
        [
            (1, {"efficacy": 1.0, "generalization": nan, "specificity": nan}, {}),
            (3, {"efficacy": 0.0, "generalization": 0.5, "specificity": nan, "specificity_retained_other": 0.25}, {}),
        ]
    )
    assert math.isnan(mean.pop("specificity"))
    # neighbours of a group may be those of one editor only
    assert mean == {"efficacy": 0.25, "generalization": 0.5, "specificity_retained_other": 0.25}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_edit_without_training_is_reported(tiny, make_trainer, tmp_path, stage):
    callbacks = [KnowledgeEditing(tiny.editor(), at="validation"), EditReport(console=False), RoutingMonitor()]
    getattr(make_trainer(tmp_path, callbacks), stage)(tiny.module(), tiny.data(), verbose=False)
    summary = _read(tmp_path / "summary.json")
    assert summary["edits"] == 6 and summary["after_training"] is None
    assert summary["after"]["efficacy"] > summary["before"]["efficacy"]
    assert summary["seconds"]["fit"] > summary["seconds"]["edit"] > 0


def test_without_an_edit_there_is_no_report(run, tmp_path, caplog):
    run(at={"epoch": 9}, fast_dev_run=True)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "no facts were edited in this run" in caplog.text


def test_an_edit_that_was_undone_is_in_the_report(tiny, make_trainer, tmp_path):
    class Never(KnowledgeEditing):
        def should_keep(self, before, after):
            return False

    make_trainer(tmp_path, [EditReport(console=False), Never(tiny.editor())]).fit(tiny.module(), tiny.data())
    summary = _read(tmp_path / "summary.json")
    assert summary["edits"] == 0 and summary["after_training"] is None
    _fractions(summary["after"])
    # the page has what is generated now
    rows = read_rows(tmp_path / "edits.jsonl")
    assert len(rows) == 6 and not any(row.kept for row in rows)
    for row in rows:
        assert row.measured["end"].generated and 0 < row.measured["end"].p_new < 1
        assert row.measured["after"].neighbours[1] >= row.measured["end"].neighbours[1] == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count(", the model generates") == 6 and "at the end" in page


def test_the_table_on_the_console(run, capsys):
    run(report=EditReport())
    printed = capsys.readouterr().out
    for word in ("6 edits with Woodbury", "efficacy", "specificity retained", "perplexity", "summary.json"):
        assert word in printed


@pytest.mark.parametrize("filename", ["", "a/b.json", "../summary.json", "/summary.json"])
def test_a_filename_with_a_folder_is_refused(filename):
    with pytest.raises(ValueError, match="filename must be the name of a file without a folder"):
        EditReport(filename)


def test_wandb_gets_a_table_and_an_image(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("matplotlib").use("Agg")

    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    tables, images = [], []
    monkeypatch.setattr(logger, "log_table", _noting(tables, logger.log_table))
    monkeypatch.setattr(logger, "log_image", _noting(images, logger.log_image))
    try:
        run(logger=logger)
    finally:
        logger.experiment.finish()
    # at the edit, and updated at the end
    assert [key for (key,), _ in tables] == ["edits", "edits"]
    at_edit, at_end = (table for _, table in tables)
    assert len(at_edit["data"]) == len(at_end["data"]) == 6
    assert "end" not in at_edit["columns"] and "end" in at_end["columns"]
    assert all(len(row) == len(at_end["columns"]) for row in at_end["data"])
    drawn = [key for (key, _), _ in images]
    assert "routing/similarity_by_layer" in drawn and drawn.count("routing") == 1
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/*.json"))


def _noting(calls, method):
    def call(*args, **kwargs):
        calls.append((args, kwargs))
        return method(*args, **kwargs)

    return call


def test_groups_of_a_facts_file_cannot_mark_up_the_table(run, tiny, capsys):
    data = tiny.data()
    name = "[bold][/nope]<b>\u202e"
    data.corpus.edits = [
        replace(fact, neighbours=tuple(replace(neighbour, group=name) for neighbour in fact.neighbours))
        for fact in data.corpus.edits
    ]
    run(data=data, report=EditReport())
    printed = capsys.readouterr().out
    assert r"[bold][/nope]<b>\u202e" in printed
    assert "\u202e" not in printed


def test_the_sums_in_the_state_do_not_grow_with_the_edits(tmp_path):
    def size(edits):
        measured = Measurements()
        metrics = {f"metric_{i}": 0.5 for i in range(20)}
        for _ in range(edits):
            measured.totals_of(None).add(2, True, metrics, metrics, {"edit": 1.0})
        torch.save(measured.state(), tmp_path / "state")
        return (tmp_path / "state").stat().st_size

    assert size(500) < size(20) + 200  # larger numbers take a few bytes more


def test_what_follows_a_fit_adds_to_its_report(tiny, make_trainer, tmp_path):
    callbacks = [KnowledgeEditing(tiny.editor(), at={"epoch": 0}), EditReport(console=False)]
    trainer, module, data = make_trainer(tmp_path, callbacks), tiny.module(), tiny.data(samples_per_epoch=16)
    trainer.fit(module, data)
    fitted = _read(tmp_path / "summary.json")
    trainer.test(module, data, verbose=False)
    tested = _read(tmp_path / "summary.json")
    assert fitted["after_training"]["efficacy"] is not None and fitted["perplexity"]["after_training"] > 1
    for name in ("edits", "before", "after", "after_training", "perplexity"):
        assert tested[name] == fitted[name], name
    # one run, one file
    assert _read(tmp_path / "logs" / "summary.json") == tested
    assert len(list(tmp_path.rglob("summary*.json"))) == 2


def test_runs_that_share_a_folder_lose_no_summary(tiny, make_trainer, tmp_path):
    def run(logger):
        callbacks = [
            KnowledgeEditing(tiny.editor(steps=1), at="validation", on_failure="keep"),
            EditReport(console=False),
        ]
        make_trainer(tmp_path, callbacks, logger=logger).validate(tiny.module(), tiny.data(), verbose=False)
        return (tmp_path / "summary.json").read_bytes()

    written = [run(logger) for logger in (False, CSVLogger(tmp_path, name="a"), False, CSVLogger(tmp_path, name="a"))]
    # seconds differ from run to run
    assert len(set(written)) == 4
    found = [path.read_bytes() for path in tmp_path.rglob("summary*.json")]
    assert set(found) == set(written)
    assert (tmp_path / "summary.json").read_bytes() == written[-1]


def test_a_figure_that_cannot_be_drawn_costs_no_run(run, tmp_path, monkeypatch, caplog):
    def draw(*_):
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr("lit_moeedit.reports.figures.draw_costs", draw)
    run()
    assert "could not write edits.jsonl and report.html: TypeError: incompatible function arguments" in caplog.text
    assert (tmp_path / "run" / "summary.json").exists()
