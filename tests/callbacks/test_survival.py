"""The survival curve: its points, what hears of them, resumes, and a training that does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lit_moeedit.callbacks import EditReport, KnowledgeEditing
from lit_moeedit.callbacks.listener import EditListener, SurvivalEvent
from lit_moeedit.callbacks.survival import Survival, SurvivalCurve
from lit_moeedit.reports import SurvivalPoint
from tests.processes import run_ranks

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "model that overrides the configure_model")
]


class Heard(EditListener):
    def __init__(self) -> None:
        self.events: list[SurvivalEvent] = []

    def on_survival(self, trainer: Any, pl_module: Any, event: SurvivalEvent) -> None:
        self.events.append(event)


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """``run(every, folder)``: an edit after step 2 of three epochs of 4 steps, with dropout."""

    def fit(every: Any = 3, folder: str = "run", callbacks: Any = (), ckpt: Any = None) -> SimpleNamespace:
        editing = KnowledgeEditing(tiny.editor(steps=12), at={"step": 2}, survival_every_n_steps=every)
        heard, report = Heard(), EditReport(console=False)
        module = tiny.module(config={"attention_dropout": 0.2})
        module.configure_model()
        trainer = make_trainer(tmp_path / folder, [*callbacks, editing, heard, report], max_epochs=3)
        trainer.fit(module, tiny.data(), **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        summary = json.loads((tmp_path / folder / "summary.json").read_text(encoding="utf-8"))
        return SimpleNamespace(
            editing=editing, events=heard.events, summary=summary, weights=tiny.weights(module), module=module
        )

    return fit


def test_the_points_of_a_run(run: Any, caplog: Any) -> None:
    with caplog.at_level("INFO", "lit_moeedit"):
        one = run()
    points = one.editing.survival.points
    assert [(point.step, point.after) for point in points] == [
        (2, "edit"), (5, None), (8, None), (11, None), (12, None)
    ]  # fmt: skip
    assert [point["step"] for point in one.summary["survival"]] == [event.step for event in one.events]
    final = one.editing.evaluate(one.module)
    assert points[-1].metrics["efficacy_accuracy"] == pytest.approx(final.metrics["efficacy_accuracy"])
    wanted = dict(zip((fact.key for fact in one.events[-1].facts), final.log_new - final.log_true, strict=True))
    # float32, in batches of other sizes
    assert one.events[-1].margins == pytest.approx({key: float(value) for key, value in wanted.items()}, abs=1e-4)
    assert one.summary["survivors"][""]["generated"] == points[-1].generated == int(final.edits_exact.sum())
    assert str(one.editing.survivors) in caplog.text


@pytest.mark.parametrize("averages", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "average"])
def test_a_training_does_not_notice(run: Any, averages: bool) -> None:
    def callbacks() -> list[Any]:
        return [EMAWeightAveraging(decay=0.9)] if averages else []

    off, on = run(None, "off", callbacks()), run(1, "on", callbacks())
    assert off.events == [] and off.summary["survival"] == [] and len(on.events) == 11
    assert all(torch.equal(on.weights[name], weight) for name, weight in off.weights.items())


def test_a_resumed_run_has_neither_a_gap_nor_a_doubled_point(run: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = run(callbacks=[kept])
    for step in (5, 7):
        again = run(folder=f"again_{step}", ckpt=tmp_path / "kept" / f"step={step}.ckpt")
        # the random state of dropout is no part of a checkpoint, so what follows has other values
        points, known = again.editing.survival.points, whole.editing.survival.points
        assert [point for point in points if point.step <= step] == [point for point in known if point.step <= step]
        assert [point.step for point in points] == [point.step for point in known]
        assert [point["step"] for point in again.summary["survival"]] == [point.step for point in known]


def test_auto_measures_less_and_less_often() -> None:
    curve, survival, due = SurvivalCurve("auto"), Survival((SurvivalPoint(0, 10, 1, 1, {}, "edit"),)), []
    for step in range(11, 4000):
        if curve.is_due(survival, step):
            due.append(step - 10)
            survival = Survival((*survival.points, SurvivalPoint(0, step, 1, 1)))
    assert due == [32, 64, 128, 256, 512, 1024, 2048, 3072]


def test_the_facts_measured_are_a_fixed_sample(tiny: Any) -> None:
    facts = tiny.corpus().edits
    chosen = SurvivalCurve(facts=3).choose(facts)
    assert len(chosen) == 3 and SurvivalCurve(facts=3).choose(facts[::-1]) == chosen[::-1]
    assert SurvivalCurve(facts=6).choose(facts) == list(facts)


def test_settings_out_of_range_are_refused(tiny: Any) -> None:
    for settings, message in (
        ({"survival_every_n_steps": -1}, "survival_every_n_steps must be a number of steps, 'auto', or None or 0"),
        ({"survival_facts": 0}, "survival_facts must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            KnowledgeEditing(tiny.editor(), **settings)


def fit_on_two(folder: str, strategy: str, every: int | None, below: float | None) -> dict[str, Any]:
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known
    from tests.callbacks.conftest import _data, _editor, _module, _trainer
    from tests.callbacks.test_sharded_runs import whole_weights

    torch.use_deterministic_algorithms(True)
    settings: Any = {"survival_every_n_steps": every, "renew_below": below}
    editing = KnowledgeEditing(_editor(steps=12), at={"epoch": 1}, **settings)
    trainer = _trainer(folder, [editing, EditReport(console=False)], strategy=strategy, devices=2, max_epochs=3)
    module = _module()
    trainer.fit(module, _data(batch_size=4))
    curve, weights = editing.survival, whole_weights(module)
    return {"curve": curve.state(), "weights": weights, "renewals": editing.renewals, "left": editing.survivors}


def fits_on_two(folder: str, strategies: list[str]) -> dict[str, dict[str, Any]]:
    runs: dict[str, Any] = {"off": (None, None), "on": (1, None), "renewed": (4, 0.95)}
    return {
        f"{strategy} {name}": fit_on_two(f"{folder}/{strategy}_{name}", strategy, *settings)
        for strategy in strategies
        for name, settings in runs.items()
    }


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_ranks_measure_and_renew_alike(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    strategies = ["ddp", "deepspeed_cpu_stage_3"]
    first, second = run_ranks(fits_on_two, 2, str(tmp_path), strategies, group=False)
    for name, found in first.items():
        assert found["curve"] == second[name]["curve"] and found["left"] == second[name]["left"], name
        assert all(torch.equal(second[name]["weights"][key], weight) for key, weight in found["weights"].items()), name
    for strategy in strategies:
        on, off = (first[f"{strategy} {name}"]["weights"] for name in ("on", "off"))
        assert all(torch.equal(on[key], weight) for key, weight in off.items())
        renewed = first[f"{strategy} renewed"]
        assert renewed["renewals"] >= 1 and renewed["left"].generated > first[f"{strategy} on"]["left"].generated
