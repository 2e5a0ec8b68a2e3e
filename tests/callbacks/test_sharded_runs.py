"""Runs of the Trainer with several processes: edits in the middle of `fit`, checkpoints, resumes, and a killed rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor, edit_making
from lit_moeedit.callbacks.listener import EditListener
from lit_moeedit.reports import read_rows
from lit_moeedit.sharding.zero3_passes import regathering
from tests.dying import rank_1_dies_in_the_second_layer
from tests.processes import run_ranks, start_ranks

pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
pytestmark = pytest.mark.deepspeed

SOME = ["ddp", "deepspeed_cpu_stage_1", "deepspeed_cpu_stage_3"]
OTHERS = ["ddp", "deepspeed_cpu_stage_0", "deepspeed_cpu_stage_2"]


def whole_weights(module: Any) -> dict[str, Tensor]:
    """All weights, in float32, on every rank."""
    import deepspeed

    parameters = dict(module.named_parameters())
    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {name: parameter.detach().float().clone() for name, parameter in parameters.items()}


def fit(
    strategy: Any, folder: str, checkpoint: str | None = None, precision: str = "32-true", editors: int = 1
) -> dict[str, Any]:
    """Train for three epochs, edit before the second (a second editor before the third), keep all checkpoints."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known
    from tests.callbacks.conftest import _corpus, _data, _editor, _module, _trainer

    torch.use_deterministic_algorithms(True)
    # limits that every edit meets, so that the probe is measured
    limits = {"max_perplexity_ratio": 1e6, "min_routing_similarity": 1e-6}
    editing, more = KnowledgeEditing(_editor(), at={"epoch": 1}, **limits), []
    if editors == 2:
        facts = _corpus().edits
        editing = KnowledgeEditing(_editor(), facts[:4], at={"epoch": 1}, name="early")
        more = [KnowledgeEditing(_editor(layers=[0]), facts[4:], at={"epoch": 2}, name="late")]
    monitor = RoutingMonitor(probe=["The capital of Italy is Rome."])
    kept = ModelCheckpoint(Path(folder) / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    # Lightning takes WORLD_SIZE out of the environment when a run ends
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    trainer = _trainer(
        folder,
        [editing, *more, monitor, EditReport(console=False), kept],
        strategy=strategy,
        devices=size,
        precision=precision,
        max_epochs=3,
    )
    module, data = _module(), _data(batch_size=8 // size, samples_per_epoch=16)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return {
        "weights": whole_weights(module),
        "state": editing.state_dict(),
        "calls": len(editing.editor.calls),
        "more": [(len(other.editor.calls), other.state_dict(), len(other.applied_facts)) for other in more],
        "metrics": editing.evaluate(module).metrics,
        "routing": monitor.last_edit,
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def fits(strategies: list[str], folder: str, **kwargs: Any) -> dict[str, Any]:
    return {strategy: fit(strategy, f"{folder}/{strategy}", **kwargs) for strategy in strategies}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of all weights, relative to their size."""
    difference = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return (difference / sum(float(value.square().sum()) for value in first.values())) ** 0.5


# test_precisions has an edit under each of the others
@pytest.mark.parametrize("strategies", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_every_strategy_edits_and_trains_alike(tmp_path: Path, strategies: list[str]) -> None:
    found = run_ranks(fits, 2, strategies, str(tmp_path), group=False)
    for strategy in strategies:
        first, second = (ranks[strategy] for ranks in found)
        assert same(first["weights"], second["weights"]), strategy
        assert first["metrics"] == pytest.approx(second["metrics"], nan_ok=True)
        assert first["calls"] == 1
        assert len(first["state"]["applied"]) == 6
        assert first["state"] == second["state"]
        assert first["logged"].keys() == found[0]["ddp"]["logged"].keys()
        assert (tmp_path / strategy / "summary.json").exists()
        rows = read_rows(tmp_path / strategy / "edits.jsonl")
        assert [list(row.measured) for row in rows] == [["before", "after", "end"]] * 6
        # float32 in another order, through six steps of Adam, whose first ones have the size of the learning rate
        # whatever the gradient's
        assert distance(first["weights"], found[0]["ddp"]["weights"]) < 0.01, strategy


def whole_and_resumed(
    strategy: str, folder: str, precision: str, editors: int, before: str | None = None
) -> list[dict[str, Any]]:
    """An uninterrupted run, and those that begin with its checkpoints, or another run's from before the edit."""
    runs = [fit(strategy, f"{folder}/whole", None, precision, editors)]
    kept = [f"{folder}/whole/kept/epoch={epoch}.ckpt" for epoch in (0, 1)]
    for epoch, checkpoint in enumerate([before or kept[0], kept[1]]):
        runs.append(fit(strategy, f"{folder}/from_{epoch}", checkpoint, precision, editors))
    return runs


def check_resumed(ranks: list[list[dict[str, Any]]], editors: int, folder: Path) -> None:
    whole, before, after = ranks[0]
    for resumed, calls in ((before, 1), (after, 0)):  # the first edit lies between them, the second after both
        assert resumed["calls"] == calls
        assert resumed["state"] == whole["state"]
        assert resumed["more"] == whole["more"]
        assert same(resumed["weights"], whole["weights"])
    if editors == 2:
        assert same(ranks[1][0]["weights"], whole["weights"])
        assert [(calls, facts) for calls, _, facts in whole["more"]] == [(1, 2)]
        assert len(whole["state"]["applied"]) == 4
        assert {name.partition("/")[0] for name in whole["logged"] if "edit" in name} == {"edit_early", "edit_late"}
        summary = json.loads((folder / "from_1" / "summary.json").read_text(encoding="utf-8"))
        assert {name: part["edits"] for name, part in summary["editors"].items()} == {"early": 4, "late": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision", "editors"),
    # for stage 3 see also test_a_killed_rank_costs_no_more_than_a_resume
    [
        ("ddp", "32-true", 2),
        ("deepspeed_cpu_stage_0", "32-true", 1),
        ("deepspeed_cpu_stage_1", "32-true", 1),
        ("deepspeed_cpu_stage_2", "bf16-mixed", 1),
        ("deepspeed_cpu_stage_3", "32-true", 1),
        ("deepspeed_cpu_stage_3", "bf16-true", 2),
    ],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, strategy: str, precision: str, editors: int
) -> None:
    ranks = run_ranks(whole_and_resumed, 2, strategy, str(tmp_path), precision, editors, group=False)
    check_resumed(ranks, editors, tmp_path)


def converted(checkpoint: Path) -> Path:
    """The checkpoint, with DeepSpeed's universal format beside its own."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(checkpoint / "checkpoint"), "--output_folder", str(checkpoint / "universal")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, *folders], capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return checkpoint


def resumed_from(folder: str, universal: dict[int, str], plain: list[str]) -> dict[Any, Any]:
    """Resumes of runs of two ranks from checkpoints of both kinds; what DeepSpeed says if it refuses."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

    found: dict[Any, Any] = {}
    for stage, checkpoint in universal.items():
        found[stage] = fit(DeepSpeedCPUStrategy(stage=stage, load_universal=True), f"{folder}/resumed", checkpoint)
    for strategy in plain:
        try:
            found[strategy] = fit(strategy, f"{folder}/resumed", f"{folder}/{strategy}/kept/epoch=1.ckpt")
        except ZeRORuntimeException as error:
            found[strategy] = str(error)
    return found


def counted(state: dict[str, Any]) -> dict[str, Any]:
    """The state without measurements and hidden states, which another number of ranks computes in another order."""
    others = {name: value for name, value in state.items() if name not in ("survival", "kept")}
    return {**others, "points": [(point["epoch"], point["step"]) for point in state["survival"]["points"]]}


@pytest.mark.slow
def test_a_run_is_resumed_with_another_number_of_ranks(tmp_path: Path) -> None:
    strategies = ["ddp", *(f"deepspeed_cpu_stage_{stage}" for stage in (0, 1, 3))]
    two = run_ranks(fits, 2, strategies, str(tmp_path), group=False)[0]
    # before the edit and behind it
    universal = {
        stage: str(converted(tmp_path / f"deepspeed_cpu_stage_{stage}" / "kept" / f"epoch={epoch}.ckpt"))
        for stage, epoch in ((1, 0), (3, 1))
    }
    plain = ["ddp", "deepspeed_cpu_stage_0", "deepspeed_cpu_stage_3"]
    alone = run_ranks(resumed_from, 1, str(tmp_path), universal, plain, group=False)[0]
    for strategy in ("ddp", "deepspeed_cpu_stage_0"):
        assert alone[strategy]["calls"] == 0
        assert counted(alone[strategy]["state"]) == counted(two[strategy]["state"])
        # float32 in another order, and Adam
        assert distance(alone[strategy]["weights"], two[strategy]["weights"]) < 0.01
    assert "used a DP world size of 2 but the current world size is 1" in alone["deepspeed_cpu_stage_3"]
    same_number = run_ranks(resumed_from, 2, str(tmp_path), universal, [], group=False)[0]
    for stage, calls in ((1, 1), (3, 0)):
        whole = two[f"deepspeed_cpu_stage_{stage}"]
        assert alone[stage]["calls"] == same_number[stage]["calls"] == calls
        assert counted(alone[stage]["state"]) == counted(whole["state"])
        assert distance(alone[stage]["weights"], whole["weights"]) < 0.01
        # nothing is lost on the way through the universal format
        assert same(same_number[stage]["weights"], whole["weights"]), stage


# -- what one rank alone finds wrong ----------------------------------------------------------------------------------


class Failing(EditListener):
    """Fails on rank 1 when an edit begins, before another listener makes forwards."""

    def on_edit_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == 1:
            raise MemoryError("no room to listen")


class Forgetful(KnowledgeEditing):
    """Cannot evaluate on rank 1 what is edited."""

    def evaluate(self, pl_module: Any, *args: Any) -> Any:
        if self.applied_facts and pl_module.global_rank == 1:
            raise MemoryError("no room for a renewal")
        return super().evaluate(pl_module, *args)


class Blind(KnowledgeEditing):
    """Cannot evaluate on rank 1 in a validation."""

    def _log_retention(self, trainer: L.Trainer, pl_module: Any) -> None:
        failure = MemoryError("no room for a validation") if trainer.global_rank else None
        with patch.object(edit_making, "evaluate", side_effect=failure, wraps=edit_making.evaluate):
            super()._log_retention(trainer, pl_module)


def failing_fits(folder: str) -> dict[str, str]:
    """What each rank says of runs in which rank 1 is not like rank 0."""
    from tests.callbacks.conftest import _corpus, _data, _editor, _module, _trainer

    rank, size, said = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), {}
    texts = Path(folder) / f"texts_{rank}.txt"
    if rank == 0:
        texts.write_text("The capital of Italy is Rome.\nIn Spain, people speak Spanish.\n", encoding="utf-8")
    monitor = RoutingMonitor(probe=["The capital of Italy is Rome."])
    runs: dict[str, list[L.Callback]] = {
        "facts": [KnowledgeEditing(_editor(), _corpus().edits[rank:])],
        "listener": [KnowledgeEditing(_editor()), Failing(), monitor],
        "file": [KnowledgeEditing(_editor(), preservation=str(texts))],
        "renewal": [Forgetful(_editor(), renew_every_n_steps=1)],
        "validation": [Blind(_editor())],
    }
    for name, callbacks in runs.items():
        trainer = _trainer(f"{folder}/{name}", callbacks, strategy="ddp", devices=size)
        try:
            trainer.fit(_module(), _data(batch_size=4))
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def test_what_one_rank_finds_wrong_all_say_at_once(tmp_path: Path) -> None:
    first, second = run_ranks(failing_fits, 2, str(tmp_path), group=False)
    for said in (first, second):
        assert said["facts"].startswith("ValueError: the facts must be the same on all ranks")
    failures = {
        "listener": "no room to listen",
        "file": "texts_1.txt",
        "renewal": "no room for a renewal",
        "validation": "no room for a validation",
    }
    for name, text in failures.items():
        assert text in second[name] and not second[name].startswith("RankError")
        assert first[name] == f"RankError: rank 1 failed: {second[name]}"


# -- modules of others -------------------------------------------------------------------------------------------------


def fit_of_another_module(folder: str) -> int:
    """A module that calls its model, not itself, with experts that run one by one and batches that use few of them."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known
    from tests.callbacks.conftest import _data, _editor, _trainer
    from tests.conftest import _build

    data = _data(batch_size=4)
    data.setup("fit")

    class Other(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = _build("olmoe", vocab_size=420)
            self.network.set_experts_implementation("eager")

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with regathering(self):
                return self.network(**{name: part[: 1 + batch_idx % 2] for name, part in batch.items()}).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    editing = KnowledgeEditing(_editor(), at={"epoch": 1})
    trainer = _trainer(folder, [editing], strategy="deepspeed_cpu_stage_3", devices=2, max_epochs=3)
    trainer.fit(Other(), data)
    return len(editing.applied_facts)


@pytest.mark.slow
def test_ranks_may_use_different_experts_in_a_module_that_calls_its_model(tmp_path: Path) -> None:
    first, second = run_ranks(fit_of_another_module, 2, str(tmp_path), group=False)
    assert first == second > 0


# -- a rank that dies -------------------------------------------------------------------------------------------------


def killed(strategy: str, folder: str, *settings: Any) -> None:
    """Rank 1 dies when it has changed the first expert of the second layer."""
    rank_1_dies_in_the_second_layer()
    fit(strategy, folder, None, *settings)


@pytest.mark.slow
def test_a_killed_rank_costs_no_more_than_a_resume(tmp_path: Path) -> None:
    strategy, settings = "deepspeed_cpu_stage_3", ("bf16-true", 1)
    folder = str(tmp_path / "killed")
    first, second = start_ranks(killed, 2, strategy, folder, *settings, group=False, seconds=100)
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 1
    assert first.error is not None and "Connection" in first.error  # it did not wait for the dead
    checkpoint = tmp_path / "killed" / "kept" / "epoch=0.ckpt"
    assert not checkpoint.with_name("epoch=1.ckpt").exists()
    ranks = run_ranks(whole_and_resumed, 2, strategy, str(tmp_path), *settings, str(checkpoint), group=False)
    check_resumed(ranks, 1, tmp_path)
