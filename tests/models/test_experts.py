"""Tests of observing experts against direct computation, of refused models, and of restoring the model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lit_moeedit.models import keys as keys_module
from lit_moeedit.models.experts import (
    ExpertLayer,
    UnsupportedModelError,
    check_editable,
    expert_layers,
    find_model,
)
from lit_moeedit.models.keys import KeyRows, RoutedKeys, Routing, routed_keys, stream_keys, watch_keys, watch_routing

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3"]
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # the same sums of some dozens of float32 products, in another order


def family(make_model: Callable[..., PreTrainedModel], model_type: str) -> PreTrainedModel:
    """Make a model whose experts run in the eager forward of its family."""
    model = make_model(model_type).eval()
    model.config._experts_implementation = "eager"
    return model


def seen_by_hooks(model: PreTrainedModel, input_ids: Tensor) -> dict[int, SimpleNamespace]:
    """Record inputs and output of every experts module in a forward without other observers."""
    seen: dict[int, SimpleNamespace] = {}
    handles = []
    for index, layer in expert_layers(model).items():

        def hook(module: nn.Module, args: Any, output: Tensor, index: int = index) -> None:
            seen[index] = SimpleNamespace(hidden=args[0], experts=args[1], gates=args[2], output=output)

        handles.append(layer.experts.register_forward_hook(hook))
    with torch.no_grad():
        model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    return seen


def watched_keys(model: PreTrainedModel, input_ids: Tensor, positions: Tensor | None = None) -> dict[int, RoutedKeys]:
    seen: dict[int, RoutedKeys] = {}
    layers = list(expert_layers(model).values())
    with watch_keys(layers, lambda: positions, lambda layer, keys: seen.update({layer.index: keys})):
        model(input_ids=input_ids)
    return seen


def key_by_hand(model_type: str, experts: nn.Module, expert: int, hidden: Tensor) -> Tensor:
    """Compute the activation of one expert before its down-projection for one token, by the formula of the family."""
    weight = experts.gate_up_proj[expert]
    if model_type == "gpt_oss":  # stored transposed, gate and up interleaved, both clamped
        both = weight.T @ hidden + experts.gate_up_proj_bias[expert]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    half = len(weight) // 2
    return F.silu(weight[:half] @ hidden) * (weight[half:] @ hidden)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_keys_and_gates_equal_those_computed_by_hand(make_model, input_ids: Tensor, model_type: str) -> None:
    model = family(make_model, model_type)
    seen, watched = seen_by_hooks(model, input_ids), watched_keys(model, input_ids)
    assert list(watched) == list(expert_layers(model))
    for index, keys in watched.items():
        experts, inputs = expert_layers(model)[index].experts, seen[index]
        assert len(keys.token) == inputs.experts.numel()
        assert keys.expert.tolist() == sorted(keys.expert.tolist())
        assert len({(int(t), int(j)) for t, j in zip(keys.token, keys.expert, strict=True)}) == len(keys.token)
        for token, expert, gate, key in zip(keys.token, keys.expert, keys.gate, keys.key, strict=True):
            slot = (inputs.experts[token] == expert).nonzero().item()
            assert gate == inputs.gates[token, slot]
            torch.testing.assert_close(
                key, key_by_hand(model_type, experts, int(expert), inputs.hidden[token]), **FLOAT32
            )


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_keys_gates_and_down_projections_make_the_output(make_model, input_ids: Tensor, model_type: str) -> None:
    model = family(make_model, model_type)
    seen, watched = seen_by_hooks(model, input_ids), watched_keys(model, input_ids)
    for index, keys in watched.items():
        layer = expert_layers(model)[index]
        assert layer.shape == (layer.num_experts, 32, keys.key.shape[1])
        output = torch.zeros_like(seen[index].output)
        for token, expert, gate, key in zip(keys.token, keys.expert, keys.gate, keys.key, strict=True):
            weight = layer.down_proj[expert]
            value = (weight.T if layer.is_transposed else weight) @ key
            if layer.experts.has_bias:
                value = value + layer.experts.down_proj_bias[expert]
            output[token] += gate * value
        # relative to the largest output: single entries cancel
        torch.testing.assert_close(output, seen[index].output, rtol=0, atol=1e-5 * float(output.abs().max()))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_keys_do_not_depend_on_the_implementation(make_model, input_ids, model_type, implementation: str) -> None:
    model = family(make_model, model_type)
    eager = watched_keys(model, input_ids)
    plain = model(input_ids=input_ids).logits
    model.config._experts_implementation = implementation
    other = watched_keys(model, input_ids)
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(model(input_ids=input_ids).logits, plain, rtol=1e-4, atol=1e-4)  # through three layers
    for index, keys in eager.items():
        assert torch.equal(keys.token, other[index].token)
        assert torch.equal(keys.expert, other[index].expert)
        # keys of the second layer on stand behind the first's output, which is summed in another order
        torch.testing.assert_close(other[index].gate, keys.gate, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other[index].key, keys.key, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_watching_does_not_change_the_forward(model: PreTrainedModel, input_ids: Tensor, implementation: str) -> None:
    model.eval()
    model.config._experts_implementation = implementation
    plain = model(input_ids=input_ids).logits
    layers = list(expert_layers(model).values())
    with watch_keys(layers, lambda: None, lambda *_: None):
        assert torch.equal(model(input_ids=input_ids).logits, plain)


@torch.no_grad()
def test_only_selected_tokens_are_observed(model: PreTrainedModel, input_ids: Tensor) -> None:
    model.eval()
    everything, chosen = watched_keys(model, input_ids), torch.tensor([4, 11, 25])
    for index, keys in watched_keys(model, input_ids, chosen).items():
        kept = torch.isin(everything[index].token, chosen)
        assert kept.sum() == 2 * 3
        assert torch.equal(keys.token, everything[index].token[kept])
        assert torch.equal(keys.expert, everything[index].expert[kept])
        # matrix products of fewer rows may be summed in another order
        torch.testing.assert_close(keys.key, everything[index].key[kept], **FLOAT32)
    nothing = watched_keys(model, input_ids, torch.empty(0, dtype=torch.long))
    assert all(keys.key.shape == (0, 20) for keys in nothing.values())


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_streamed_keys_are_those_that_are_watched(make_model, input_ids: Tensor, model_type: str) -> None:
    model = family(make_model, model_type)
    plain, watched = model(input_ids=input_ids).logits, watched_keys(model, input_ids)
    parts: dict[tuple[int, int], list[Tensor]] = {}
    factors: dict[tuple[int, int], list[Tensor]] = {}

    def observe(layer: ExpertLayer, rows: KeyRows) -> None:
        (expert,) = rows.counts  # on a CPU, one at a time
        parts.setdefault((layer.index, expert), []).append(rows.key)
        factors.setdefault((layer.index, expert), []).append(rows.gate)

    with stream_keys(list(expert_layers(model).values()), lambda: None, observe):
        logits = model(input_ids=input_ids).logits
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)  # through three layers
    for index, keys in watched.items():
        for expert in range(expert_layers(model)[index].num_experts):
            rows = keys.key[keys.expert == expert]
            found = torch.cat(parts.pop((index, expert), [rows[:0]]))
            torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-4)
            gates = keys.gate[keys.expert == expert]
            found = torch.cat(factors.pop((index, expert), [gates[:0]]))
            torch.testing.assert_close(found, gates, rtol=1e-4, atol=1e-4)
    assert not parts


@torch.no_grad()
def test_streaming_leaves_out_what_is_not_wanted(model: PreTrainedModel, input_ids: Tensor, monkeypatch) -> None:
    model.eval()
    monkeypatch.setitem(keys_module.BLOCK, "cpu", 2)
    layers, sizes, chosen = list(expert_layers(model).values()), [], torch.tensor([0, 1, 9, 10])
    outputs: list[Tensor] = []
    handles = [layer.experts.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in layers]
    model(input_ids=input_ids)
    with stream_keys(layers[::2], lambda: chosen, lambda _, rows: sizes.append(len(rows.key)), last=layers[2]):
        model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    assert max(sizes) == 2
    assert sum(sizes) == 2 * 2 * len(chosen)
    plain, streamed = outputs[:3], outputs[3:]
    torch.testing.assert_close(streamed[0][chosen], plain[0][chosen], **FLOAT32)
    others = torch.ones(27, dtype=torch.bool).index_fill(0, chosen, False)
    assert not streamed[0][others].any()
    assert streamed[1][others].any()  # not watched
    assert streamed[2].shape == plain[2].shape
    assert not streamed[2].any()


@torch.no_grad()
def test_only_given_layers_are_observed(model: PreTrainedModel, input_ids: Tensor) -> None:
    seen: list[int] = []
    layer = expert_layers(model)[1]
    with watch_routing([layer], lambda layer, _: seen.append(layer.index)):
        model(input_ids=input_ids)
        model(input_ids=input_ids)
    model(input_ids=input_ids)
    assert seen == [1, 1]


def test_experts_of_other_ranks_are_left_out(model: PreTrainedModel) -> None:
    """Expert parallelism marks experts of other ranks by the index after the last."""
    layer = expert_layers(model)[0]
    keys = routed_keys(layer, torch.ones(2, 32), torch.tensor([[6, 1], [0, 6]]), torch.ones(2, 2))
    assert keys.expert.tolist() == [0, 1]
    assert keys.token.tolist() == [1, 0]


class TestInterface:
    """The experts interface of transformers is as before once the context is closed."""

    def state(self, model: PreTrainedModel) -> tuple[str, set[str]]:
        return model.config._experts_implementation, set(ALL_EXPERTS_FUNCTIONS.keys())

    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
    def test_is_restored(self, model: PreTrainedModel, input_ids: Tensor, implementation: str) -> None:
        model.config._experts_implementation = implementation
        before = self.state(model)
        layers = list(expert_layers(model).values())
        with watch_keys(layers, lambda: None, lambda *_: None):
            assert self.state(model) != before
        assert self.state(model) == before
        with pytest.raises(ZeroDivisionError), watch_routing(layers, lambda *_: None):
            raise ZeroDivisionError
        assert self.state(model) == before

    def test_is_restored_if_the_observer_or_selection_raises(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        before, layers = self.state(model), list(expert_layers(model).values())

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), watch_keys(layers, lambda: None, fail):
            model(input_ids=input_ids)
        with pytest.raises(ZeroDivisionError), watch_keys(layers, fail, lambda *_: None):
            model(input_ids=input_ids)
        with pytest.raises(ZeroDivisionError), stream_keys(layers, lambda: None, fail):
            model(input_ids=input_ids)
        assert self.state(model) == before
        model(input_ids=input_ids)

    @torch.no_grad()
    def test_contexts_nest(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        model.eval()
        before, layers = self.state(model), list(expert_layers(model).values())
        plain = model(input_ids=input_ids).logits
        alone = watched_keys(model, input_ids)
        keys: dict[int, RoutedKeys] = {}
        routing: dict[int, Routing] = {}

        def observe_keys(layer: ExpertLayer, seen: RoutedKeys) -> None:
            keys[layer.index] = seen

        def observe_routing(layer: ExpertLayer, seen: Routing) -> None:
            routing[layer.index] = seen

        with watch_keys(layers, lambda: None, observe_keys):
            with watch_routing(layers[1:], observe_routing):
                assert torch.equal(model(input_ids=input_ids).logits, plain)
            routing_then = dict(routing)
            model(input_ids=input_ids)  # only the outer one is still open
        assert self.state(model) == before
        assert list(keys) == [0, 1, 2]
        assert list(routing) == [1, 2]
        for index, seen in keys.items():
            assert torch.equal(seen.key, alone[index].key)
        for index, seen in routing.items():
            assert seen is routing_then[index]
            assert seen.experts.shape == seen.gates.shape == (27, 2)
            assert torch.equal(seen.experts.flatten().sort().values, keys[index].expert)

    @torch.no_grad()
    def test_one_observer_twice(self, model: PreTrainedModel, input_ids: Tensor) -> None:
        seen: list[int] = []
        layers = list(expert_layers(model).values())
        with watch_routing(layers, lambda layer, _: seen.append(layer.index)):  # noqa: SIM117
            with watch_routing(layers, lambda layer, _: seen.append(10 + layer.index)):
                model(input_ids=input_ids)
        assert seen == [10, 0, 11, 1, 12, 2]


class TestRefusals:
    def test_dense_model(self, make_model) -> None:
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has no layer with routed experts"):
            check_editable(make_model("llama"), [0])

    @pytest.mark.parametrize("changes", [{"mlp_only_layers": [0, 2]}, {"decoder_sparse_step": 2}])
    def test_layer_without_experts(self, make_model, changes: dict[str, Any]) -> None:
        model = make_model("qwen3_moe", **changes)
        assert list(expert_layers(model)) == [1]
        assert [layer.index for layer in check_editable(model, [1])] == [1]
        with pytest.raises(
            UnsupportedModelError, match=r"layer 2 of .* has no routed experts; layers with experts: 1$"
        ):
            check_editable(model, [1, 2])

    def test_no_layer_given(self, model: PreTrainedModel) -> None:
        with pytest.raises(
            UnsupportedModelError, match=r"no layer to edit was given; .* has experts in layers 0, 1, 2"
        ):
            check_editable(model, [])

    def test_layer_that_does_not_exist(self, model: PreTrainedModel) -> None:
        with pytest.raises(UnsupportedModelError, match="layer 3 of Qwen3MoeForCausalLM has no routed experts"):
            check_editable(model, [3])

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_quantised_layer(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        experts = expert_layers(model)[1].experts
        experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)
        with pytest.raises(UnsupportedModelError, match=rf"layer 1 of .* are quantised \({dtype}\)"):
            check_editable(model, [1])

    def test_norm_behind_each_expert(self, model: PreTrainedModel) -> None:
        expert_layers(model)[1].experts.has_post_expert_norm = True
        with pytest.raises(UnsupportedModelError, match=r"normalises the output of each expert \(layer 1\)"):
            check_editable(model, [1])

    def test_weights_that_are_no_stack(self, model: PreTrainedModel) -> None:
        experts = expert_layers(model)[0].experts
        experts.down_proj = nn.Parameter(experts.down_proj.detach().flatten(1))
        with pytest.raises(UnsupportedModelError, match=r"must be \[E, d_model, d_hidden\], got \[6, 640\]"):
            check_editable(model, [0])


def test_layers_are_sorted_and_unique(model: PreTrainedModel) -> None:
    layers = check_editable(model, [2, 0, 2])
    assert [layer.index for layer in layers] == [0, 2]
    assert all(layer.layer is model.model.layers[layer.index] for layer in layers)
    assert model.get_submodule(layers[1].name) is layers[1].experts


class TestFindModel:
    def test_itself(self, model: PreTrainedModel) -> None:
        assert find_model(model) is model

    def test_the_outermost_below_a_module(self, model: PreTrainedModel) -> None:
        assert find_model(nn.ModuleDict({"wrapped": nn.Sequential(model), "head": nn.Linear(2, 2)})) is model

    def test_none(self) -> None:
        with pytest.raises(UnsupportedModelError, match=r"one transformers model in Linear, found 0 \(none\)"):
            find_model(nn.Linear(2, 2))

    def test_two(self, make_model) -> None:
        both = nn.ModuleList([make_model("qwen3_moe"), make_model("mixtral")])
        with pytest.raises(UnsupportedModelError, match=r"found 2 \(Qwen3MoeForCausalLM, MixtralForCausalLM\)"):
            find_model(both)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts", "base_model.model.model.layers.1.mlp.experts.base_layer.base_layer"]
)
def test_the_name_of_a_weight_is_that_of_the_model_without_adapters(name: str) -> None:
    layer = ExpertLayer(1, torch.nn.Module(), torch.nn.Module(), name)
    assert layer.weight_name == "model.layers.1.mlp.experts.down_proj"
