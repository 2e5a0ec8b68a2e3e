"""Configs of published models too large to run here, and of a small model of one of their families."""

from __future__ import annotations

from typing import Any

REAL: dict[str, tuple[dict[str, Any], float]] = {
    # config.json and model card of Qwen/Qwen3-30B-A3B: 30.5 B parameters
    "qwen3_30b_a3b_zero3": (
        {
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
        30.5,
    ),
    # config.json of openai/gpt-oss-20b; the model card of gpt-oss (August 2025), table 1: 20.91 B parameters
    "gpt_oss_20b_zero3": (
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
        },
        20.9,
    ),
    # model card of Qwen/Qwen3.6-35B-A3B: layers, sizes and heads of the text part; 35 B parameters, vision not counted
    "qwen3_6_35b_a3b_zero3": (
        {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 248320,
            "hidden_size": 2048,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "full_attention_interval": 4,
        },
        34.7,
    ),
}
SMALL_QWEN: dict[str, Any] = {
    "vocab_size": 420,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
