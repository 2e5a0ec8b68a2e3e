"""Small models that DeepSpeed trains, and their model weights, master weights and moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

EXPERTS, D_MODEL, D_HIDDEN = 5, 7, 3
"""105 elements: no number of ranks divides them, so that partitions are padded and cut through experts."""


class Model(nn.Module):
    """Experts between parameters of odd sizes, one of them frozen; the gradient does not depend on the weights."""

    def __init__(self, transposed: bool = False, d_hidden: int = D_HIDDEN) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.before = parameter(11)
        self.frozen = parameter(3, 3).requires_grad_(False)
        shape = (EXPERTS, d_hidden, D_MODEL) if transposed else (EXPERTS, D_MODEL, d_hidden)
        self.experts = parameter(*shape)
        self.behind = parameter(2, 5)
        self.register_buffer("slope", torch.randn(shape, generator=generator))

    def forward(self, scale: Tensor) -> Tensor:
        rest = self.before.sum() + self.behind.sum() * self.frozen.sum()
        return scale * ((self.experts * self.slope.to(self.experts.dtype)).sum() + rest)


def import_deepspeed() -> Any:
    import deepspeed

    # it would be compiled at the first start, behind a file lock that outlives a killed process
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def make(
    stage: int, dtype: torch.dtype, lr: float = 0.0, model: Model | None = None, steps: int = 1, **zero: Any
) -> Any:
    """An engine with Adam that has made one step (without a change, if ``lr`` is 0)."""
    deepspeed = import_deepspeed()
    model = model if model is not None else Model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(steps):
        step(engine)
    return engine


def step(engine: Any) -> None:
    dtype = next(engine.module.buffers()).dtype
    engine.backward(engine(torch.tensor(1.0, dtype=dtype)))
    engine.step()


def model_weights(engine: Any) -> Tensor:
    """The weights as the next forward sees them."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([engine.module.experts], enabled=hasattr(engine.module.experts, "ds_id")):
        return engine.module.experts.detach().clone()


def master(engine: Any) -> Tensor:
    """The weights as the optimizer continues from, float32."""
    from deepspeed.utils import safe_get_full_fp32_param

    weight, optimizer = engine.module.experts, engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        return optimizer.fp32_groups[0][1].detach().clone()
    full = safe_get_full_fp32_param(weight)
    return (
        model_weights(engine).float() if full is None else full.view(EXPERTS, *model_weights(engine).shape[1:]).clone()
    )


def moments(engine: Any) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_optimizer_state

    weight, optimizer = engine.module.experts, engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        weight, optimizer = optimizer.fp32_groups[0][1], optimizer.optimizer
    if not hasattr(weight, "ds_id") and not hasattr(weight, "_hp_mapping"):
        return [optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq")]
    found = (safe_get_full_optimizer_state(weight, name) for name in ("exp_avg", "exp_avg_sq"))
    return [value.view(EXPERTS, -1).clone() for value in found]


def bits(*tensors: Tensor) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def some_deltas(seed: int = 0, scale: float = 0.1, d_hidden: int = D_HIDDEN) -> ExpertDeltas:
    """Deltas of experts 0, 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    return ExpertDeltas(
        torch.tensor([3, 0, 3, 2]),
        torch.tensor([0, 0, 1, 1]),
        scale * torch.randn(2, D_MODEL, generator=generator),
        torch.randn(4, d_hidden, generator=generator),
        EXPERTS,
    )


def dense(deltas: ExpertDeltas, transposed: bool = False) -> Tensor:
    whole = torch.stack([deltas.dense(j) for j in range(EXPERTS)])
    return whole.mT if transposed else whole


def commit(engine: Any, ranks: Ranks, deltas: ExpertDeltas, transposed: bool = False) -> None:
    with Transaction([engine.optimizer], ranks) as transaction:
        transaction.commit(engine.module.experts, deltas, transposed)
