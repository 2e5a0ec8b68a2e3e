"""Second moments against a plain accumulation in float64, one text at a time."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.editing.statistics import SecondMoments, second_moments
from lit_moeedit.models.experts import RoutedKeys, expert_layers


@torch.no_grad()
def accumulated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, layer: int, texts: list[str], max_length: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """``Σ k kᵀ`` in float64 and counts of every expert of a layer of a qwen3_moe, from the inputs of its experts."""
    experts = expert_layers(model)[layer].experts
    total = torch.zeros(6, 20, 20, dtype=torch.float64)
    count = torch.zeros(6, dtype=torch.long)
    inputs = {}
    handle = experts.register_forward_hook(lambda module, args, output: inputs.update(args=args))
    model.eval()
    for text in texts:
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"][:max_length]]))
        hidden, chosen, _ = inputs["args"]
        for token, row in zip(hidden.double(), chosen.tolist(), strict=True):
            for expert in row:
                gate, up = (experts.gate_up_proj[expert].double() @ token).chunk(2)
                key = F.silu(gate) * up
                total[expert] += torch.outer(key, key)
                count[expert] += 1
    handle.remove()
    model.train()
    return total, count


def assert_same(moments: SecondMoments, total: torch.Tensor, count: torch.Tensor) -> None:
    assert torch.equal(moments.count, count)
    # keys of float32 behind some layers, summed in float32
    torch.testing.assert_close(moments.total.double(), total.double(), rtol=1e-3, atol=1e-4 * float(total.abs().max()))


@pytest.mark.parametrize("token_budget", [1, 64, 8192])
def test_equals_plain_accumulation(
    model: PreTrainedModel, tokenizer, texts: list[str], unchanged, token_budget: int
) -> None:
    layers = expert_layers(model)
    unchanged(model)
    moments = second_moments(model, tokenizer, [layers[2], layers[0]], texts, token_budget)
    assert set(moments) == {0, 2}
    tokens = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    for index, layer in moments.items():
        assert int(layer.count.sum()) == 2 * tokens  # every token once for each of its two experts, no padding
        assert_same(layer, *accumulated(model, tokenizer, index, texts))


def test_order_of_texts_does_not_matter(model: PreTrainedModel, tokenizer, texts: list[str]) -> None:
    layers = list(expert_layers(model).values())
    one = second_moments(model, tokenizer, layers, texts, 64)
    two = second_moments(model, tokenizer, layers, texts[::-1], 64)
    for index, moments in one.items():
        assert_same(two[index], moments.total, moments.count)


def test_long_texts_are_cut(model: PreTrainedModel, tokenizer, texts: list[str]) -> None:
    moments = second_moments(model, tokenizer, [expert_layers(model)[1]], texts, max_length=10)
    assert_same(moments[1], *accumulated(model, tokenizer, 1, texts, max_length=10))


def test_progress_ends_with_all_texts(model: PreTrainedModel, tokenizer, texts: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    second_moments(model, tokenizer, [expert_layers(model)[0]], texts, 64, progress=lambda *at: seen.append(at))
    done = [at for at, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (len(texts), len(texts))
    assert len(seen) > 1


def test_batches_stay_in_the_budget(model: PreTrainedModel, tokenizer, texts: list[str]) -> None:
    sizes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: sizes.append(args[0].numel()))
    second_moments(model, tokenizer, [expert_layers(model)[0]], texts, token_budget=80)
    assert max(sizes) <= 80
    assert len(sizes) < len(texts)


def test_no_text_is_refused(model: PreTrainedModel, tokenizer) -> None:
    with pytest.raises(ValueError, match="there is no preservation text"):
        second_moments(model, tokenizer, [expert_layers(model)[0]], [])


def test_mean_divides_by_the_tokens_of_each_expert() -> None:
    moments = SecondMoments(torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.long))
    keys = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    index = torch.tensor([0, 1, 2])
    moments.add(RoutedKeys(index, torch.tensor([0, 0, 2]), torch.ones(3), keys))
    moments.add(RoutedKeys(index, torch.tensor([0, 2, 2]), torch.ones(3), keys))
    mean = moments.mean(torch.tensor([0, 1, 2]))
    # expert 0 saw the first key twice and the second once, expert 2 the third twice and the second once
    torch.testing.assert_close(mean[0], torch.tensor([[(1 + 9 + 1) / 3, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(mean[1], torch.zeros(2, 2))
    torch.testing.assert_close(mean[2], torch.tensor([[9 / 3, 0.0], [0.0, (4 + 4) / 3]]))
    assert torch.equal(moments.mean(torch.tensor([2])), mean[2:])
