"""DeepSpeed on CPUs: every stage trains as one process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from torch import Tensor
from torch.utils.data import DataLoader

from lit_moeedit.cli import EditingCLI
from lit_moeedit.data import FactsDataModule
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
from tests.processes import run_ranks
from tests.small_module import CONFIG as SMALL

pytestmark = pytest.mark.deepspeed

NAMES = [f"deepspeed_cpu_stage_{stage}" for stage in range(4)]
CONFIG = {**SMALL, "num_experts": 6}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # what a strategy sets stays in its own process
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


# -- the class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepspeed", "accelerate"])
def test_what_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {name}: pip install 'lit-moeedit\[deepspeed\]'"):
        StrategyRegistry.get(NAMES[3])


def test_settings(installed: None, tmp_path: Path) -> None:
    zero = StrategyRegistry.get(NAMES[3]).config["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 10_000_000 and zero["contiguous_gradients"]
    assert "stage3_param_persistence_threshold" not in zero
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7}}
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    for given, threshold, expected in ((config, None, 7), (config, 0, 0), (str(path), 5, 5), (None, 6, 6)):
        strategy = DeepSpeedCPUStrategy(stage=3, param_persistence_threshold=threshold, config=given)
        assert strategy.zero_stage_3
        assert strategy.config["zero_optimization"]["stage3_param_persistence_threshold"] == expected
    assert config == {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 7}}
    assert DeepSpeedCPUStrategy(offload_optimizer=True).config["zero_optimization"]["offload_optimizer"]


def test_what_is_no_cpu_is_refused(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = DeepSpeedCPUStrategy()
    strategy.accelerator = CUDAAccelerator()
    with pytest.raises(RuntimeError, match=r"uses CUDAAccelerator: set accelerator='cpu', or .*'deepspeed_stage_3'"):
        strategy.setup_environment()
    from deepspeed.accelerator import get_accelerator

    trainer = L.Trainer(accelerator="cpu", strategy=NAMES[0], logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.strategy.root_device == torch.device("cpu", 0)
    monkeypatch.setattr(get_accelerator(), "device_name", lambda: "cuda")
    with pytest.raises(RuntimeError, match="DeepSpeed is set up for 'cuda'"):
        trainer.strategy.setup_environment()


# -- training ---------------------------------------------------------------------------------------------------------


class Recorder(L.Callback):
    """Losses of this rank's batches, and norms of the gradients of all steps before they are clipped."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if i % 2 and isinstance(trainer.strategy, DeepSpeedStrategy):
            norm = trainer.model.get_global_grad_norm()  # none where DeepSpeed leaves an optimizer as it is
            self.norms += [] if norm is None else [float(norm)]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            norms = [weight.grad.norm() for weight in module.parameters() if weight.grad is not None]
            self.norms.append(float(torch.stack(norms).norm()))


