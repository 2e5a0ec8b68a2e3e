"""Plans of what keeps edits, against what a run of one process takes: steps with replay, and renewals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from lit_moeedit.callbacks import EditHold, EditReplay, KnowledgeEditing
from lit_moeedit.callbacks.needs import measure_needs
from lit_moeedit.callbacks.renewals import RenewalSettings
from lit_moeedit.callbacks.survival import SurvivalCurve
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.planning import Cost, CostCounter, Workload, empty_model, simulate
from lit_moeedit.planning.run_config import read_run
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.upkeep import HELD, RENEWAL, REPLAYED, TRAINING, Upkeep
from tests.callbacks.conftest import CONFIG, _data, _module, _trainer
from tests.planning.losing import lose_all_once
from tests.planning.test_planning import small_config

WIDER = {**CONFIG, "num_hidden_layers": 1, "hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 4}
"""Large enough for products to be most of the work."""
ROWS, WIDTH, STEPS, EDITED, NEEDS = 8, 12, 6, 2, 2


def editor() -> Editor:
    targets = TargetOptimizer(steps=4, stop=0.0)
    return Editor([0], targets=targets, token="last", neutral="", token_budget=1024)


def measured(
    keeping: EditReplay | EditHold, kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Workload]:
    """Return what the phases of a run took in which all edits are lost once, and what the run worked on."""
    meter, lengths = CostCounter(), dict[str, int]()
    encode = Editor.encode
    asked = lose_all_once(monkeypatch, meter)

    def metered(*args: Any) -> dict[str, float]:
        with meter.phase("need"):
            return measure_needs(*args)

    def noted(self: Editor, *args: Any) -> Any:
        encoded = encode(self, *args)
        lengths["prompt"] = max(len(prompt.ids) for prompt in encoded.prompts)
        lengths["target"] = max(len(row.encoding.ids) for row in encoded.rows) - lengths["prompt"]
        return encoded

    kept = REPLAYED if isinstance(keeping, EditReplay) else HELD

    class Steps(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            for name, value in batch.items():
                batch[name] = F.pad(
                    value, (0, WIDTH - value.shape[1]), value={"labels": -100, "attention_mask": 1}.get(name, 0)
                )
            self.name, self.started = kept if trainer.global_step >= EDITED else TRAINING, meter.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            meter.phases.pop(self.name, None)  # the last one counts: the first one makes Adam's moments
            meter.end(self.name, *self.started)

    monkeypatch.setattr("lit_moeedit.callbacks.edit_replay.measure_needs", metered)
    monkeypatch.setattr(Editor, "encode", noted)
    settings: Any = {"renew_every_n_steps": 2, "max_renewals": 1, "renewal": kind, "on_failure": "keep"}
    editing = KnowledgeEditing(editor(), at={"step": EDITED}, **settings)
    trainer = _trainer(folder, [Steps(), editing, keeping], max_steps=STEPS, max_epochs=-1, limit_val_batches=0)
    data = _data(batch_size=ROWS, preservation_samples=32)
    with meter:
        trainer.fit(_module(config=WIDER), data)
    assert editing.renewals == 1 and len(asked) == 3
    texts = data.preservation_texts()
    assert data.tokenizer is not None
    work = Workload(
        edits=6,
        prompt_tokens=lengths["prompt"] - 1,
        target_tokens=lengths["target"],
        questions=4,
        texts=len(texts),
        text_tokens=round(sum(len(ids) for ids in data.tokenizer(texts).input_ids) / len(texts)),
        rows=ROWS,
        row_tokens=WIDTH,
    )
    return SimpleNamespace(**{name.replace(" ", "_"): cost for name, cost in meter.phases.items()}), work


def planned(upkeep: Upkeep, work: Workload) -> tuple[dict[str, Cost], int]:
    keys, module = dict(WIDER), LitMoE(config=WIDER)
    with empty_model(AutoConfig.for_model(keys.pop("model_type"), **keys), torch.float32) as module.model:
        costs = simulate(module, editor(), Sharding(on_cpu=True), work, upkeep=upkeep)[0]
        return {cost.phase: cost for cost in costs}, module.model.num_parameters()


@pytest.mark.parametrize(("kind", "weight"), [("reuse", None), pytest.param("anew", 1.0, marks=pytest.mark.slow)])
def test_a_plan_counts_what_a_run_takes_to_keep_its_edits(
    kind: Any, weight: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_moeedit.callbacks.needs.MEASURE_EVERY", NEEDS)
    monkeypatch.setattr("lit_moeedit.planning.upkeep.MEASURE_EVERY", NEEDS)
    replay = EditReplay(share=0.22, weight=weight, contexts=[""])
    found, work = measured(replay, kind, tmp_path, monkeypatch)
    upkeep = Upkeep(RenewalSettings(2, maximum=1, kind=kind), SurvivalCurve(), replay, steps=STEPS - EDITED)
    plan, parameters = planned(upkeep, work)
    adam = 10 * parameters
    # the needs were measured after each of two steps, after every other step of the run
    added = found.replayed_step.flops + found.need.flops / 2 / NEEDS - found.training_step.flops
    pairs = (
        (plan[TRAINING].flops - adam, found.training_step.flops),
        (plan[REPLAYED].flops - plan[TRAINING].flops, added),
        (plan[RENEWAL].flops, found.renewal.flops),
        (plan[RENEWAL].peak - plan[RENEWAL].held, found.renewal.peak - found.renewal.held),
    )
    for expected, actual in pairs:
        # a plan's facts and rows are equally long, and its experts get the same number of tokens
        assert expected == pytest.approx(actual, rel=0.2)


def test_a_plan_counts_what_a_run_takes_to_hold_its_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = EditHold(rows=4)
    found, work = measured(hold, "reuse", tmp_path, monkeypatch)
    plan, _ = planned(Upkeep(hold=hold), work)
    added = found.held_step.flops - found.training_step.flops
    # a plan's prompts are equally long, and its experts get the same number of tokens
    assert plan[HELD].flops - plan[TRAINING].flops == pytest.approx(added, rel=0.2)


def test_the_number_of_renewals_is_that_of_their_interval_and_limit() -> None:
    for settings, steps, expected in (
        (RenewalSettings(), 100, 0),
        (RenewalSettings(32), 100, 3),
        (RenewalSettings(32, maximum=2), 100, 2),
        (RenewalSettings(32, maximum=2), None, 2),
        (RenewalSettings(32), None, None),
        (RenewalSettings(below=0.9, maximum=5), 100, 5),
        (RenewalSettings(below=0.9), 100, None),
        (RenewalSettings(below=0.9, at="end"), 100, 1),
        (RenewalSettings(kind="all", at="end"), 100, 1),
        (RenewalSettings(below=0.9, at="end", maximum=5), 100, 1),
    ):
        assert Upkeep(settings, steps=steps).renewals == expected, settings


def test_remarks_compare_with_training_steps() -> None:
    phases = {name: Cost(name, 0, 0, flops=flops) for name, flops in ((TRAINING, 100), (REPLAYED, 112), (RENEWAL, 250))}
    replay = EditReplay(share=0.05, every_n_steps=4)
    first, second = Upkeep(RenewalSettings(8), SurvivalCurve(), replay, steps=20).remarks(phases, expected=1.5)
    # 12 % for two statements, in every fourth step
    assert "at most 1.5 statement(s)" in first and "every 4 steps" in first and " 2.3 % more work" in first
    assert "the work of 2.5 training steps" in second and "at most 2 times: 5 training steps" in second
    phases[HELD] = Cost(HELD, 0, 0, flops=120)
    (held,) = Upkeep(hold=EditHold(rows=3, every_n_steps=2)).remarks(phases, expected=0)
    assert held == "Hold: 3 prompt(s), every 2 steps: 10 % more work than without."
    (only,) = Upkeep(RenewalSettings(below=0.9)).remarks(phases, expected=0)
    assert "each" not in only and "less than 0.9 of the edits" in only and "without a known limit" in only
    (last,) = Upkeep(RenewalSettings(below=0.9, at="end")).remarks(phases, expected=0)
    assert last.endswith("; at the last step, if less than 0.9 of the edits hold.")
    (always,) = Upkeep(RenewalSettings(kind="all", at="end")).remarks(phases, expected=0)
    assert always.endswith("; at the last step.") and "known targets" in always


def test_settings_are_those_of_the_config(tmp_path: Path) -> None:
    replay = {"class_path": "lit_moeedit.callbacks.EditReplay", "init_args": {"share": 0.1, "weight": 0.5}}
    renewals = {"renew_every_n_steps": 32, "max_renewals": 7, "renewal": "anew"}
    path = small_config(tmp_path, trainer={"callbacks": [replay]}, editing=renewals)
    found = read_run([path]).upkeep
    # the edit is before the fifth of six epochs of 128 steps
    assert found.steps == 256 and found.renewals == 7 and found.renewal.kind == "anew"
    assert found.replay is not None and (found.replay.share, found.replay.weight) == (0.1, 0.5)
    hold = {"class_path": "lit_moeedit.callbacks.EditHold", "init_args": {"rows": 3}}
    for callbacks in ([replay, hold], [hold, replay]):
        found = read_run([small_config(tmp_path, trainer={"callbacks": callbacks})]).upkeep
        assert found.replay is not None and found.hold is not None
        assert (found.replay.share, found.hold.rows) == (0.1, 3)
    path = small_config(tmp_path, trainer={"callbacks": [replay, replay]})
    with pytest.raises(ValueError, match="has 2 EditReplay callbacks; a plan knows one"):
        read_run([path])


@pytest.mark.deepspeed
def test_a_second_forward_is_refused_under_stage_3(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    replay = {"class_path": "lit_moeedit.callbacks.EditReplay", "init_args": {"weight": 0.5}}
    hold = {"class_path": "lit_moeedit.callbacks.EditHold"}
    strategy = {
        "class_path": "lit_moeedit.sharding.cpu_strategy.DeepSpeedCPUStrategy",
        "init_args": {"stage": 3},
    }
    for callback, message in ((replay, "weight of EditReplay needs"), (hold, "EditHold needs")):
        path = small_config(tmp_path, trainer={"callbacks": [callback], "strategy": strategy})
        with pytest.raises(ValueError, match=f"{message} a second forward"):
            read_run([path])
