"""Edits in the middle of `fit` under every precision, clipping, accumulation and strategy that runs on a CPU."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lit_moeedit.callbacks import EditEvent, EditReport, KnowledgeEditing
from lit_moeedit.callbacks.listener import EditListener
from tests.processes import run_ranks

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
CLIPS = (None, "norm", "value")
# the config of this one does not say that another optimizer than DeepSpeed's own may be offloaded
OFFLOADED = "deepspeed_cpu_offload"
ZERO = tuple(f"deepspeed_cpu_stage_{stage}" for stage in range(4))


class Case(NamedTuple):
    strategy: str
    precision: str
    clip: str | None
    accumulate: int

    @property
    def name(self) -> str:
        return "-".join(map(str, self))

    @property
    def sharded(self) -> bool:
        return self.strategy.startswith("deepspeed")

    @property
    def refusal(self) -> str | None:
        """What Lightning or DeepSpeed refuse, in their words."""
        if not self.sharded:
            return None
        if self.clip == "value":
            return "MisconfigurationException: DeepSpeed does not support clipping gradients by value."
        # where oneDNN has kernels for float16 a CPU can do it
        if self.precision == "16-mixed" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return "ValueError: Type fp16 is not supported on your device."
        return None


def cases(strategy: str) -> list[Case]:
    """All settings under a strategy."""
    return [Case(strategy, *case) for case in itertools.product(PRECISIONS, CLIPS, (1, 2))]


def pairs(strategy: str) -> list[Case]:
    """Half of all settings, among which every pair of two settings is."""
    return [
        Case(strategy, precision, clip, 1 + (i + j) % 2)
        for i, precision in enumerate(PRECISIONS)
        for j, clip in enumerate(CLIPS)
    ]


class Watch(EditListener):
    """Notes every loss, and how many edits are said before, after, and after the step that follows."""

    def __init__(self, editing: KnowledgeEditing) -> None:
        self.editing = editing
        self.event: EditEvent | None = None
        self.losses: list[float] = []
        self.said: list[float] = []

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self.event, self.said = event, [event.before.metrics["efficacy"], event.after.metrics["efficacy"]]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.event is not None and trainer.global_step > self.event.step and len(self.said) == 2:
            self.said.append(self.editing.evaluate(pl_module).metrics["efficacy"])


def fit(case: Case, folder: str) -> dict[str, Any]:
    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    # Lightning takes WORLD_SIZE out of the environment when a run ends
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    editing = KnowledgeEditing(_editor(), at={"epoch": 1})
    watch = Watch(editing)
    clipping = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": case.clip} if case.clip else {}
    trainer = _trainer(
        Path(folder) / case.name,
        [editing, watch, EditReport(console=False)],
        strategy=DeepSpeedCPUStrategy(3, offload_optimizer=True) if case.strategy == OFFLOADED else case.strategy,
        devices=size,
        precision=case.precision,
        accumulate_grad_batches=case.accumulate,
        max_epochs=2,
        **clipping,
    )
    # so slow that the step after the edit leaves it alone, unless it brings the weights before it back
    module = _module(learning_rate=1e-4)
    try:
        trainer.fit(module, _data(batch_size=8 // size, samples_per_epoch=16))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    fused = bool(trainer.optimizers[0].param_groups[0]["fused"])
    return {"losses": watch.losses, "said": watch.said, "logged": logged, "fused": fused}


def fits(chosen: list[Case], folder: str) -> list[dict[str, Any]]:
    return [fit(case, folder) for case in chosen]


def check(case: Case, found: dict[str, Any], folder: Path) -> None:
    path = folder / case.name / "summary.json"
    if case.refusal is not None:
        assert found.get("error") == case.refusal, case
        assert not path.exists()
        return
    assert "error" not in found, (case, found)
    assert found["losses"] and all(math.isfinite(loss) for loss in found["losses"]), case
    assert all(math.isfinite(value) for value in found["logged"].values()), case
    before, after, stepped = found["said"]
    # six facts, of which a small step may turn one that was near the border
    assert after >= before + 0.3 and stepped >= after - 0.17, (case, found["said"])
    summary = json.loads(path.read_text(encoding="utf-8"))
    assert summary["edits"] == 6 and "failed" not in summary, case
    assert summary["after"]["efficacy"] == pytest.approx(after)
    assert summary["after_training"]["efficacy"] == pytest.approx(found["logged"]["edit/efficacy"])
    # on a CPU 16-mixed becomes bf16-mixed, and of both MixedPrecision refuses to clip for a fused optimizer
    mixed = case.precision.endswith("-mixed") and not case.sharded
    assert found["fused"] == (not (mixed and case.clip)), case


FEW = pairs("auto")


@pytest.mark.parametrize("case", FEW, ids=[case.name for case in FEW])
def test_an_edit_under_any_precision(tmp_path: Path, case: Case) -> None:
    check(case, fit(case, str(tmp_path)), tmp_path)


def test_every_pair_of_settings_is_among_the_few() -> None:
    for a, b in itertools.combinations(range(1, 4), 2):
        values = ((), PRECISIONS, CLIPS, (1, 2))
        assert {(case[a], case[b]) for case in FEW} == set(itertools.product(values[a], values[b]))


@pytest.mark.slow
def test_an_edit_under_all_settings_of_one_process(tmp_path: Path) -> None:
    for case in cases("auto"):
        check(case, fit(case, str(tmp_path)), tmp_path)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["ddp", *ZERO, OFFLOADED])
def test_an_edit_under_every_pair_of_settings_of_two_processes(tmp_path: Path, strategy: str) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    chosen = pairs(strategy)
    # many runs: about 40 s by themselves under stage 3, and more than the usual limit beside two other processes
    for found in run_ranks(fits, 2, chosen, str(tmp_path), group=False, seconds=300):
        for case, result in zip(chosen, found, strict=True):
            check(case, result, tmp_path)


def test_sixteen_bits_bear_training(tmp_path: Path) -> None:
    # Adam's usual epsilon is 0 in float16, and its step by 0 not a number
    found = fit(Case("auto", "16-true", None, 1), str(tmp_path))
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert math.isfinite(found["logged"]["val/perplexity"])


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.down_proj", "lm_head.weight"])
def test_weights_too_large_for_sixteen_bits_are_named_before_training(
    tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = tiny.module()
    module.configure_model()
    with torch.no_grad():
        module.model.get_parameter(name).view(-1)[3] = 1e5
    monkeypatch.setattr(type(module), "training_step", lambda *_: pytest.fail("it has trained"))
    trainer = make_trainer(tmp_path, [KnowledgeEditing(tiny.editor()), EditReport()], precision="16-true")
    with pytest.raises(FloatingPointError, match=rf"^float16 holds numbers up to 65504, .* not finite .*: {name}$"):
        trainer.fit(module, tiny.data())


def test_perplexity_is_counted_in_full_under_half_precision(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    module = tiny.module()
    [found] = make_trainer(tmp_path, [], precision="bf16-true").validate(module, tiny.data(), verbose=False)
    assert module.perplexity.count.dtype == torch.float32
    # the mean of the losses is over all tokens, too; sums of float32, where those of bfloat16 are 4e-3 apart
    assert found["val/perplexity"] == pytest.approx(math.exp(found["val/loss"]), rel=1e-4)
