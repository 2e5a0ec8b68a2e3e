"""Resumes under ``ModelParallelStrategy``: after a rank was killed, and with another number of ranks."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lit_moeedit.checkpoints.read import check_harmless, read_checkpoint
from lit_moeedit.cli import run
from lit_moeedit.editing import EditMemory
from tests.callbacks.conftest import CONFIG, _corpus
from tests.callbacks.test_fsdp2_runs import fit, same
from tests.dying import rank_1_dies_in_the_second_layer
from tests.processes import run_ranks, start_ranks

# -- a rank that dies -------------------------------------------------------------------------------------------------


def killed(folder: str) -> None:
    """Rank 1 dies when it has changed the first of its experts in the second layer."""
    rank_1_dies_in_the_second_layer()
    fit("fsdp2", folder)


def whole_and_resumed(folder: str, checkpoint: str) -> list[dict[str, Any]]:
    return [fit("fsdp2", f"{folder}/whole"), fit("fsdp2", f"{folder}/resumed", checkpoint=checkpoint)]


@pytest.mark.slow
def test_a_killed_rank_costs_no_more_than_a_resume(tmp_path: Path) -> None:
    first, second = start_ranks(killed, 2, str(tmp_path / "killed"), group=False, seconds=100)
    assert second.exitcode == -signal.SIGKILL
    assert first.exitcode == 1
    assert first.error is not None and "Connection" in first.error  # it did not wait for the dead
    checkpoint = tmp_path / "killed" / "kept" / "epoch=0.ckpt"
    assert not checkpoint.with_name("epoch=1.ckpt").exists()
    check_harmless(checkpoint)
    for whole, resumed in run_ranks(whole_and_resumed, 2, str(tmp_path), str(checkpoint), group=False):
        assert whole["calls"] == resumed["calls"] == 1
        assert resumed["state"] == whole["state"]
        assert same(resumed["weights"], whole["weights"])


# -- another number of ranks ------------------------------------------------------------------------------------------


def config(folder: Path) -> Path:
    """A run that edits half of the facts before its second epoch and half before its third, with a memory."""
    rows = [fact.to_dict() for fact in _corpus().edits]
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 3,
            "deterministic": True,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "{epoch}", "save_top_k": -1, "save_on_train_epoch_end": True},
                }
            ],
        },
        "edit": {
            "facts": rows,
            "at": {"every_n_epochs": 1, "batch": 3},
            "on_failure": "keep",
            "editor": {
                "class_path": "lit_moeedit.editing.Editor",
                "init_args": {
                    "layers": [0, 1],
                    "token": "last",
                    "targets": {
                        "class_path": "lit_moeedit.editing.TargetOptimizer",
                        "init_args": {"steps": 3, "learning_rate": 0.5, "clamp": 2.0, "weight_decay": 0.05},
                    },
                    "memory": {"class_path": "lit_moeedit.editing.EditMemory"},
                },
            },
        },
        "model": {"class_path": "lit_moeedit.module.LitMoE", "init_args": {"config": CONFIG, "learning_rate": 3e-3}},
        "data": {
            "class_path": "lit_moeedit.data.FactsDataModule",
            "init_args": {
                "corpus": {"class_path": "lit_moeedit.data.Atlas", "init_args": {"edits": 6, "seed": 1}},
                "vocab_size": 420,
                "samples_per_epoch": 16,
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def command(path: str, folder: str, size: int, checkpoint: str | None = None) -> int:
    """Run the command on one rank; returns the number of edits that it made."""
    strategy = {"data_parallel_size": size, "tensor_parallel_size": 1}
    options = {
        "trainer.strategy": "lightning.pytorch.strategies.ModelParallelStrategy",
        **{f"trainer.strategy.init_args.{name}": value for name, value in strategy.items()},
        "trainer.devices": size,
        "trainer.default_root_dir": folder,
        "trainer.callbacks.init_args.dirpath": f"{folder}/kept",
        "data.init_args.batch_size": 8 // size,
    }
    given = [f"--{name}={value}" for name, value in options.items()]
    made: list[int] = []
    original = EditMemory.remember

    def remember(memory: EditMemory, *args: Any) -> None:
        made.append(1)
        original(memory, *args)

    EditMemory.remember = remember  # type: ignore[method-assign]
    run(args=["fit", f"--config={path}", *given, *([f"--ckpt_path={checkpoint}"] if checkpoint else [])])
    return len(made)


def end(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state of the callback in the last checkpoint of a run."""
    found = read_checkpoint(folder / "kept" / "epoch=2.ckpt")
    (state,) = (state for name, state in found.callbacks.items() if name.startswith("KnowledgeEditing"))
    return {name: tensor.read() for name, tensor in found.tensors.items()}, state


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_a_run_is_resumed_with_another_number_of_ranks(tmp_path: Path) -> None:
    path, edits = str(config(tmp_path)), {}
    for size in (1, 2):
        edits[size] = run_ranks(command, size, path, str(tmp_path / f"{size}"), size, group=False)
    for size, other in ((1, 2), (2, 1)):
        checkpoint, folder = tmp_path / f"{other}" / "kept" / "epoch=1.ckpt", tmp_path / f"{other} to {size}"
        assert checkpoint.is_dir()
        edits[-size] = run_ranks(command, size, path, str(folder), size, str(checkpoint), group=False)
        check_alike(end(folder), end(tmp_path / "1"))
    assert edits == {1: [2], 2: [2, 2], -1: [1], -2: [1, 1]}
    with pytest.raises(
        ValueError, match=r"epoch=1\.ckpt is a checkpoint of FSDP2, which needs trainer\.strategy: Model"
    ):
        run(
            args=[
                "fit",
                f"--config={path}",
                f"--trainer.default_root_dir={tmp_path}/plain",
                f"--ckpt_path={checkpoint}",
            ]
        )


def check_alike(
    found: tuple[dict[str, Tensor], dict[str, Any]], whole: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    """Compare the end of a run with that of one process, which was not interrupted."""
    (weights, state), (expected, expected_state) = found, whole
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        # float32 in another order, through two edits and four steps of Adam
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)
    counts = ("applied", "undone", "edits_made", "last_step", "facts")
    assert {name: state[name] for name in counts} == {name: expected_state[name] for name in counts}
    assert len(state["applied"]) == 6 and state["memory"].keys() == {0, 1}
    for layer, known in expected_state["memory"].items():
        own = state["memory"][layer]
        assert own["facts"] == known["facts"] and len(set(own["facts"])) == 6
        assert torch.equal(own["row"], known["row"]) and torch.equal(own["expert"], known["expert"])
        # of weights that differ by the same
        torch.testing.assert_close(own["key"], known["key"], rtol=0, atol=1e-4 * float(known["key"].abs().max()))
