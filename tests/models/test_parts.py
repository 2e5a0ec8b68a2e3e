"""The parts of a model: each weight in exactly one, in every family, found by structure."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lit_moeedit.models.experts import UnsupportedModelError, expert_layers
from lit_moeedit.models.parts import EDITED_LAYERS, KEY_MAKERS, find_kinds, find_parts, stored_tensors
from lit_moeedit.planning.family_catalog import moe_families, small_config
from tests.large_models import REAL

SOME = ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3", "qwen3_5_moe_text"]
MIXERS = re.compile(r"\.\d+\.(self_attn|linear_attn|mamba|conv|\w*_sconv|\w*_convolution)\.")
NORMS = re.compile(r"\.\d+\.(\w+\.)?\w*norm(_?\w*)\.")


def empty(model_type: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(model_type))
    return model


def check(model: PreTrainedModel, layers: list[int]) -> dict[str, tuple[str, ...]]:
    parts = {part.name: part.weights for part in find_parts(model, layers)}
    disjoint = [name for part, weights in parts.items() if part not in (KEY_MAKERS, EDITED_LAYERS) for name in weights]
    assert sorted(disjoint) == sorted(stored_tensors(model))
    assert set(dict(model.named_parameters())) <= set(disjoint) <= set(model.state_dict())
    known = expert_layers(model)
    experts = {index: f"{known[index].name}." for index in layers}
    inside = {name for name in disjoint for start in experts.values() if name.startswith(start)}
    assert set(parts["down-projections"]) == {name for name in inside if "down_proj" in name}
    assert set(parts["gate/up-projections"]) == {name for name in inside if "down_proj" not in name}
    of_layers = {name for name in disjoint if any(f"s.{index}." in name for index in layers)}
    assert set(parts[EDITED_LAYERS]) == of_layers
    mixers = {name for name in of_layers if MIXERS.search(name)}
    assert set(parts.get("attention", ())) == mixers
    routers = {name for name in of_layers if re.search(r"router|\.gate\.|expert_bias|correction_bias", name)}
    assert set(parts["routers"]) == routers - mixers
    assert set(parts.get("shared experts", ())) == {
        name
        for name in of_layers - inside - mixers - routers
        if re.search(r"shared|\.\d+\.mlp\.(gate|up|down)_proj\.", name)
    }
    assert set(parts["norms and scales"]) >= {name for name in of_layers - mixers - routers if NORMS.search(name)}
    below = {
        name
        for name in disjoint
        if (number := re.search(r"layers\.(\d+)\.", name)) and int(number[1]) < max(layers) and name not in of_layers
    }
    assert set(parts.get("other layers below", ())) == below
    makers = of_layers - set(parts["down-projections"]) | below | set(parts["embeddings"])
    assert set(parts[KEY_MAKERS]) == makers
    assert not any("embed" in name and "norm" not in name for name in parts["above and head"])
    return parts


@pytest.mark.parametrize("model_type", SOME)
def test_every_weight_is_in_one_part(model_type: str) -> None:
    model = empty(model_type)
    found = list(expert_layers(model))
    check(model, found[:1])
    check(model, found[-2:])


@pytest.mark.families
@pytest.mark.slow
@pytest.mark.parametrize("model_type", [family.model_type for family in moe_families() if family.is_declared])
def test_every_family(model_type: str) -> None:
    model = empty(model_type)
    found = list(expert_layers(model))
    check(model, found[:1])
    check(model, found[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_published_models(name: str) -> None:
    keys, _ = REAL[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    check(model, [3, 4, 5])


def test_the_parts_of_a_layer() -> None:
    model = empty("deepseek_v3")  # its first layer is dense
    assert "other layers below" not in {part.name for part in find_parts(model, [1]) if "layers.1." in part.weights[0]}
    kinds = find_kinds(model, [1, 2])
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "other layers below"
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == "routers"
    assert kinds["model.layers.1.mlp.shared_experts.down_proj.weight"] == "shared experts"
    assert kinds["model.layers.2.self_attn.kv_a_layernorm.weight"] == "attention"
    assert kinds["model.embed_tokens.weight"] == "embeddings"
    assert kinds["model.norm.weight"] == kinds["lm_head.weight"] == "above and head"


def test_tied_weights_count_as_embeddings() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config("qwen3_moe", tie_word_embeddings=True))
    kinds = find_kinds(model, [0])
    assert kinds["model.embed_tokens.weight"] == "embeddings" and "lm_head.weight" not in kinds
    check(model, [0])


def test_adapters_belong_to_what_they_adapt() -> None:
    peft = pytest.importorskip("peft", reason="needs peft (the extra 'lora')")
    config = peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], r=2
    )
    model = peft.get_peft_model(empty("qwen3_moe"), config).get_base_model()
    kinds = find_kinds(model, [1])
    names = [name for name in kinds if name.startswith("model.layers.1.mlp.experts.")]
    down = [name for name in names if kinds[name] == "down-projections"]
    up = [name for name in names if kinds[name] == "gate/up-projections"]
    assert len(names) == 6 and len(down) == len(up) == 3  # the weight, and two factors
    assert kinds["model.layers.1.self_attn.q_proj.lora_A.default.weight"] == "attention"
    for name in (*down, *up):
        path = name.rpartition(".lora_")[0]
        if path:
            wrapper = model.get_submodule(path)
            assert (wrapper.parameter_name == "down_proj") is (name in down)


def test_layers_without_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected layers with routed experts \(1, 2\) .* got \[0\]"):
        find_parts(empty("deepseek_v3"), [0, 1])
    with pytest.raises(UnsupportedModelError, match="got none"):
        find_parts(empty("deepseek_v3"), [])
