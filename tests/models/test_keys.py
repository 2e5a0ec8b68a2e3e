"""Tests of the keys of all experts at once against those of one expert after the other."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_moeedit.models import keys as keys_module
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.keys import KeyRows, routed_keys, stream_keys
from lit_moeedit.models.partial_forward import inference


def run(model, ids: Tensor, grouped: bool, positions: Tensor | None = None) -> tuple[Tensor, dict[int, list[Tensor]]]:
    """Return logits, and by layer the observed keys and gates by expert."""
    layers = list(expert_layers(model).values())
    seen: dict[int, dict[int, list[Tensor]]] = {layer.index: {} for layer in layers}

    def observe(layer: ExpertLayer, rows: KeyRows) -> None:
        assert list(rows.counts) == sorted(rows.counts)
        assert all(rows.counts.values())
        for expert, part in zip(
            rows.counts, torch.cat([rows.key, rows.gate[:, None]], 1).split(list(rows.counts.values())), strict=True
        ):
            seen[layer.index].setdefault(expert, []).append(part)

    with inference(model), stream_keys(layers, lambda: positions, observe, grouped=grouped):
        logits = model(input_ids=ids).logits
    return logits, {i: {j: torch.cat(parts) for j, parts in sorted(own.items())} for i, own in seen.items()}


@pytest.mark.parametrize("positions", [None, torch.tensor([0, 2, 3, 4, 11, 25])], ids=["all", "some"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3"])
def test_all_experts_at_once_see_and_give_what_one_after_the_other_does(
    make_model, input_ids, model_type: str, positions
) -> None:
    model = make_model(model_type)
    one, keys = run(model, input_ids, False, positions)
    other, grouped = run(model, input_ids, True, positions)
    # float32 products of another shape
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    for index, own in keys.items():
        assert grouped[index].keys() == own.keys()
        for expert, rows in own.items():
            torch.testing.assert_close(grouped[index][expert], rows, rtol=1e-4, atol=1e-5)


def test_experts_without_weights_get_nothing(make_model) -> None:
    """Experts of larger indices than there are, as some families mark them."""
    layer = expert_layers(make_model("qwen3_moe"))[0]
    hidden, gates = torch.randn(4, 32), torch.rand(4, 2)
    experts = torch.tensor([[0, 9], [9, 9], [3, 0], [5, 9]])
    pairs = keys_module._pairs(experts, None, layer.num_experts)
    seen: list[KeyRows] = []
    output = keys_module._run_grouped(
        layer, hidden, pairs, gates.reshape(-1), lambda _, rows: seen.append(rows), is_last=False
    )
    assert dict(seen[0].counts) == {0: 2, 3: 1, 5: 1}
    assert not output[1].any()
    expected = torch.zeros(4, 32)
    for expert, token, slot in ((0, 0, 0), (0, 2, 1), (3, 2, 0), (5, 3, 0)):
        key = keys_module._key(layer, expert, hidden[token][None])
        expected[token] += (gates[token, slot] * keys_module._project(layer, "down_proj", expert, key))[0].detach()
    # sums of two float32 numbers
    torch.testing.assert_close(output.detach(), expected, rtol=1e-4, atol=1e-5)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_takes_a_few_operations_however_many_experts_it_has(make_model, monkeypatch) -> None:
    monkeypatch.setattr(keys_module, "can_group", lambda layer: True)
    counts = []
    for experts in (8, 64):
        model = make_model("qwen3_moe", num_experts=experts)
        layer = expert_layers(model)[0]
        chosen = torch.arange(2 * experts).view(-1, 2) % experts
        with Count() as count, torch.no_grad():
            keys = routed_keys(layer, torch.randn(experts, 32), chosen, torch.rand(experts, 2))
        assert len(keys.key) == 2 * experts
        counts.append(sum(count.calls.values()))
    assert counts[0] == counts[1] < 60


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss"])
def test_all_experts_at_once_in_bfloat16(make_model, input_ids, model_type: str) -> None:
    """Some routers return float32 gates."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24}
    model = make_model(model_type, **sizes).to(torch.bfloat16)
    one, keys = run(model, input_ids, False)
    other, grouped = run(model, input_ids, True)
    assert other.dtype == torch.bfloat16
    # rounded to 8 bits in three layers, and now and then a token goes to another expert
    assert float((other - one).float().norm() / one.float().norm()) < 0.1
    for expert, rows in keys[min(keys)].items():
        # sums of numbers as large as the largest, each rounded
        torch.testing.assert_close(grouped[min(keys)][expert], rows, rtol=2e-2, atol=2e-2 * float(rows.abs().max()))
