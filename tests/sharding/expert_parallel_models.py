"""Small models under expert parallelism of transformers, read from a folder as every user reads them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

SIZES = {"ep_size": 2, "fsdp_size": 2}


def whole_model(**config: Any) -> PreTrainedModel:
    from tests.conftest import _build

    return _build("qwen3_moe", **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **config})


def parallel_model(
    folder: str, sizes: dict[str, int] = SIZES, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """A model whose experts the ranks share; all ranks call this."""
    if dist.get_rank() == 0:
        whole_model(**config).save_pretrained(folder)
    dist.barrier()
    distributed = DistributedConfig(**sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, distributed_config=distributed, dtype=dtype)
    return model
