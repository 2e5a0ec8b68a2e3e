"""Second moments against a plain accumulation in float64, one text at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.models import keys as keys_module
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.keys import KeyRows, routed_keys
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments


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


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_gated_moments_say_how_far_a_change_moves_the_output(make_model, tokenizer, texts, model_type: str) -> None:
    """``tr(ΔW_j C_j ΔW_jᵀ)`` is the mean square, over all tokens, of what changing expert ``j`` does to the output."""
    model = make_model(model_type).eval()
    layer = expert_layers(model)[2]
    moments = second_moments(model, tokenizer, [layer], texts, token_budget=100, gated=True)[2]
    outputs: list[torch.Tensor] = []
    handle = layer.experts.register_forward_hook(lambda module, args, output: outputs.append(output.flatten(0, -2)))

    def run() -> torch.Tensor:
        outputs.clear()
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
        return torch.cat(outputs).double()

    before, weight = run(), layer.down_proj
    for expert in range(layer.num_experts):
        delta = torch.randn(layer.shape[1:], generator=torch.Generator().manual_seed(expert))
        kept = weight[expert].clone()
        weight[expert] += delta.T if layer.is_transposed else delta
        moved = (run() - before).square().sum(-1).mean()
        weight[expert] = kept
        predicted = (delta.double() @ moments.mean(torch.tensor([expert]))[0].double() * delta.double()).sum()
        # differences of outputs in float32
        torch.testing.assert_close(moved, predicted, rtol=1e-3, atol=1e-6)
    handle.remove()


@settings(derandomize=True, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block=st.integers(1, 40), token_budget=st.integers(1, 300))
def test_blocks_of_any_size_give_the_same_sums(monkeypatch, model, tokenizer, texts, block, token_budget) -> None:
    layers = list(expert_layers(model).values())
    whole = second_moments(model, tokenizer, layers, texts)
    with monkeypatch.context() as patch:
        patch.setitem(keys_module.BLOCK, "cpu", block)
        parts = second_moments(model, tokenizer, layers, texts, token_budget)
    for index, moments in whole.items():
        assert_same(parts[index], moments.total, moments.count)


@pytest.mark.parametrize("model_type", ["gpt_oss", "olmoe", "deepseek_v3"])
def test_equals_keys_of_the_configured_forward_in_other_families(make_model, tokenizer, texts, model_type: str) -> None:
    """Biases, transposed layouts, shared experts: the layers above see what the family's own forward gives them."""
    model = make_model(model_type).eval()
    layer = expert_layers(model)[2]
    moments = second_moments(model, tokenizer, [expert_layers(model)[1], layer], texts, token_budget=200)[2]
    total, count = torch.zeros_like(moments.total), torch.zeros_like(moments.count)
    inputs: list[tuple[torch.Tensor, ...]] = []
    handle = layer.experts.register_forward_hook(lambda module, args, output: inputs.append(args))
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
            keys = routed_keys(layer, *inputs.pop())
            for expert, key in zip(keys.expert, keys.key, strict=True):
                total[expert] += torch.outer(key, key)
                count[expert] += 1
    handle.remove()
    assert_same(moments, total, count)


