"""Runs of the Trainer under expert parallelism of transformers: edits in the middle of `fit`, guards, failures."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lit_moeedit.callbacks import EditListener, KnowledgeEditing, RoutingMonitor
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.ranks import RankError
from tests.callbacks.conftest import CONFIG, _data, _editor, _trainer
from tests.callbacks.test_fsdp2_runs import distance, full, same
from tests.processes import run_ranks, start_ranks
from tests.sharding.test_fsdp2 import added


def saved(folder: Path) -> str:
    """A checkpoint with fresh weights."""
    L.seed_everything(0, verbose=False)
    module, data = LitMoE(config=CONFIG), _data()
    module.configure_model()
    data.setup("fit")
    module.model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return str(folder)


class Recorder(EditListener):
    """The edited weights before and after an edit."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.deltas: Any = None
        self.kept: bool | None = None

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Any) -> None:
        self.before = down_projections(pl_module)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: Any) -> None:
        self.after, self.deltas, self.kept = down_projections(pl_module), event.result.deltas, event.result.kept


def down_projections(module: Any) -> list[Tensor]:
    return [full(layer.mlp.experts.down_proj) for layer in module.model.model.layers]


def fit(
    path: str,
    folder: str,
    callbacks: Any = (),
    lr: float = 0.0,
    checkpoint: str | None = None,
    shares_experts: bool = True,
    **changes: Any,
) -> Any:
    """Train for four steps, in one process or on all ranks, which share the experts or have FSDP2 alone."""
    torch.use_deterministic_algorithms(True)
    L.seed_everything(0, verbose=False)
    # Lightning forgets the environment after the first run
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    owners = size if shares_experts else 1
    module = LitMoE(pretrained=path, learning_rate=lr, weight_decay=0.0, warmup=0.0, expert_parallel_size=owners)
    strategy: Any = ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1) if size > 1 else "auto"
    settings = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0, "logger": False, **changes}
    trainer = _trainer(folder, callbacks, strategy=strategy, devices=size, **settings)
    data = _data(batch_size=8 // size, samples_per_epoch=16)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return module


def editing(**guards: Any) -> KnowledgeEditing:
    return KnowledgeEditing(_editor(), at={"step": 2}, on_failure="keep", survival_every_n_steps=None, **guards)


def edited(path: str, folder: str) -> dict[str, Any]:
    """An edit after the second of four steps at learning rate 0."""
    recorder, monitor = Recorder(), RoutingMonitor(probe=["The capital of Italy is Rome."])
    callback = editing()
    module = fit(path, folder, [callback, recorder, monitor], gradient_clip_val=0.5)
    return {
        "after": recorder.after,
        "expected": added(recorder.before, recorder.deltas),
        "end": down_projections(module),
        "change": float((recorder.after[0] - recorder.before[0]).abs().max()),
        "routing": monitor.last_edit,
        "metrics": callback.evaluate(module).metrics,
    }


def weights(module: Any) -> dict[str, Tensor]:
    return {name: full(weight) for name, weight in module.named_parameters()}


class Failure(Exception):
    pass


class FailsAfterTheCommit(Recorder):
    """The second rank fails when the edit is in the weights."""

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: Any) -> None:
        super().on_edit_end(trainer, pl_module, event)
        if dist.get_rank() == 1:
            raise Failure("injected")


def failed(path: str, folder: str) -> str:
    error = Failure if dist.is_initialized() and dist.get_rank() == 1 else RankError
    with pytest.raises(error, match="injected") as caught:
        fit(path, folder, [editing(), FailsAfterTheCommit()])
    return type(caught.value).__name__