def samples() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 60, (16, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def train(strategy: Any, devices: int, root: str, **settings: Any) -> dict[str, Any]:
    """What this rank has to tell of eight batches in four steps, and of the validation and test behind them."""
    L.seed_everything(0, verbose=False)
    module = LitMoE(config=CONFIG, learning_rate=0.01)
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=2, accumulate_grad_batches=2,
        gradient_clip_val=0.5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, use_distributed_sampler=False, callbacks=[recorder],
        **settings,
    )  # fmt: skip

    def batches() -> DataLoader[Any]:
        return DataLoader(samples()[trainer.global_rank :: devices], batch_size=4 // devices)

    trainer.fit(module, batches(), batches())
    logged = {name: float(trainer.callback_metrics[name]) for name in ("val/loss", "val/perplexity")}
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    [validated] = trainer.validate(module, batches(), verbose=False)
    [tested] = trainer.test(module, batches(), verbose=False)
    results = {"fit": logged, "validate": validated, "test": tested, "rates": rates}
    return {"losses": recorder.losses, "norms": recorder.norms, **results}


Run = tuple[int | str, str]
# the edits of tests/callbacks are made in every stage and precision
RUNS: list[Run] = [(1, "32-true"), (3, "bf16-true")]
FURTHER: list[Run] = [
    *((stage, "32-true") for stage in (0, 2, 3)),
    *((0, "bf16-true"), (1, "bf16-mixed"), (2, "bf16-true"), (3, "bf16-mixed")),
    ("ddp", "32-true"),
]


def every_run(root: str, runs: list[Run]) -> list[dict[str, Any]]:
    found = []
    for stage, precision in runs:
        zero = isinstance(stage, int)
        strategy = DeepSpeedCPUStrategy(stage=stage, param_persistence_threshold=0) if zero else stage
        found.append(train(strategy, 2, root, precision=precision))
    return found


@pytest.mark.parametrize(
    "runs", [RUNS, pytest.param(FURTHER, marks=pytest.mark.slow)], ids=["two stages", "every stage"]
)
def test_every_stage_trains_as_one_process_does(installed: None, tmp_path: Path, runs: list[Run]) -> None:
    whole = train("auto", 1, str(tmp_path))
    first, second = run_ranks(every_run, 2, str(tmp_path), runs, group=False, seconds=300)
    for run, one, other in zip(runs, first, second, strict=True):
        losses = [(a + b) / 2 for a, b in zip(one["losses"], other["losses"], strict=True)]
        # Means over halves round otherwise than the mean over the whole, by about 1e-7, and Adam divides even the
        # smallest gradients by their size. bfloat16 has less than three digits; and in stage 0 DeepSpeed makes Adam's
        # state by a step without gradients, which counts for its bias corrections.
        tolerance = 1e-5 if run[1] == "32-true" else 0.02 if run[0] else 0.05
        assert losses == pytest.approx(whole["losses"], rel=tolerance), run
        norms = [] if run == (0, "32-true") else pytest.approx(whole["norms"], rel=10 * tolerance)
        assert one["norms"] == norms, run
        assert one["fit"]["val/loss"] == pytest.approx(whole["fit"]["val/loss"], rel=tolerance), run
        for stage, prefix in (("validate", "val"), ("test", "test")):
            for name in ("loss", "perplexity"):
                expected = pytest.approx(whole[stage][f"{prefix}/{name}"], rel=3 * tolerance)
                assert one[stage][f"{prefix}/{name}"] == expected, (run, stage, name)
        assert one["rates"] == other["rates"] == whole["rates"]
    assert whole["losses"][-1] < whole["losses"][0] - 0.05


# -- the command ------------------------------------------------------------------------------------------------------


def command_config(folder: Path) -> dict[str, Any]:
    rows = [
        f'{{"subject": "{name}", "prompt": "The capital of {name} is", "target_new": "Rome", "target_true": "{truth}"}}'
        for name, truth in (("Spain", "Madrid"), ("Norway", "Oslo"), ("Peru", "Lima"))
    ]
    (folder / "facts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": NAMES[3],
            "default_root_dir": str(folder / "run"),
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
        "model": {"class_path": "lit_moeedit.module.LitMoE", "init_args": {"config": {**CONFIG, "vocab_size": 420}}},
        "data": {
            "class_path": "lit_moeedit.data.FactsDataModule",
            "init_args": {
                "corpus": {
                    "class_path": "lit_moeedit.data.FactsCorpus",
                    "init_args": {"path": str(folder / "facts.jsonl"), "edits": 2},
                },
                "vocab_size": 420,
                "batch_size": 4,
                "samples_per_epoch": 16,
            },
        },
    }


def test_the_command_takes_the_class_and_all_settings(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-moeedit"])
    config = command_config(tmp_path)
    settings = {"stage": 3, "param_persistence_threshold": 0, "sub_group_size": 1_000_000_000, "config": None}
    config["trainer"]["strategy"] = {
        "class_path": "lit_moeedit.sharding.cpu_strategy.DeepSpeedCPUStrategy",
        "init_args": settings,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    parsed = EditingCLI(
        LitMoE, FactsDataModule, subclass_mode_model=True, subclass_mode_data=True, run=False,
        args=["--config", str(tmp_path / "config.yaml")],
    )  # fmt: skip
    assert isinstance(parsed.trainer.strategy, DeepSpeedCPUStrategy)
    assert parsed.trainer.strategy.config["zero_optimization"]["sub_group_size"] == 1_000_000_000


@pytest.mark.slow
def test_the_command_starts_the_other_rank_itself(installed: None, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(command_config(tmp_path)), encoding="utf-8")
    outside = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_moeedit", "fit", "--config", str(tmp_path / "config.yaml")],
        cwd=tmp_path, env=outside, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    assert "MEMBER: 1/2" in output and "MEMBER: 2/2" in output
    [metrics] = (tmp_path / "run").rglob("metrics.csv")
    assert "val/perplexity" in metrics.read_text(encoding="utf-8")
