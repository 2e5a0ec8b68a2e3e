"""Models with adapters of peft, and quantised ones: what is seen of them, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from lit_moeedit.editing import Editor, FineTuning
from lit_moeedit.models.adapted import refuse_adapters
from lit_moeedit.models.experts import UnsupportedModelError, check_editable, expert_layers, find_model
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.solvers import Tucker
from tests.editing.recording import QUICK

peft = pytest.importorskip("peft", reason="needs peft")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(model: PreTrainedModel, **settings: Any) -> Any:
    """A model with adapters that are not zero."""
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": [], **settings}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "mixtral"])
def with_experts(request: pytest.FixtureRequest, make_model: Callable[..., PreTrainedModel]) -> Any:
    model = make_model(request.param)
    model.config._experts_implementation = "eager"
    return adapted(model, target_parameters=EXPERTS)


def watched_keys(model: PreTrainedModel, input_ids: Tensor) -> dict[int, RoutedKeys]:
    seen: dict[int, RoutedKeys] = {}
    layers = list(expert_layers(model).values())
    with watch_keys(layers, lambda: None, lambda layer, keys: seen.update({layer.index: keys})):
        model.eval()(input_ids=input_ids)
    return seen


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_layers_and_keys_are_those_of_the_adapted_weights(with_experts: Any, input_ids: Tensor) -> None:
    model = find_model(nn.ModuleDict({"inner": with_experts}))
    layers = check_editable(model, [1, 2])
    assert [layer.name.endswith("experts.base_layer.base_layer") for layer in layers] == [True, True]
    merged = copy.deepcopy(with_experts).merge_and_unload()
    found = [watched_keys(one, input_ids) for one in (model, merged)]
    for index, keys in found[0].items():
        # the weights are summed in another order
        torch.testing.assert_close(keys.key, found[1][index].key, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(keys.gate, found[1][index].gate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["default", "tucker", "fine-tuning"])
def test_an_edit_changes_the_base_and_acts_through_the_adapter(
    method: str, with_experts: Any, tokenizer: Any, facts: Any, texts: Any, input_ids: Tensor
) -> None:
    editor = {
        "default": lambda: Editor([0, 1], targets=QUICK),
        "tucker": lambda: Editor([0, 1], Tucker(), targets=QUICK),
        "fine-tuning": lambda: FineTuning([0, 1], steps=2, learning_rate=0.1),
    }[method]()
    model, before = find_model(with_experts), copy.deepcopy(with_experts)
    result = editor.edit(model, tokenizer, facts, texts)
    now, old = (dict(module.named_parameters()) for module in (with_experts, before))
    assert now.keys() == old.keys()
    changed = {name for name, weight in now.items() if not torch.equal(weight, old[name])}
    assert changed == {f"base_model.model.{layer.name}.down_proj" for layer in check_editable(model, [0, 1])}
    # with the same adapter: a delta added to the weights that the forward sees is the same
    for index, deltas in result.deltas.items():
        layer = expert_layers(find_model(before))[index]
        dense = torch.stack([deltas.dense(j) for j in range(deltas.num_experts)])
        with torch.no_grad():
            layer.down_proj.add_(dense.mT if layer.is_transposed else dense)
    with torch.no_grad():
        one, two = (module.eval()(input_ids=input_ids).logits for module in (with_experts, before))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"target_parameters": EXPERTS}, {"target_modules": ["q_proj"]}])
def test_merged_adapters(settings: Any, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any) -> None:
    module = adapted(model, **settings)
    module.merge_adapter()
    weights = copy.deepcopy(module.state_dict())
    with pytest.raises(UnsupportedModelError, match=r"adapters are merged into .*layers.0.*unmerge_adapter\(\)"):
        Editor([1], targets=QUICK).edit(model, tokenizer, facts, texts)
    assert all(torch.equal(weight, weights[name]) for name, weight in module.state_dict().items())
    module.unmerge_adapter()
    check_editable(model, [1])
    check_editable(module.merge_and_unload(), [1])


def test_experts_under_zero_3(model: PreTrainedModel) -> None:
    module = adapted(model, target_parameters=EXPERTS, target_modules=["q_proj"])
    refuse_adapters(module)
    for layer in expert_layers(model).values():
        layer.down_proj.ds_id = layer.index  # type: ignore[attr-defined]
    message = r"LoRA on experts does not train under ZeRO stage 3 .*layers.0.mlp.experts adapts .*'down_proj'; use ZeRO"
    with pytest.raises(UnsupportedModelError, match=message):
        check_editable(model, [1])


# -- quantised experts ------------------------------------------------------------------------------------------------


def quantised(model: PreTrainedModel, layers: range) -> PreTrainedModel:
    """Put the modules in that transformers loads such checkpoints into."""
    for index in layers:
        mlp = model.model.layers[index].mlp
        is_gpt_oss = model.config.model_type == "gpt_oss"
        kind = Mxfp4GptOssExperts if is_gpt_oss else FP8Experts
        mlp.experts = kind(model.config, **({} if is_gpt_oss else {"block_size": (4, 4)}))
    return model


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt_oss", r"layer 0 of GptOssForCausalLM are quantised \(MXFP4\).*Mxfp4Config\(dequantize=True\)"),
        ("qwen3_moe", r"layer 0 of Qwen3Moe.* are quantised \(FP8\).*FineGrainedFP8Config\(dequantize=True\)"),
    ],
)
def test_quantised_experts(family: str, message: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = quantised(make_model(family), range(3))
    for call in (lambda: expert_layers(model), lambda: check_editable(model, [1])):
        with pytest.raises(UnsupportedModelError, match=message):
            call()


def test_a_layer_that_is_quantised_among_others(make_model: Callable[..., PreTrainedModel]) -> None:
    model = quantised(make_model("qwen3_moe"), range(2, 3))
    assert [layer.index for layer in check_editable(model, [0, 1])] == [0, 1]
    with pytest.raises(UnsupportedModelError, match=r"experts of layer 2 .* quantised"):
        check_editable(model, [1, 2])