class FailsInAForward(EditListener):
    """The second rank fails within a forward of the edit, in which the ranks exchange tokens."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Any) -> None:
        def fail(*args: Any) -> None:
            Path(self.folder, "failed").write_text(str(time.time()))
            raise Failure("injected")

        if dist.get_rank() == 1:
            pl_module.model.model.layers[1].mlp.experts.register_forward_pre_hook(fail)


def failed_alone(path: str, folder: str) -> None:
    fit(path, folder, [editing(), FailsInAForward(folder)])


def undone(path: str, folder: str) -> dict[str, Any]:
    """A run whose edit a guard undoes, and one without an edit."""
    recorder = Recorder()
    guarded = fit(path, folder, [editing(max_perplexity_ratio=1e-6), recorder], lr=1e-3)
    plain = fit(path, folder, lr=1e-3)
    return {
        "kept": recorder.kept,
        "same": same(weights(guarded), weights(plain)),
        "restored": all(torch.equal(x, y) for x, y in zip(recorder.before, recorder.after, strict=True)),
    }


def clipped(path: str, folder: str) -> dict[str, Tensor]:
    return weights(fit(path, folder, lr=1e-3, gradient_clip_val=0.1))


def resumed(path: str, folder: str) -> dict[str, Any]:
    """A run with an edit, and one that goes on from its checkpoint after the edit."""
    epochs: dict[str, Any] = {"max_steps": -1, "max_epochs": 3}
    kept = ModelCheckpoint(Path(folder) / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = fit(path, folder, [editing(), kept], lr=1e-3, **epochs)
    again = editing()
    rest = fit(path, folder, [again], lr=1e-3, **epochs, checkpoint=f"{folder}/kept/epoch=1.ckpt")
    return {"same": same(weights(whole), weights(rest)), "calls": len(again.editor.calls)}


def others(path: str, folder: str) -> dict[str, Any]:
    return {
        "undone": undone(path, folder),
        "clipped": clipped(path, folder),
        "resumed": resumed(path, folder),
        "failed": failed(path, folder),
    }


@pytest.mark.slow
def test_a_run_edits_as_one_process(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    found, alone = run_ranks(edited, 2, path, str(tmp_path), group=False), edited(path, str(tmp_path))
    assert alone["change"] > 0.1
    for own in found:
        for name in ("expected", "end"):
            assert all(torch.equal(x, y) for x, y in zip(own["after"], own[name], strict=True)), name
        for weight, other in zip(own["after"], alone["after"], strict=True):
            # float32 in batches of other sizes
            torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
        assert own["metrics"] == pytest.approx(alone["metrics"], abs=1e-3, nan_ok=True)
        assert own["routing"] == pytest.approx(alone["routing"], abs=1e-3)


@pytest.mark.slow
def test_what_is_undone_clipped_and_resumed_is_that_of_other_runs(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    found, alone = run_ranks(others, 2, path, str(tmp_path), group=False), clipped(path, str(tmp_path))
    for number, own in enumerate(found):
        assert own["undone"] == {"kept": False, "same": True, "restored": True}
        # the norm is summed in another order
        assert distance(own["clipped"], alone) < 1e-5
        assert own["resumed"] == {"same": True, "calls": 0}
        assert own["failed"] == ("RankError", "Failure")[number]


@pytest.mark.slow
def test_a_rank_that_fails_in_the_exchange_of_tokens_ends_the_other(tmp_path: Path) -> None:
    outcomes = start_ranks(failed_alone, 2, saved(tmp_path / "model"), str(tmp_path), group=False)
    assert time.time() - float((tmp_path / "failed").read_text()) < 20
    assert all(outcome.exitcode for outcome in outcomes)
    assert "injected" in (outcomes[1].error or "")


def test_experts_are_shared_under_one_strategy_only(tmp_path: Path) -> None:
    path = saved(tmp_path / "model")
    with pytest.raises(ValueError, match="needs ModelParallelStrategy on a multiple of 2 ranks, got SingleDevice"):
        _trainer(tmp_path, [], logger=False).fit(LitMoE(pretrained=path, expert_parallel_size=2), _data())
    module = LitMoE(pretrained=path, expert_parallel_size=2)
    module.configure_model()  # without a Trainer the model is whole
    assert module.model is not None


def test_lightning_does_not_warn_of_the_clipping_under_deepspeed() -> None:
    assert not is_overridden("configure_gradient_clipping", LitMoE(config=CONFIG), L.LightningModule)
