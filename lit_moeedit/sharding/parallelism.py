"""Kinds of parallelism, found by strategy and modules before anything is run or read.

A parameter does not tell how it is held: FSDP2 replaces it by a plain one while it is gathered, and experts of expert
parallelism look like whole ones. A forward under such parallelism may return wrong numbers without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


class Parallelism(Enum):
    """A kind of parallelism under which a rank holds or computes only a part of the model."""

    FSDP2 = "FSDP2 (fully_shard)"
    FSDP1 = "FSDP (FullyShardedDataParallel)"
    TENSOR = "tensor parallelism"
    EXPERT = "expert parallelism of transformers"
    PIPELINE = "pipeline parallelism"
    AUTO_EP = "expert parallelism of DeepSpeed (AutoEP)"
    DEEPSPEED_EXPERT = "expert parallelism of DeepSpeed (deepspeed.moe)"
    DEEPSPEED_TENSOR = "tensor parallelism of DeepSpeed (AutoTP)"
    DEEPSPEED_SEQUENCE = "sequence parallelism of DeepSpeed"
    DEEPSPEED_INFERENCE = "DeepSpeed's modules for inference"
    DEVICE_MAP = "several devices by accelerate's hooks (device_map)"
    DTENSOR = "sharded parameters (DTensor)"
    MESH = "a device mesh of transformers (DistributedConfig)"
    OTHER = "a strategy that is not known"


_BY_CLASS = {
    "deepspeed.module_inject.auto_ep_layer.": Parallelism.AUTO_EP,
    "deepspeed.module_inject.": Parallelism.DEEPSPEED_TENSOR,
    "deepspeed.moe.": Parallelism.DEEPSPEED_EXPERT,
    "deepspeed.runtime.pipe.": Parallelism.PIPELINE,
    "deepspeed.pipe.": Parallelism.PIPELINE,
    "deepspeed.sequence.": Parallelism.DEEPSPEED_SEQUENCE,
    "deepspeed.model_implementations.": Parallelism.DEEPSPEED_INFERENCE,
    "deepspeed.ops.transformer.": Parallelism.DEEPSPEED_INFERENCE,
    "deepspeed.inference.": Parallelism.DEEPSPEED_INFERENCE,
    "transformers.distributed.pipeline_parallel.": Parallelism.PIPELINE,
}
"""Kinds by the beginning of the full name of a module's class, or of a base class; the first that fits counts."""

_BY_ATTRIBUTE = {
    "_is_expert_parallel": Parallelism.EXPERT,
    "_is_autoep_layer": Parallelism.AUTO_EP,
    "_is_fsdp_managed_module": Parallelism.FSDP2,
    "_pp_stage": Parallelism.PIPELINE,
    "_hf_hook": Parallelism.DEVICE_MAP,
}
"""Kinds by an attribute that is set on a module."""

_BY_STRATEGY: tuple[tuple[type, Parallelism], ...] = (
    (ModelParallelStrategy, Parallelism.FSDP2),
    (FSDPStrategy, Parallelism.FSDP1),
)


def find_parallelism(model: nn.Module | None = None, strategy: object = None) -> dict[Parallelism, str]:
    """Find the kinds of parallelism of a model and of a trainer's strategy. Nothing is run, read or communicated.

    Args:
        model: the model, or a module that holds it.
        strategy: the Trainer's strategy.

    Returns:
        By kind, where it was found first. Empty if every rank computes with whole modules: one process, DDP, DeepSpeed
        ZeRO, whose engine gathers the weights of a module before its forward.
    """
    found: dict[Parallelism, str] = {}
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, DDPStrategy):
        kinds = (kind for base, kind in _BY_STRATEGY if isinstance(strategy, base))
        found[next(kinds, Parallelism.OTHER)] = f"the strategy is {type(strategy).__name__}"
        mesh = getattr(strategy, "_device_mesh", None)  # of ModelParallelStrategy, from its setup on
        if mesh is not None and mesh["tensor_parallel"].size() > 1:
            found[Parallelism.TENSOR] = (
                f"{type(strategy).__name__} has tensor_parallel_size {mesh['tensor_parallel'].size()}, as by default; "
                "give it data_parallel_size: N and tensor_parallel_size: 1"
            )
    by_class: dict[type, Parallelism | None] = {}
    for path, module in () if model is None else model.named_modules():
        kind = type(module)
        if kind not in by_class:
            by_class[kind] = _of_class(kind)
        for one in (by_class[kind], *_of_instance(module)):
            if one is not None:
                found.setdefault(one, f"{path or 'the model'} is a {kind.__name__}")
    # what other kinds consist of
    parts = (Parallelism.DTENSOR, Parallelism.MESH)
    specific: dict[Parallelism, str] = {kind: where for kind, where in found.items() if kind not in parts}
    return specific or found


def _of_class(kind: type) -> Parallelism | None:
    if issubclass(kind, FSDPModule):
        return Parallelism.FSDP2
    if issubclass(kind, FullyShardedDataParallel):
        return Parallelism.FSDP1
    names = [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    return next((one for start, one in _BY_CLASS.items() if any(name.startswith(start) for name in names)), None)


def _of_instance(module: Any) -> Iterator[Parallelism]:
    # a class may declare an attribute as None or False
    marks = ((getattr(module, name, None), kind) for name, kind in _BY_ATTRIBUTE.items())
    yield from (kind for mark, kind in marks if mark is not None and mark is not False)
    size = getattr(module, "_tp_size", None)  # 1 if transformers distributes the model in other ways only
    if isinstance(size, int):
        yield Parallelism.TENSOR if size > 1 else Parallelism.MESH
    for weight in module._parameters.values():
        if isinstance(weight, DTensor):
            yield Parallelism.DTENSOR
        elif getattr(weight, "_fsdp_flattened", False):
            yield Parallelism.FSDP1