@torch.no_grad()
def test_keys_of_bfloat16_are_summed_in_float32(model, tokenizer, texts) -> None:
    model = model.to(torch.bfloat16)
    layer = expert_layers(model)[0]
    inputs: list[tuple[torch.Tensor, ...]] = []
    handle = layer.experts.register_forward_hook(lambda module, args, output: inputs.append(args))
    # one text many times over, of which all keys are known: bfloat16 would stop counting at 256 times its own size
    text, times = texts[2], 400
    moments = second_moments(model, tokenizer, [layer], [text] * times)[0]
    keys = routed_keys(layer, *inputs[-1])
    handle.remove()
    expected = torch.zeros(6, 20, 20, dtype=torch.float64)
    for expert, key in zip(keys.expert, keys.key.double(), strict=True):
        expected[expert] += torch.outer(key, key)
    tokens = len(tokenizer(text)["input_ids"])
    assert len(keys.token) == 2 * tokens * times
    assert moments.total.dtype == torch.float32
    # float32 sums of some thousand products
    torch.testing.assert_close(moments.total.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_projections_that_nobody_needs_are_not_computed(model, tokenizer, texts) -> None:
    """The highest layer's down-projections, and whatever is above it, may be anything."""
    layers = list(expert_layers(model).values())
    expected = second_moments(model, tokenizer, layers[:2], texts)
    with torch.no_grad():
        layers[1].down_proj.fill_(torch.nan)
        layers[2].experts.gate_up_proj.fill_(torch.nan)
    found = second_moments(model, tokenizer, layers[:2], texts)
    assert torch.equal(found[1].total, expected[1].total)


def test_keys_that_are_not_finite_are_refused(model, tokenizer, texts) -> None:
    layers = list(expert_layers(model).values())
    with torch.no_grad():
        layers[1].experts.gate_up_proj[3, 5, 5] = torch.inf
    with pytest.raises(FloatingPointError, match="keys of layer 1 are not finite"):
        second_moments(model, tokenizer, layers, texts)


def test_sums_may_be_held_elsewhere(model) -> None:
    layer = expert_layers(model)[0]
    assert SecondMoments.zeros(layer).total.device == layer.down_proj.device
    elsewhere = SecondMoments.zeros(layer, "meta")
    elsewhere.add(1, torch.ones(2, 20), torch.ones(2))  # moves a product, not the keys
    assert elsewhere.total.device == elsewhere.count.device == torch.device("meta")


class Elsewhere(torch.Tensor):
    """Numbers on the CPU that say that they are on another device: this is where sums of a model on a GPU would be."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu", 1)  # no tensor of a CPU has a number, and it may be copied there


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_held_elsewhere_are_those_held_with_the_keys(gated: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    here, there = (
        SecondMoments(total, torch.zeros(3, dtype=torch.long), torch.zeros(1, dtype=torch.long), gated)
        for total in (torch.zeros(3, 5, 5), torch.zeros(3, 5, 5).as_subclass(Elsewhere))
    )
    expected = torch.zeros(3, 5, 5, dtype=torch.float64)
    for expert, count in ((1, 4), (0, 7), (1, 9)):
        keys = torch.randn(count, 5, generator=generator).to(dtype)
        gates = torch.rand(count, generator=generator).to(dtype)
        for moments in (here, there):
            assert (moments.total[expert].device == keys.device) is (moments is here)
            moments.add(expert, keys, gates)
        rows = keys.double() * (gates.double()[:, None] if gated else 1)
        expected[expert] += rows.T @ rows
    for moments in (here, there):
        # sums of a dozen products in float32
        torch.testing.assert_close(moments.total.as_subclass(torch.Tensor).double(), expected, rtol=1e-5, atol=1e-6)
        assert moments.count.tolist() == [7, 13, 0]


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
    moments = SecondMoments(torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    keys = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    for expert, rows in ((0, [0, 1]), (2, [2]), (0, [0]), (2, [1, 2])):
        moments.add(expert, keys[rows], torch.ones(len(keys[rows])))
    mean = moments.mean(torch.tensor([0, 1, 2]))
    # expert 0 saw the first key twice and the second once, expert 2 the third twice and the second once
    torch.testing.assert_close(mean[0], torch.tensor([[(1 + 9 + 1) / 3, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(mean[1], torch.zeros(2, 2))
    torch.testing.assert_close(mean[2], torch.tensor([[9 / 3, 0.0], [0.0, (4 + 4) / 3]]))
    assert torch.equal(moments.mean(torch.tensor([2])), mean[2:])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_all_experts_at_once_give_the_same_sums(make_model, tokenizer, texts, model_type: str, gated: bool) -> None:
    model = make_model(model_type)
    layers = [expert_layers(model)[index] for index in (1, 2)]
    one = second_moments(model, tokenizer, layers, texts, 120, gated=gated, grouped=False)
    other = second_moments(model, tokenizer, layers, texts, 120, gated=gated, grouped=True)
    for index, moments in one.items():
        assert torch.equal(other[index].tokens, moments.tokens)
        assert_same(other[index], moments.total, moments.count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [200, 2000])
@pytest.mark.parametrize("alike", [False, True])
def test_sums_of_several_experts_are_within_1e_4_of_float64(
    dtype: torch.dtype, gated: bool, tokens: int, alike: bool
) -> None:
    """Experts of very different sizes, some without tokens; what tensor cores would multiply is rounded here, too."""
    draw = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.3, 0.0, 0.25, 0.2, 0.1, 0.0, 0.1, 0.05])
    counts = (shares * tokens).long().tolist()
    keys = (torch.randn(sum(counts), 48, generator=draw) * 3).to(dtype)
    gates = torch.rand(len(keys), generator=draw)
    if alike:  # as of a first token, whose key is the same in all texts: errors of rounding do not average out
        keys, gates = keys[:1].expand_as(keys).clone(), gates[:1].expand_as(gates).clone()
    moments = SecondMoments(torch.zeros(8, 48, 48), torch.zeros(8, dtype=torch.long), torch.zeros(1), gated)
    for _ in range(2):
        moments.add_all(KeyRows({j: count for j, count in enumerate(counts) if count}, keys, gates))
    assert moments.count.tolist() == [2 * count for count in counts]
    rows = keys.double() * (gates.double()[:, None] if gated else 1.0)
    exact = torch.stack([2 * own.T @ own for own in rows.split(counts)])
    difference = (moments.total.double() - exact).flatten(1).norm(dim=1)
    # float32 sums of up to 1,200 rows
    assert bool((difference <= 1e-5 * exact.flatten(1).norm(dim=1)).all())
    eigenvalues = torch.linalg.eigvalsh(moments.total.double())
    assert float(eigenvalues.min()) >= -1e-6 * float(eigenvalues.max())


def test_a_part_of_the_text_is_drawn_evenly_and_the_same_every_time(model, tokenizer, texts, tmp_path) -> None:
    layer, many = expert_layers(model)[0], texts * 20
    cache = MomentsCache(tmp_path)
    found = [second_moments(model, tokenizer, [layer], many, max_tokens=500, cache=cache)[0] for _ in range(2)]
    assert torch.equal(found[0].total, found[1].total)
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert 500 <= int(found[0].tokens) < 500 + longest
    whole = second_moments(model, tokenizer, [layer], many, cache=cache)[0]
    assert int(whole.tokens) == 20 * sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert torch.equal(second_moments(model, tokenizer, [layer], many, max_tokens=10**6)[0].tokens, whole.tokens)
    # means over a sample of the same text
    one, other = (moments.total / int(moments.tokens) for moments in (found[0], whole))
    assert float((one - other).norm() / other.norm()) < 0.5
