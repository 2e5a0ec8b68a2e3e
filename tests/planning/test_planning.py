"""Plans without a run: passes against the same passes with numbers, formulas, configs, and the command."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, PreTrainedModel

from lit_moeedit.cli import run
from lit_moeedit.models.experts import UnsupportedModelError, expert_layers
from lit_moeedit.planning import (
    EditSize,
    ModelSize,
    Pass,
    Passes,
    Sharding,
    TrainingSize,
    empty_model,
    model_size,
    plan_costs,
    run_passes,
)
from lit_moeedit.planning import passes as passes_module
from lit_moeedit.planning.costs import held_in_training
from lit_moeedit.planning.passes import Tally
from lit_moeedit.planning.report import size
from tests.conftest import COMMON, FAMILIES
from tests.test_large_configs import REAL, SMALL_QWEN

ROOT = Path(__file__).parents[2]
TRAINING = TrainingSize(rows=3, tokens=7, counted=6)
EDIT = EditSize(
    edits=5, contexts=2, neutral=True, prompt_tokens=9, target_tokens=2, layers=(1, 2), preserve=True, texts=40,
    text_tokens=8, token_budget=64, target_budget=16384, steps=4,
)  # fmt: skip
MODEL = ModelSize(
    parameters=10**9, largest=10**8, block=10**8, experts=16, d_model=512, d_hidden=256, active=4, layers=8
)
NOTHING = Pass(0, 0, 0)


def keys_of(family: str) -> dict[str, Any]:
    keys = SMALL_QWEN if family == "qwen3_5_moe_text" else {**COMMON, **FAMILIES[family]}
    return {"model_type": family, **keys}


def config_of(keys: dict[str, Any]) -> Any:
    keys = dict(keys)
    return AutoConfig.for_model(keys.pop("model_type"), **keys)


# -- counting ---------------------------------------------------------------------------------------------------------


def test_a_tally_counts_what_is_alive_and_its_products() -> None:
    weight = torch.ones(8, 8)
    with Tally([weight]) as tally:
        assert weight.T.shape == (8, 8) and tally.alive == 0  # a view has the storage of what it is of
        product = weight @ weight
        assert (tally.alive, tally.flops) == (256, 2 * 8**3)
        sums = product.sum(0)
        del product
        assert tally.alive == 32 and tally.peak == 288
        torch.empty(3, device="meta")
    del sums
    assert tally.alive == 0


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5_moe_text"])
def test_passes_without_numbers_take_what_passes_with_numbers_take(
    make_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model: PreTrainedModel = make_model(family, **(SMALL_QWEN if family == "qwen3_5_moe_text" else {}))
    layers = [expert_layers(model)[index] for index in EDIT.layers]
    batch = passes_module._TargetBatch(model, layers[-1], EDIT, EDIT.edits)
    real = {}

    def note(name: str, run: Callable[[], Any]) -> None:
        with Tally([*model.parameters(), *model.buffers()]) as tally:
            run()
        model.zero_grad(set_to_none=True)
        real[name] = (tally.peak, tally.flops)

    note("training", lambda: passes_module._training_step(model.train(), TRAINING))
    model.eval().requires_grad_(False)
    note("statistics", lambda: passes_module._statistics(model, layers, EDIT))
    note("features", lambda: passes_module._features(model, layers, EDIT, EDIT.feature_batch(1)))
    note("before", batch.before)
    note("step", batch.step)
    with empty_model(config_of(keys_of(family)), torch.float32) as empty:
        planned = run_passes(empty, Sharding(), TRAINING, EDIT)
    for name, (peak, flops) in real.items():
        # masks are left out where there is no padding, which a pass without numbers cannot know
        assert getattr(planned, name).peak == pytest.approx(peak, rel=0.1), name
        assert getattr(planned, name).flops == pytest.approx(flops, rel=0.02), name


def test_sharded_passes_gather_and_leave_the_model_whole() -> None:
    sharding = Sharding(ranks=4, stage=3, itemsize=4, bucket=1000)
    with empty_model(config_of(keys_of("qwen3_moe")), torch.float32) as model:
        sizes = model_size(model, EDIT.layers)
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        sharded = run_passes(model, sharding, TRAINING, EDIT)
        assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
        for module in model.modules():
            assert not (module._forward_pre_hooks or module._backward_pre_hooks or module._backward_hooks)
    assert (sizes.experts, sizes.d_model, sizes.d_hidden, sizes.active, sizes.layers) == (6, 32, 20, 2, 3)
    # forward and backward gather all weights, and their gradients are averaged
    assert sharded.training.sent == pytest.approx(3 * sizes.parameters * 4 * 3 / 4, rel=1e-3)
    assert sharded.features.sent < sharded.training.sent / 2
    # autograd keeps the transposed views of all experts until the backward pass
    experts = 3 * 6 * 3 * 32 * 20 * 4
    assert sharded.training.peak > experts
    with empty_model(config_of(keys_of("gpt_oss")), torch.float32) as model, pytest.raises(UnsupportedModelError):
        model_size(model, (7,))


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_what_is_held_between_steps() -> None:
    bucket = {"bucket": 0, "itemsize": 2}
    # bytes for each parameter; of stage 3: weights 2, gradients 2, master 4, moments 8
    for stage, ranks, expected in ((3, 8, 2.0), (3, 1, 16.0), (1, 8, 3.5), (2, 4, 5.0), (0, 8, 14.0)):
        sharding = Sharding(ranks=ranks, stage=stage, **bucket)
        assert held_in_training(MODEL, sharding) / MODEL.parameters == pytest.approx(expected, rel=1e-6)
    assert held_in_training(MODEL, Sharding(itemsize=4)) == 12 * MODEL.parameters
    assert held_in_training(MODEL, Sharding(ranks=2, itemsize=4)) == 16 * MODEL.parameters


def costs(sharding: Sharding, edit: EditSize = EDIT) -> dict[str, Any]:
    passes = Passes(*[NOTHING] * 6)
    return {cost.phase: cost for cost in plan_costs(MODEL, sharding, TRAINING, edit, passes)}


def test_costs_follow_the_sizes() -> None:
    sharded = Sharding(ranks=8, stage=3, itemsize=2)
    small, large = costs(sharded), costs(sharded, replace(EDIT, edits=50))
    assert list(small) == [
        "loading", "training step", "statistics", "targets", "features", "solve", "commit (local)", "commit (gather)",
        "checkpoint",
    ]  # fmt: skip
    assert all(cost.peak >= cost.held for cost in small.values())
    moments = 2 * 16 * 256**2 * 4
    assert small["statistics"].peak - small["statistics"].held == moments
    assert small["statistics"].sent == 2 * moments * 7 // 8
    assert large["solve"].flops > small["solve"].flops and large["targets"].flops == 0
    # a local commit sends nothing, and its copies are in main memory; in a run on CPUs that is the same memory
    assert small["commit (local)"].sent == 0 < small["commit (gather)"].sent
    on_cpu = costs(replace(sharded, on_cpu=True))["commit (local)"]
    saved = 16 * 512 * 256 * (4 + 2) // 8
    assert small["commit (local)"].host == 2 * saved and on_cpu.host == 0
    rise = small["commit (local)"].peak - small["commit (local)"].held
    assert on_cpu.peak - on_cpu.held == rise + saved
    assert "commit (gather)" not in costs(Sharding())
    nothing = costs(sharded, replace(EDIT, preserve=False))["statistics"]
    assert nothing.peak == nothing.held and not nothing.sent
    # the groups that the optimizer updates at once
    assert costs(replace(sharded, sub_group=10**7))["training step"].peak < costs(sharded)["training step"].peak
    iterative = costs(sharded, replace(EDIT, passes=4))["solve"]
    assert iterative.flops != small["solve"].flops


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    logger = logging.getLogger("lit_moeedit")
    level = logger.level
    yield
    logger.setLevel(level)


def small_config(tmp_path: Path, **changes: Any) -> Path:
    config = yaml.safe_load((ROOT / "configs" / "atlas_zero3.yaml").read_text(encoding="utf-8"))
    config["trainer"] |= changes.pop("trainer", {})
    config["model"]["init_args"] |= changes.pop("model", {})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    run(args=["plan", f"--config={small_config(tmp_path)}", "--ranks=4", "--edits=32", f"--json={file}"])
    printed = capsys.readouterr().out
    assert "ZeRO stage 3" in printed and "commit" in printed
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["sharding"] | {"ranks": 4, "stage": 3, "itemsize": 4, "on_cpu": True} == content["sharding"]
    assert content["sharding"]["bucket"] == 10_000_000 and not content["sharding"]["overlap"]
    assert content["edit"]["layers"] == [0, 1, 2] and content["edit"]["steps"] == 60
    assert content["training"]["rows"] == 32 and content["model"]["experts"] == 16
    assert content["phases"]["training step"]["peak"] > content["phases"]["training step"]["held"] > 0


def test_a_large_config_is_planned_with_its_model_beside_it(tmp_path: Path) -> None:
    # two layers and one to edit: a whole one takes half a minute
    keys, _ = REAL["gpt_oss_20b_zero3"]
    config_of({**keys, "num_hidden_layers": 2}).save_pretrained(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "gpt_oss_20b_zero3.yaml").read_text(encoding="utf-8"))
    config["trainer"]["callbacks"][0]["init_args"]["editor"]["init_args"]["layers"] = [0]
    path, file = tmp_path / "config.yaml", tmp_path / "plan.json"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run(args=["plan", f"--config={path}", f"--model={tmp_path}", f"--json={file}"])
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["sharding"]["ranks"] == 8 and content["sharding"]["sub_group"] == 10**8
    assert content["sharding"]["itemsize"] == 2 and content["edit"]["passes"] == 10
    # 16 bytes for each parameter on eight ranks, and the bucket
    held = content["phases"]["training step"]["held"]
    assert held == pytest.approx(2 * content["model"]["parameters"] + 4e8, rel=1e-6)
    assert content["phases"]["commit (local)"]["host"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"config": None, "pretrained": "nobody/nothing"}}, "asks no server"),
        ({"trainer": {"callbacks": []}}, "0 callbacks with an editor"),
        ({"trainer": {"strategy": "fsdp", "devices": 2}}, "cannot be planned"),
        ({"trainer": {"strategy": "deepspeed_stage_3_offload", "devices": 2}}, "does not know offloading"),
        ({"trainer": {"devices": "auto"}}, "give --ranks"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(args=["plan", f"--config={small_config(tmp_path, **changes)}"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --config"),
        (["--config=nowhere.yaml"], "there is no config"),
        (["--config=configs/atlas.yaml", "--edits=0"], "edits must be at least 1"),
        (["--config=configs/atlas.yaml", "--ranks=0"], "ranks must be at least 1"),
    ],
)
def test_wrong_options_are_named(args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        run(args=["plan", *args])


def test_sizes_are_written_for_people() -> None:
    assert [size(count) for count in (0, 999, 1500, 2 * 10**15)] == ["-", "999.0 B", "1.5 kB", "2000.0 TB"]
