"""A checkpoint that cannot be written leaves the one before it, in a run of Lightning and of DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from lit_moeedit.checkpoints.atomic import AtomicCheckpointIO, save_atomically
from lit_moeedit.checkpoints.read import read_checkpoint
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
from tests.checkpoints.full_disk import full_disk
from tests.checkpoints.test_export import module, train
from tests.processes import run_ranks


def sums(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["state_dict"]["a"].sum())


@pytest.mark.parametrize("size", [2_000, 100_000, 10_000_000])
def test_a_full_disk_leaves_the_checkpoint_before(size: int, tmp_path: Path) -> None:
    path, io = tmp_path / "new" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.ones(100)}}, path)
    with pytest.raises(OSError, match=r"File too large.*last\.ckpt"), full_disk(4096):
        io.save_checkpoint({"state_dict": {"a": torch.zeros(size)}}, path)
    assert sums(path) == 100 and [child.name for child in path.parent.iterdir()] == ["last.ckpt"]
    io.save_checkpoint({"state_dict": {"a": torch.full((100,), 2.0)}}, path)
    assert sums(path) == 200 and [child.name for child in path.parent.iterdir()] == ["last.ckpt"]
    assert io.load_checkpoint(path, weights_only=True)["state_dict"].keys() == {"a"}


def test_an_interrupt_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.ones(100)}}, path)

    class Interrupted(dict[str, Any]):
        def __reduce_ex__(self, _: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"state_dict": {"a": torch.zeros(100)}, "callbacks": Interrupted()}, path)
    assert sums(path) == 100 and [child.name for child in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_the_user_chose_stays() -> None:
    def io_of(*plugins: Any) -> Any:
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, plugins=[*plugins])
        save_atomically(trainer.strategy)
        return trainer.strategy.checkpoint_io

    class Own(TorchCheckpointIO):
        pass

    own = Own()
    assert isinstance(io_of(), AtomicCheckpointIO) and isinstance(io_of(TorchCheckpointIO()), AtomicCheckpointIO)
    assert io_of(own) is own
    assert io_of(AsyncCheckpointIO(own)).checkpoint_io is own
    assert isinstance(io_of(AsyncCheckpointIO()).checkpoint_io, AtomicCheckpointIO)
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, "it.ckpt", storage_options={"a": 1})


def save_under_deepspeed(root: str) -> tuple[list[str], list[bool]]:
    """Save to one place over the first checkpoint, on a full disk, and again; returns what is there afterwards."""
    path = Path(root) / "last.ckpt"
    strategy = DeepSpeedCPUStrategy(stage=3, param_persistence_threshold=0)
    save_atomically(strategy)
    trainer = train(module("qwen3_moe"), Path(root), "last.ckpt", devices=2, strategy=strategy)
    before = {name: stored.read() for name, stored in read_checkpoint(path).tensors.items()}
    same = []
    for full in (False, True, False):
        trainer.strategy.barrier()
        if full:
            with pytest.raises((OSError, RuntimeError)), full_disk(2000):
                trainer.save_checkpoint(path)
        else:
            trainer.save_checkpoint(path)
        after = {name: stored.read() for name, stored in read_checkpoint(path).tensors.items()}
        same.append(after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before))
    trainer.strategy.barrier()
    return sorted(child.name for child in Path(root).iterdir()), same


@pytest.mark.deepspeed
def test_a_folder_of_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    for names, same in run_ranks(save_under_deepspeed, 2, str(tmp_path), group=False):
        assert names == ["last.ckpt"] and same == [True] * 3
