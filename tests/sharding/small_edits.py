"""A small model, facts, and an editor, which several ranks hold whole or as shards of DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.corpus import train_tokenizer
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.models.experts import check_editable
from lit_moeedit.preservation import CovariancePenalty

FACTS = [
    Fact("Rome", "The city of Rome lies in", "Spain", "Italy", ("Rome is in the country",)),
    Fact("Lake Ladoga", "Lake Ladoga is found in", "northern Peru", "Russia"),
    Fact("Oslo", "People who live in Oslo speak", "Latin", "Norwegian"),
]
TEXTS = ["The sea lies in Italy.", "Who lives in the city of bread?", "A lake.", "In Russia one hears Russian."]
LAYERS = (0, 1)
STAGES = {"replicated": None, "zero 0": 0, "zero 1": 1, "zero 2": 2, "zero 3": 3}


def tokenizer() -> Any:
    return train_tokenizer([*TEXTS, *(f"{fact.prompt} {fact.target_new}" for fact in FACTS)], vocab_size=400)


def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    from tests.conftest import _build

    whole = _build("qwen3_moe").to(dtype)
    if dtype == torch.bfloat16:
        whole.set_experts_implementation("eager")  # grouped_mm knows no bfloat16 of these sizes
    return whole


def editor(**settings: Any) -> Editor:
    usual = {
        "targets": TargetOptimizer(steps=4, learning_rate=0.5, stop=0.0),
        "contexts": ("", "Note:"),
        "token_budget": 64,
        "ridge": 0.1,
        "preserve": CovariancePenalty(10.0),
    }
    return Editor(LAYERS, **{**usual, **settings})


def prepared(
    kind: str, dtype: torch.dtype = torch.float32, frozen: bool = False
) -> tuple[PreTrainedModel, list[Any], Callable[[], list[Tensor]]]:
    """A model, its optimizers, and a function that reads the experts' weights of the edited layers, frozen or not."""
    import deepspeed

    whole = model(dtype)
    stage = STAGES[kind]
    for layer in check_editable(whole, LAYERS):
        layer.experts.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW([weight for weight in whole.parameters() if weight.requires_grad], lr=0.0)
    if stage is not None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
        _, optimizer, *_ = deepspeed.initialize(model=whole, optimizer=optimizer, config=config)

    def read() -> list[Tensor]:
        chosen = [layer.down_proj for layer in check_editable(whole, LAYERS)]
        with deepspeed.zero.GatheredParameters(chosen, enabled=stage == 3):
            return [weight.detach().clone() for weight in chosen]

    return whole, [optimizer], read
