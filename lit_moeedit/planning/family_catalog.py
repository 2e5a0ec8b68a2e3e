"""The Mixture-of-Experts families that the installed transformers declares, and a small model of each.

An edit needs none of this: :mod:`lit_moeedit.models.experts` reads what it needs off the model itself. The command
``families`` and the tests of all families do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lit_moeedit.models.experts import EXPERTS_PER_TOKEN_KEYS

NOT_MADE = (ValueError, TypeError, AttributeError, LookupError, RuntimeError, ImportError)
"""Errors of configs and models that need other settings, or a package that is not installed."""


@dataclass(frozen=True)
class Family:
    """Causal language models with routed experts that share their code.

    Attributes:
        model_type: model type of their config, or of its text config.
        is_declared: whether the experts are a module that declares transformers' experts interface.
    """

    model_type: str
    is_declared: bool


def moe_families() -> list[Family]:
    """List the families of causal language models with experts in the installed transformers, by name."""
    found: dict[str, Family] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = Path(models.__path__[0]) / model_type_to_module_name(model_type)
        source = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("modeling_*.py")))
        is_declared = "@use_experts_implementation" in source
        if is_declared:
            model_type = _text_type(model_type)
        if is_declared or re.search(r"^class \w*(Expert|MoE|Moe)\w*\(nn\.Module\)", source, re.MULTILINE):
            found[model_type] = Family(model_type, is_declared)
    return [found[name] for name in sorted(found)]


def _text_type(model_type: str) -> str:
    """Return the type of a family's text config, or its own if no config can be made without arguments."""
    try:
        return CONFIG_MAPPING[model_type]().get_text_config().model_type
    except NOT_MADE:
        return model_type


_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "model_max_length"), 64),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    # experts, under the names that families use
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(EXPERTS_PER_TOKEN_KEYS, 3),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    "topk_group": 1,
    "router_hidden_size": 8,
    # dense layers below sparse ones, under the settings that families use
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
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "index_n_heads", "mamba_num_heads"), 2),
    "head_dim": 8,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    "qk_nope_head_dim": 4,
    "index_topk": 16,
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    "layer_group_size": 2,
    **dict.fromkeys(("mamba_d_state", "mamba_dt_rank", "ssm_state_size", "mamba_n_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_chunk_size", "mamba_head_dim", "chunk_size", "block_size"), 8),
    "use_mamba_kernels": False,
    "n_groups": 1,
}
"""Settings of a small config. A family takes the keys that it knows."""

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
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
    # the family allows only one expert per token
    "zaya": {"num_experts_per_tok": 1},
}
"""Further settings of some families, most of them for layers of each of their types."""


def small_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Make a config for a model of a few thousand parameters, with all types of a family's layers.

    Args:
        model_type: the family.
        changes: settings to override.

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
    """Make a model of :func:`small_config` with random weights, large enough that every part of it matters.

    Args:
        model_type: the family.
        dtype: dtype of the weights.
        seed: seed of the weights.
        changes: settings of the config to override.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(model_type, **changes), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        mean, deviation = (1.0 if re.search("norm|scale", name) else 0.0), (0.3 if parameter.ndim >= 2 else 0.1)
        nn.init.normal_(parameter, mean, deviation, generator)
    return model
