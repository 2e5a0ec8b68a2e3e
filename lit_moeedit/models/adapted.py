"""Checks of models with adapters of peft: what cannot be trained or edited is refused by name."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn

from lit_moeedit.models.errors import UnsupportedModelError
from lit_moeedit.sharding.backends import find_backend
from lit_moeedit.sharding.shards import is_partitioned


def refuse_adapters(model: nn.Module, strategy: object = None) -> None:
    """Refuse a model with adapters on parameters, such as experts, under ZeRO stage 3, or FSDP2.

    Under ZeRO stage 3 their first backward fails in peft and DeepSpeed.

    Args:
        model: the model, or a module that holds it.
        strategy: the Trainer's strategy. A model that is sharded already is recognised without it.

    Raises:
        UnsupportedModelError: naming the first such adapter, and what to do.
    """
    is_sharded = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    is_fsdp2 = isinstance(strategy, ModelParallelStrategy) or find_backend(model).is_exclusive
    for name, module in _parameter_adapters(model):
        if is_fsdp2:
            raise UnsupportedModelError(
                f"LoRA on experts is not supported under FSDP2: {name} adapts the parameter {module.parameter_name!r}; "
                "use LoRA on attention alone (target_modules without experts)"
            )
        if is_sharded or is_partitioned(module.get_param()):
            raise UnsupportedModelError(
                f"LoRA on experts does not train under ZeRO stage 3 (peft and DeepSpeed fail in the first backward): "
                f"{name} adapts the parameter {module.parameter_name!r}; use ZeRO stage 2 or lower, or LoRA on "
                "attention alone (target_modules without experts; 'all-linear' has them in some families)"
            )


def refuse_merged(model: nn.Module) -> None:
    """Refuse a model whose adapters are merged into its weights: an edit is one of the base's own weights.

    Raises:
        UnsupportedModelError: naming the first merged adapter, and what to do.
    """
    merged = next((name for name, module in model.named_modules() if getattr(module, "merged_adapters", ())), None)
    if merged is not None:
        raise UnsupportedModelError(
            f"adapters are merged into the weights of {merged}, which are not those of the base now; call "
            "unmerge_adapter() of the PeftModel before an edit, or merge_and_unload() to keep them merged for good"
        )


def _parameter_adapters(model: nn.Module) -> list[tuple[str, Any]]:
    """Find the adapters that peft puts around parameters, by name. Without peft there are none."""
    layers: Any = sys.modules.get("peft.tuners.lora.layer")
    kind = getattr(layers, "ParamWrapper", ())
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
