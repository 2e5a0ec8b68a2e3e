"""Backward passes beside the training do not change it, whatever DeepSpeed hooks into the model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.zero3_passes import beside_training
from tests.conftest import COMMON, FAMILIES
from tests.processes import run_ranks

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def gradient_of_an_offset(model: nn.Module, layer: nn.Module, ids: Tensor) -> Tensor:
    """How the logits answer to an offset of the hidden states behind a layer."""
    offset = torch.zeros(COMMON["hidden_size"], requires_grad=True)
    handle = layer.register_forward_hook(lambda module, inputs, output: output + offset.to(output.dtype))
    try:
        with beside_training(model):
            (gradient,) = torch.autograd.grad(model(input_ids=ids).logits.float().pow(2).mean(), offset)
    finally:
        handle.remove()
    return gradient


class Beside(L.Callback):
    """Backward passes through the model between all batches, in the middle of an accumulation, too."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if self.active:
            ids = torch.tensor([[5, 6, 7, 8 + trainer.global_rank]])
            self.gradients.append(gradient_of_an_offset(module.model, module.model.model.layers[0], ids))


def train(stage: int, active: bool) -> tuple[list[float], list[Tensor], int]:
    from deepspeed.utils import get_z3_leaf_modules

    from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

    L.seed_everything(0, verbose=False)
    ids = torch.randint(3, 60, (16, 7), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    beside = Beside(active)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=DeepSpeedCPUStrategy(stage=stage, param_persistence_threshold=0),
        max_epochs=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[beside],
    )  # fmt: skip
    module = LitMoE(config={"model_type": "qwen3_moe", **COMMON, **FAMILIES["qwen3_moe"]}, learning_rate=0.01)
    trainer.fit(module, DataLoader(rows, batch_size=2))
    return beside.losses, beside.gradients, len(get_z3_leaf_modules(module))


def train_both() -> list[Any]:
    return [train(stage, active) for stage in (2, 3) for active in (False, True)]


@pytest.mark.slow
def test_training_goes_on_as_if_nothing_had_been() -> None:
    for replicated, replicated_beside, sharded, sharded_beside in run_ranks(train_both, 2, group=False):
        assert sharded_beside[2] == 3, "DeepSpeed hooks nothing in that this could be a test of"
        assert replicated[0] == replicated_beside[0] and sharded[0] == sharded_beside[0]
        assert len(sharded_beside[1]) == 4 and all(gradient.abs().sum() > 0 for gradient in sharded_beside[1])
        torch.testing.assert_close(sharded_beside[1], replicated_beside[1], atol=1e-6, rtol=1e-3)


def test_without_deepspeed_nothing_changes() -> None:
    layer, offset = nn.Linear(2, 2), torch.zeros(2, requires_grad=True)
    seen = []
    layer.register_full_backward_hook(lambda *args: seen.append(True))
    with beside_training(nn.Sequential(layer)):
        torch.autograd.grad(layer(torch.ones(2) + offset).sum(), offset)
    assert seen == [True]
