"""The optimizer of a module and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lit_moeedit.sharding.shards import whole_shape


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters for an optimizer: matrices with the weight decay, vectors (norms, biases) without."""
    matrices = [p for p in parameters if len(whole_shape(p)) >= 2]
    vectors = [p for p in parameters if len(whole_shape(p)) < 2]
    groups: Any = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
    # DeepSpeed drops empty groups, and the scheduler would not find them
    return [group for group in groups if group["params"]]


def cosine_with_warmup(total: float, warmup: float, final: float, cosine_until: float) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step: a linear rise to 1, then half a cosine.

    Args:
        total: number of optimizer steps; infinite if it is not known.
        warmup: share of the steps in which it rises.
        final: the factor after the cosine.
        cosine_until: share of the steps at which the cosine ends.

    Example:
        >>> factor = cosine_with_warmup(100, warmup=0.02, final=0.1, cosine_until=0.5)
        >>> [round(factor(step), 3) for step in (0, 1, 26, 50, 99)]
        [0.5, 1.0, 0.55, 0.1, 0.1]
    """
    steps = total if math.isfinite(total) else 10**9
    rise = max(1, round(warmup * steps))
    end = cosine_until * steps

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, end - rise))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def may_be_fused(module: L.LightningModule) -> bool:
    """Return true if the optimizer of the module may be a fused one.

    It may not if the trainer's precision plugin unscales or clips gradients under autocast. A fused optimizer divides
    by the loss scale within its step. A plugin with a ``GradScaler`` would therefore clip gradients that are still
    scaled, and pass them to ``on_before_optimizer_step``. ``MixedPrecision`` refuses to clip for a fused optimizer even
    in bfloat16, which has no scale. DeepSpeed unscales and clips in its engine.

    Args:
        module: a module with a trainer.
    """
    plugin = module.trainer.precision_plugin
    if getattr(plugin, "scaler", None) is not None:
        return False
    clips = module.trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", module, L.LightningModule)
    return not (isinstance(plugin, MixedPrecision) and clips)


def adam_epsilon(strategy: Strategy, parameters: Sequence[Tensor]) -> float:
    """Choose the epsilon of Adam, which prevents a division by zero.

    In float16 the squares of gradients below 2e-4 are zero, and so is the usual epsilon of 1e-8. DeepSpeed steps in
    float32.
    """
    in_half = any(parameter.dtype == torch.float16 for parameter in parameters)
    return 1e-4 if in_half and not isinstance(strategy, DeepSpeedStrategy) else 1e-8


def allow_torch_optimizer_on_cpu(strategy: Strategy) -> None:
    """Allow an optimizer of torch for a state that DeepSpeed offloads to the CPU.

    DeepSpeed refuses it there because it may be slow, but a fused AdamW is not. A setting in the config has priority.
    """
    if isinstance(strategy, DeepSpeedStrategy) and isinstance(strategy.config, dict):
        strategy.config.setdefault("zero_force_ds_cpu_optimizer", False)
