"""The Mixture-of-Experts families of the installed transformers, found in what it declares, and a small model of each.

Nothing here is needed to edit a model: :mod:`lit_moeedit.models.experts` reads what it needs off the model itself. This
is for those who ask which models that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_moeedit.models.experts import PER_TOKEN

NOT_MADE = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError)
"""What configs and models of families raise that want to be made otherwise, or something to be installed."""


@dataclass(frozen=True)
class Family:
    """Causal language models with routed experts that share their code.

    Attributes:
        model_type: of their config; of the text config where that is a part of another.
        is_declared: whether the experts are a module that declares the experts interface of transformers.
    """

    model_type: str
    is_declared: bool


def families() -> list[Family]:
    """All families of causal language models in the installed transformers that have experts, by name."""
    found: dict[str, Family] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        source = "\n".join(_sources(model_type))
        is_declared = "@use_experts_implementation" in source
        if is_declared:
            model_type = _text_type(model_type)
        if is_declared or re.search(r"^class \w*(Expert|MoE|Moe)\w*\(nn\.Module\)", source, re.MULTILINE):
            found[model_type] = Family(model_type, is_declared)
    return [found[name] for name in sorted(found)]


def _text_type(model_type: str) -> str:
    """The type of a family's text config; its own, if none can be made without arguments."""
    try:
        return CONFIG_MAPPING[model_type]().get_text_config().model_type
    except NOT_MADE:
        return model_type


def _sources(model_type: str) -> Iterator[str]:
    folder = Path(models.__path__[0]) / model_type_to_module_name(model_type)
    for path in sorted(folder.glob("modeling_*.py")):
        yield path.read_text(encoding="utf-8")


_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    # experts under the names that families have for them
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(PER_TOKEN, 3),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    "router_hidden_size": 8,
    # dense layers below sparse ones, in all ways to say so
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace", "moe_layer_start_index"), 1),
    "moe_layer_end_index": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # factors that are 1 by default
    **dict.fromkeys(
        ("routed_scaling_factor", "router_scaling_factor", "route_scale", "moe_routed_scaling_factor"), 1.7
    ),
    "residual_multiplier": 0.3,
    "mlp_beta_factor": 0.7,
    # attention, convolutions and state spaces
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    "qk_nope_head_dim": 4,
    "index_n_heads": 2,
    "index_topk": 16,
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    "layer_group_size": 2,
    **dict.fromkeys(("mamba_d_state", "mamba_dt_rank", "ssm_state_size", "mamba_n_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_chunk_size", "mamba_head_dim", "chunk_size", "block_size"), 8),
    "mamba_num_heads": 2,
    "use_mamba_kernels": False,
    "n_groups": 1,
}
"""What makes any config small; a family takes the keys that it knows."""

_HYBRID = ["linear_attention", "full_attention", "linear_attention"]
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"layer_types": ["sliding_attention"] * 3, "mlp_layer_types": ["moe"] * 3},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "per_layer_config": None,
    },
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "granitemoehybrid": {"layer_types": _HYBRID, "shared_intermediate_size": 24},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    # layers with a window have twice as many key and value heads
    "mimo_v2_flash": {"num_attention_heads": 4},
    "minimax": {"layer_types": _HYBRID},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    # one expert for each token is all that the family allows
    "zaya": {"num_experts_per_tok": 1},
}
"""What some families need besides; most are asked for layers of each of their kinds."""


def small_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A config of a family that makes a model of a few thousand parameters, with all kinds of its layers.

    Args:
        model_type: of the family.
        changes: keys of the config that shall be otherwise.

    Raises:
        ValueError: if the family's config refuses the keys.

    Example:
        >>> small_config("qwen3_moe").num_experts
        8
    """
    kind = type(CONFIG_MAPPING[model_type]().get_text_config())
    other_names = getattr(kind, "attribute_map", {})
    known = {*kind().to_dict(), *other_names}
    keys = {key: value for key, value in _SMALL.items() if key in known and other_names.get(key) not in _SMALL}
    return kind(**{**keys, **_OWN.get(kind.model_type, {}), **changes})


def small_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of :func:`small_config` with random weights, large enough that every part of it matters.

    Args:
        model_type: of the family.
        dtype: of the weights.
        seed: of the weights.
        changes: keys of the config that shall be otherwise.
    """
    model = AutoModelForCausalLM.from_config(small_config(model_type, **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        mean, deviation = (1.0 if re.search("norm|scale", name) else 0.0), (0.3 if parameter.ndim >= 2 else 0.1)
        nn.init.normal_(parameter, mean, deviation, generator)
    return model
