"""The device that is not there: it refuses what CUDA refuses, lets through what CUDA lets through; and the module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from lit_moeedit.losses import balancing_loss, next_token_loss
from lit_moeedit.module import LitMoE
from tests.conftest import COMMON, FAMILIES
from tests.devices import DeviceMismatchError, pretended_cuda

OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "qwen3_moe"]

# -- what the device is -----------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    # x is on the device, y on the CPU
    "sum": lambda x, y: x + y,
    "sum, the other way round": lambda x, y: y + x,
    "fresh zeros": lambda x, y: torch.zeros(3) + x,
    "product": lambda x, y: x @ y,
    "in place": lambda x, y: y.add_(x),
    "in place, a number": lambda x, y: y[0].add_(x[0]),
    "a number of the device": lambda x, y: y * x[0],
    "out": lambda x, y: torch.add(x, x, out=y),
    "choice": lambda x, y: torch.where(x > 0, x, y),
    "choice by a mask of the CPU": lambda x, y: torch.where(y > 0, x, x),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.0),
    "masked_select": lambda x, y: x.masked_select(y > 0),
    "index_select": lambda x, y: x.index_select(0, torch.tensor([0])),
    "gather": lambda x, y: x.gather(0, torch.tensor([0])),
    "index_add": lambda x, y: x.index_add(0, torch.tensor([0]), x[:1]),
    "index_copy": lambda x, y: x.index_copy(0, torch.tensor([0]), x[:1]),
    "scatter": lambda x, y: x.scatter(0, torch.tensor([0]), x[:1]),
    "embedding": lambda x, y: F.embedding(torch.tensor([0]), x[:, None]),
    "searchsorted": lambda x, y: torch.searchsorted(x, y),
    "concatenation": lambda x, y: torch.cat([x, y]),
    "stack": lambda x, y: torch.stack([x, y]),
    "an index of the device into the CPU": lambda x, y: y[torch.tensor([0], device=x.device)],
    "a mask of the device into the CPU": lambda x, y: y[x > 0],
    "values of the CPU by index": lambda x, y: x.index_put((torch.tensor([0, 1, 2]),), y),
    "equal": lambda x, y: torch.equal(x, y),
    "cross entropy": lambda x, y: F.cross_entropy(x[None], torch.tensor([1])),
    "layer norm": lambda x, y: F.layer_norm(x, (3,), weight=y),
    "attention mask": lambda x, y: F.scaled_dot_product_attention(*[x.view(1, 1, 3)] * 3, attn_mask=y[:1, None]),
    "drawn by a generator of the CPU": lambda x, y: torch.randn(3, device=x.device, generator=torch.Generator()),
}  # fmt: skip
LET_THROUGH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "number": lambda x, y: x * 2.0 + y[0],
    "number first": lambda x, y: torch.tensor(2.0) * x,
    "number in a choice": lambda x, y: torch.where(x > 0, x, y[0]),
    "index of the CPU": lambda x, y: x[torch.tensor([0, 1])],
    "mask of the CPU": lambda x, y: x[y > 0],
    "number by index": lambda x, y: x.clone().index_put_((torch.tensor([0]),), y[0]),
    "number by mask": lambda x, y: x.masked_fill(x > 0, y[0]),
    "to": lambda x, y: y.to(x.device) + x,
    "to the same as": lambda x, y: y.to(x) + x,
    "cuda": lambda x, y: y.cuda() + x,
    "copy": lambda x, y: torch.empty_like(x).copy_(y),
    "assignment": lambda x, y: torch.zeros_like(x).__setitem__(slice(None), y) or x,
    "new": lambda x, y: x.new_zeros(3) + x.new_tensor([1.0]) + x.new_full((3,), 2),
    "alike": lambda x, y: torch.ones_like(x) + torch.zeros_like(y, device=x.device),
    "factories": lambda x, y: torch.eye(3, device="cuda") + torch.full((3,), 1.0, device="cuda:0") + x,
    "arange": lambda x, y: x[torch.arange(3, device=x.device)],
    "padded": lambda x, y: torch.nn.utils.rnn.pad_sequence([x, x[:1]]) @ x[:2],
    "a copy": lambda x, y: copy.deepcopy(x) + copy.deepcopy(torch.nn.Parameter(x)),
    "a half": lambda x, y: x.split([1, 2])[1] + x[1:],
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_that_are_mixed_are_refused(cuda, name: str) -> None:
    with pytest.raises(DeviceMismatchError):
        REFUSED[name](torch.ones(3, device=cuda), torch.ones(3))


@pytest.mark.parametrize("name", LET_THROUGH)
def test_what_pytorch_moves_by_itself_is_on_the_device(cuda, name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], device=cuda)
    there, plain = LET_THROUGH[name](x, torch.ones(3)), torch.ones(3).sum()
    assert there.device == cuda and there.is_cuda and not there.is_cpu and plain.device.type == "cpu"


def test_numbers_are_read_on_the_cpu_only(cuda) -> None:
    x = torch.arange(3, device=cuda)
    with pytest.raises(TypeError, match=r"can't convert cuda:0"):
        x.numpy()
    assert x.cpu().numpy().tolist() == x.tolist() == [0, 1, 2]
    assert x.cpu().device.type == "cpu" and x.to("cpu").cuda().device == cuda


def test_gradients_go_back_to_where_they_belong(cuda) -> None:
    weight, layer = torch.ones(3, requires_grad=True), torch.nn.Linear(3, 3).to(cuda)
    layer(weight.to(cuda).double().float()).unbind()[0].backward()
    assert weight.grad is not None and weight.grad.device.type == "cpu"
    assert layer.weight.device == cuda and layer.weight.grad is not None and layer.weight.grad.device == cuda


def test_the_random_state_and_autocast(cuda) -> None:
    with torch.random.fork_rng(devices=[cuda]), torch.autocast("cuda", torch.bfloat16):
        product = torch.ones(2, 2, device=cuda) @ torch.ones(2, 2, device=cuda)
    assert product.dtype == torch.bfloat16 and product.device == cuda


def test_a_state_dict_is_loaded_onto_the_device(cuda) -> None:
    layer, again = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to(cuda)
    again.load_state_dict(layer.state_dict())
    assert again.weight.device == cuda and torch.equal(again.weight.cpu(), layer.weight)


def test_behind_the_block_nothing_is_left_of_it() -> None:
    before = dict(vars(Tensor)), dict(vars(torch)), dict(vars(torch.cuda))
    with pretended_cuda() as device:
        weight = torch.ones(2, device=device)
        torch.random.get_rng_state()
    assert weight.device.type == "cpu" and not weight.is_cuda
    assert torch.equal(weight + torch.ones(2), torch.full((2,), 2.0))
    assert (dict(vars(Tensor)), dict(vars(torch)), dict(vars(torch.cuda))) == before


# -- three faults that it must find -----------------------------------------------------------------------------------


def test_a_metric_left_on_the_cpu(cuda) -> None:
    logits, labels = torch.randn(2, 4, 7, device=cuda), torch.ones(2, 4, dtype=torch.long, device=cuda)
    for use in (Perplexity().forward, Perplexity().update):
        with pytest.raises(DeviceMismatchError):
            use(logits, labels)
    moved = Perplexity().to(cuda)
    assert moved(logits, labels).device == cuda


def test_an_index_made_on_the_cpu(cuda) -> None:
    hidden = torch.randn(5, 3, device=cuda)
    with pytest.raises(DeviceMismatchError):
        torch.zeros(5, 3, device=cuda).index_add_(0, torch.arange(5), hidden)


def test_zeros_made_on_the_cpu(cuda) -> None:
    with pytest.raises(DeviceMismatchError):
        torch.zeros(3) + torch.randn(3, device=cuda)


# -- models and losses ------------------------------------------------------------------------------------------------


def _batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 5:], labels[0, 5:], labels[1, :4] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _module(family: str, **changes: Any) -> tuple[LitMoE, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = LitMoE(config={**COMMON, **FAMILIES[family], "model_type": family}, **changes)
    module.configure_model()
    logged: dict[str, Any] = {}
    vars(module)["log"] = lambda name, value, **options: logged.__setitem__(name, value)
    return module, logged


@pytest.mark.parametrize("family", ["qwen3_moe", *OTHERS])
def test_steps_of_the_module(cuda, family: str) -> None:
    plain, expected = _module(family, label_smoothing=0.1)
    there, logged = _module(family, label_smoothing=0.1)
    there.to(cuda)
    batch = {name: tensor.to(cuda) for name, tensor in _batch().items()}
    losses = [plain.training_step(_batch(), 0), there.training_step(batch, 0)]
    for loss in losses:
        loss.backward()
    assert losses[1].device == cuda and torch.equal(losses[1].cpu(), losses[0])
    for weight, same in zip(there.parameters(), plain.parameters(), strict=True):
        if same.grad is not None:
            assert weight.grad is not None and weight.grad.device == cuda and torch.equal(weight.grad.cpu(), same.grad)
    with torch.no_grad():
        for module, given in ((plain, _batch()), (there, batch)):
            module.validation_step(given, 0)
            module.test_step(given, 0)
            module.predict_step(given, 0)
    assert logged.keys() == expected.keys()
    for name, value in logged.items():
        found, wanted = (x.compute() if isinstance(x, Perplexity) else x for x in (value, expected[name]))
        assert found.device == cuda and torch.equal(found.cpu(), wanted), name


def test_losses_of_several_ranks(cuda) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    routers = [torch.randn(10, 4, generator=generator) for _ in range(2)]
    mask, auxiliary = torch.ones(2, 5, dtype=torch.long), torch.tensor(0.5)

    def total(tensor: Tensor) -> Tensor:
        return 2 * tensor

    def losses(device: torch.device) -> list[Tensor]:
        own = [router.to(device) for router in routers]
        balance = balancing_loss(auxiliary.to(device), own, mask.to(device), 2, 2, total)
        return [*next_token_loss(logits.to(device), labels.to(device), 0.1, 2, total), *balance]

    for there, plain in zip(losses(cuda), losses(torch.device("cpu")), strict=True):
        assert there.device == cuda and torch.equal(there.cpu(), plain)
