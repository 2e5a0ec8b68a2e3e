"""Tests of losses on several ranks: training is the same as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_moeedit.losses import balancing_loss, next_token_loss, switch_loss
from lit_moeedit.module import LitMoE
from tests.processes import run_ranks

FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"]


def padded(input_ids: Tensor) -> Tensor:
    mask = torch.ones_like(input_ids)
    mask[0, 5:] = mask[1, :3] = 0
    return mask


def routed(model: Any, ids: Tensor, mask: Tensor) -> Any:
    return model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    routers = [weight for name, weight in model.named_parameters() if "gate.weight" in name or "router.weight" in name]
    assert len(routers) == 3
    return list(torch.autograd.grad(loss, routers, retain_graph=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_is_that_of_transformers(make_model: Any, input_ids: Tensor, family: str) -> None:
    model = make_model(family)
    for mask in (torch.ones_like(input_ids), padded(input_ids)):
        outputs = routed(model, input_ids, mask)
        loss = switch_loss(outputs.router_logits, mask, model.num_experts_per_tok, 1, lambda tensor: tensor)
        torch.testing.assert_close(loss.local, outputs.aux_loss)
        torch.testing.assert_close(loss.value, outputs.aux_loss.detach())
        torch.testing.assert_close(gradients(model, loss.local), gradients(model, outputs.aux_loss))


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_two_ranks_make_the_loss_of_the_whole(make_model: Any, input_ids: Tensor, family: str) -> None:
    model, mask = make_model(family), padded(input_ids)
    whole = routed(model, input_ids, mask)
    # one row with padding, and two of which one has other padding: not half of the tokens each
    parts = [(routed(model, input_ids[part], mask[part]), mask[part]) for part in (slice(0, 1), slice(1, 3))]
    k, sums = model.num_experts_per_tok, list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor

    for outputs, own in parts:
        switch_loss(outputs.router_logits, own, k, 2, note)
    total = sums[0] + sums[1]
    losses = [switch_loss(outputs.router_logits, own, k, 2, lambda _: total.clone()) for outputs, own in parts]
    torch.testing.assert_close(losses[0].value, whole.aux_loss.detach())
    assert torch.equal(losses[0].value, losses[1].value)
    mean = (losses[0].local + losses[1].local) / 2
    torch.testing.assert_close(mean, whole.aux_loss)
    # the gradient of a router is a sum over tokens, in another order
    torch.testing.assert_close(gradients(model, mean), gradients(model, whole.aux_loss), rtol=1e-4, atol=1e-6)


def test_one_rank_has_what_transformers_computes(make_model: Any, input_ids: Tensor) -> None:
    model, mask = make_model("qwen3_moe"), padded(input_ids)
    outputs = routed(model, input_ids, mask)
    loss = balancing_loss(outputs.aux_loss, outputs.router_logits, mask, 2, 1, _never)
    assert loss.local is outputs.aux_loss and torch.equal(loss.value, outputs.aux_loss)


@pytest.mark.parametrize(("shape", "k"), [((2, 27, 6), 2), ((3, 6), 2), ((27, 6), None)])
def test_other_routers_keep_what_transformers_computes(input_ids: Tensor, shape: tuple[int, ...], k: int) -> None:
    auxiliary = torch.tensor(1.5, requires_grad=True)
    loss = balancing_loss(auxiliary * 2, [torch.randn(shape)], padded(input_ids), k, 2, lambda own: own.add_(5.0))
    assert loss.local == 3.0 and loss.value == 4.0 and loss.local.requires_grad


def test_a_rank_without_counted_tokens_has_a_share_of_nothing() -> None:
    logits, labels = torch.randn(1, 4, 9, requires_grad=True), torch.full((1, 4), -100)
    loss = next_token_loss(logits, labels, 0.1, 2, lambda own: own + torch.tensor([6.0, 3.0]))
    assert loss.local == 0.0 and loss.value == 2.0
    loss.local.backward()
    assert logits.grad is not None and not logits.grad.any()


def _never(tensor: Tensor) -> Tensor:
    raise AssertionError("nothing to add up on one rank")


# -- runs -------------------------------------------------------------------------------------------------------------


class Descent(LitMoE):
    """LitMoE with plain gradient descent, because Adam would amplify rounding errors of zero gradients."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


class Watch(L.Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.counted: list[int] = []
        self.padding = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.counted.append(int((batch["labels"][:, 1:] >= 0).sum()))
        self.padding += int((batch["attention_mask"] == 0).sum())


def train(strategy: str, ranks: int, folder: str) -> dict[str, Any]:
    """Train for three steps of four statements each, and return the weights."""
    import lit_moeedit.sharding.cpu_strategy  # noqa: F401 - makes the strategies known
    from tests.callbacks.conftest import CONFIG, _data, _trainer

    L.seed_everything(0, verbose=False)
    module, watch = Descent(config=CONFIG, router_loss=0.5, label_smoothing=0.1), Watch()
    keys: dict[str, Any] = {"max_epochs": 1, "logger": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    trainer = _trainer(folder, [watch], strategy=strategy, devices=ranks, gradient_clip_val=1.0, **keys)
    trainer.fit(module, _data(batch_size=4 // ranks, samples_per_epoch=12, completion_only=False))
    return {
        "weights": whole_weights(module),
        "logged": watch.logged,
        "counted": watch.counted,
        "padding": watch.padding,
    }


def whole_weights(module: Any) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def train_each(strategies: list[str], folder: str) -> dict[str, Any]:
    return {strategy: train(strategy, 2, folder) for strategy in strategies}


@pytest.mark.deepspeed
def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    strategies = ["ddp", "deepspeed_cpu_stage_3"]
    ranks = run_ranks(train_each, 2, strategies, str(tmp_path), group=False)
    alone = train("auto", 1, str(tmp_path))
    for strategy in strategies:
        first, second = (rank[strategy] for rank in ranks)
        assert first["logged"] == second["logged"]
        assert [a + b for a, b in zip(first["counted"], second["counted"], strict=True)] == alone["counted"]
        assert any(a != b for a, b in zip(first["counted"], second["counted"], strict=True)), "nothing is uneven"
        assert first["padding"] + second["padding"] > 0 and alone["padding"] > 0
        for ours, theirs in zip(first["logged"], alone["logged"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5) and ours["train/router_loss"] > 0
        assert first["weights"].keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            # sums of float32 in another order, 1e-7 each, through three steps that move weights by up to 0.1
            torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=1e-5, msg=f"{strategy}: {name}")
