"""Small models that FSDP2 shards, in several layouts and precisions, and training steps of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_moeedit.models.experts import check_editable
from tests.sharding.small_edits import LAYERS, tokenizer


@dataclass(frozen=True)
class Case:
    """A model under FSDP2: its number of experts, its layout, and its precision."""

    experts: int = 6
    layout: str = "layers and root"
    dtype: torch.dtype = torch.float32
    policy: bool = False
    editor: dict[str, Any] = field(default_factory=dict)


def whole_model(case: Case) -> PreTrainedModel:
    from tests.conftest import _build

    # bfloat16 needs rows of 16 bytes
    model = _build(
        "qwen3_moe",
        num_experts=case.experts,
        num_experts_per_tok=min(2, case.experts),
        moe_intermediate_size=24,
    )
    return model.to(case.dtype)


def shard(model: PreTrainedModel, case: Case) -> None:
    """Shard a model as a case says; all ranks call this."""
    options: dict[str, Any] = {}
    if case.policy:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parts = LAYOUTS[case.layout](model)
    if case.layout == "kept gathered":
        options["reshard_after_forward"] = False
    if case.layout == "replicas":
        options["mesh"] = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    if case.layout == "replicated shards":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if case.layout in ("rows", "columns"):
        dim = 1 if case.layout == "rows" else 2
        # experts of both projections; the others have no such dimension
        options["shard_placement_fn"] = lambda weight: Shard(dim) if weight.ndim == 3 else None
    for part in parts:
        fully_shard(part, **options)


LAYOUTS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "layers and root": lambda model: (*model.model.layers, model),
    "root only": lambda model: (model,),
    "stack, layers and root": lambda model: (*model.model.layers, model.model, model),
    "kept gathered": lambda model: (*model.model.layers, model),
    "plan of transformers": lambda model: (
        model.model.embed_tokens,
        *model.model.layers,
        [model.model.norm, model.lm_head],
        model,
    ),
    "rows": lambda model: (*model.model.layers, model),
    "columns": lambda model: (*model.model.layers, model),
    "replicas": lambda model: (*model.model.layers, model),
    "replicated shards": lambda model: (*model.model.layers, model),
}


def loaded_by_transformers(case: Case) -> PreTrainedModel:
    """The model as transformers shards it while it reads a checkpoint."""
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    if torch.distributed.get_rank() == 0:
        whole_model(case).save_pretrained(folder[0])
    torch.distributed.barrier()
    sizes = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=sizes, dtype=case.dtype)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder[0])
    return model.train()


def prepared(case: Case, lr: float = 0.0, steps: int = 0) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    if case.layout == "loaded by transformers":
        model = loaded_by_transformers(case)
    else:
        model = whole_model(case)
        shard(model, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train on texts that differ between ranks."""
    batch = tokenizer()(["The sea lies in Italy.", "A lake."], return_tensors="pt", padding=True)
    ids = batch["input_ids"].roll(torch.distributed.get_rank(), 1)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=batch["attention_mask"], labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(model: PreTrainedModel) -> None:
    """A forward as an evaluation makes it, after which groups may stay gathered."""
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))


def full(model: PreTrainedModel) -> list[Tensor]:
    """The weights of the edited layers, which are those that the optimizer trains."""
    weights = [layer.down_proj for layer in check_editable(model, LAYERS)]
    assert all(isinstance(weight, DTensor) for weight in weights)
    return [weight.detach().full_tensor().clone() for weight in weights]


def all_full(model: PreTrainedModel) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: weight.detach().full_tensor().clone() for name, weight in model.named_parameters()}


def check_idle(model: PreTrainedModel) -> None:
    """Nothing is left of passes: no gradient, no group that is gathered or in the midst of a pass."""
    for name, weight in model.named_parameters():
        assert isinstance(weight, DTensor), name
        assert weight.grad is None, name
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            groups = state._fsdp_param_groups
            assert all(group.is_sharded for group in groups)
            assert {part._training_state.name for part in (state, *groups)} == {"IDLE"}
            assert state._state_ctx.iter_forward_root is None
            for one in (one for group in groups for one in group.fsdp_params):
                gathered = getattr(one, "_unsharded_param", None)
                assert gathered is None or gathered.grad is None
