"""Parameters that DeepSpeed trains: master weights apart from the model weights (ZeRO stages 0 to 3), or partitions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.sharding.backends.backend import Backend
from lit_moeedit.sharding.backends.unsharded import frozen, is_moment, view
from lit_moeedit.sharding.shards import Copy, Own, Shard, UnsupportedShardingError
from lit_moeedit.sharding.zero3_passes import beside_training, gathering_on_use


class Zero(Backend):
    """DeepSpeed ZeRO: parameters partitioned by stage 3, or trained by an optimizer of DeepSpeed."""

    @override
    def holds(self, model: nn.Module) -> bool:
        return any(hasattr(weight, "ds_id") for weight in model.parameters())

    @override
    @contextmanager
    def beside_training(self, model: nn.Module, gradients: bool) -> Iterator[None]:
        with held(Undo()) as undo:
            undo.enter_context(frozen(model))
            if gradients:
                undo.enter_context(beside_training(model))
            yield

    @override
    def forward(self, model: nn.Module) -> AbstractContextManager[object]:
        return gathering_on_use(model)

    @override
    def shard(self, weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
        holder = next((optimizer for optimizer in optimizers if _holds(optimizer, weight)), None)
        if hasattr(weight, "ds_id"):
            return _zero_3(weight, holder)
        if holder is None:
            return None
        if hasattr(weight, "_hp_mapping"):
            return _zero_1_or_2(weight, holder)
        return _zero_0(weight, holder)

    @override
    def own(self, tensor: Any) -> Own | None:
        return Own(tensor.ds_shape, False, *_zero_3_partition(tensor)) if hasattr(tensor, "ds_id") else None

    @override
    def release(self, weight: Any) -> None:
        if hasattr(weight, "ds_id") and weight.ds_status.name == "AVAILABLE":
            weight.partition()


def _groups(optimizer: Any) -> Iterator[tuple[int, Sequence[nn.Parameter]]]:
    """Yield the model's parameters as a DeepSpeed optimizer groups them; nothing for any other optimizer."""
    for name in ("fp16_groups", "bit16_groups", "bf16_groups"):
        yield from enumerate(getattr(optimizer, name, ()))


def _holds(optimizer: Any, weight: nn.Parameter) -> bool:
    return any(weight is other for _, group in _groups(optimizer) for other in group)


# -- stage 3 ----------------------------------------------------------------------------------------------------------


def _zero_3_partition(weight: Any) -> tuple[int, Tensor]:
    """Return this rank's partition of a ZeRO-3 parameter: index of the first element, and a view without padding.

    Raises:
        UnsupportedShardingError: if the elements are not in memory as they are.
    """
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    part = weight.ds_tensor
    if part.status is not PartitionedParamStatus.AVAILABLE or hasattr(part, "ds_quant_scale"):
        raise UnsupportedShardingError(
            "the parameter's partition is on NVMe or quantised; offload parameters to the CPU, or not at all"
        )
    # the last partitions are padded, so that all are of one size
    start = min(dist.get_rank(weight.ds_process_group) * part.numel(), weight.ds_numel)
    return start, part.data[: min(part.numel(), weight.ds_numel - start)]


def _zero_3(weight: Any, holder: Any) -> Shard:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    if weight.ds_status is ZeroParamStatus.INFLIGHT:
        raise UnsupportedShardingError("the parameter is being gathered; edit between steps, not within a forward")
    if getattr(weight, "ds_secondary_tensor", None) is not None:
        raise UnsupportedShardingError("secondary partitions (zero_hpz_partition_size) are not supported")
    if weight.ds_status is ZeroParamStatus.AVAILABLE:
        weight.partition()
    start, owned = _zero_3_partition(weight)
    group = weight.ds_process_group if dist.get_world_size(weight.ds_process_group) > 1 else None
    model = Copy(start, lambda: owned)
    untrained = Shard(weight.ds_shape, owned.dtype, start, start + len(owned), model, group=group)
    if holder is None:
        return untrained
    padded: list[Tensor] = []

    def read() -> Tensor:
        # a view of the optimizer's partition, or a copy of one that is offloaded
        padded[:] = [safe_get_local_fp32_param(weight)]
        return padded[0].view(-1)[: len(owned)]

    def write(elements: Tensor) -> None:
        safe_set_local_fp32_param(weight, padded.pop())

    moments = _zero_3_moments(weight, holder, start)
    return replace(untrained, master=Copy(start, read, write), model=model, moments=moments)


def _zero_3_moments(weight: Any, holder: Any, start: int) -> list[Copy]:
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    states = holder.optimizer.state.values()
    names = {name for state in states for name, value in state.items() if isinstance(value, Tensor) and value.ndim}

    def copy(name: str) -> Copy:
        return Copy(
            start,
            lambda: safe_get_local_optimizer_state(weight, name).view(-1),
            lambda elements: safe_set_local_optimizer_state(weight, elements, name),
        )

    return [copy(name) for name in sorted(names)]


# -- stages 1 and 2 ---------------------------------------------------------------------------------------------------


def _zero_1_or_2(weight: Any, holder: Any) -> Shard:
    group = weight._dp_group
    common = {
        "shape": weight.shape,
        "dtype": weight.dtype,
        "model": view(weight),
        "group": group if dist.get_world_size(group) > 1 else None,
    }
    mapping = weight._hp_mapping
    if mapping is None:  # other ranks own all of it
        return Shard(**common, start=0, stop=0, master=view(torch.empty(0, device=weight.device)))
    address = mapping.lp_fragment_address
    return Shard(
        **common,
        start=address.start,
        stop=address.start + address.numel,
        master=view(mapping.hp_fragment, address.start),
        moments=[view(moment, address.start) for moment in _zero_1_or_2_moments(mapping, holder)],
    )


def _zero_1_or_2_moments(mapping: Any, holder: Any) -> list[Tensor]:
    """Take moments from the inner optimizer, because after a resume DeepSpeed links them only in the next step."""
    groups = getattr(holder, "single_partition_of_fp32_groups", None) or holder.fp32_groups_flat_partition
    partition, address = groups[mapping.param_group_index], mapping.hp_fragment_address
    state = holder.optimizer.state.get(partition, {})
    found = (value.data.view(-1) for value in state.values() if is_moment(value, partition))
    return [moment[address.start : address.start + address.numel] for moment in found]


# -- stage 0 ----------------------------------------------------------------------------------------------------------


def _zero_0(weight: nn.Parameter, holder: Any) -> Shard:
    """Return the shard of a weight in half precision, whose optimizer DeepSpeed wraps in another with the masters."""
    for number, group in _groups(holder):
        position = next((i for i, other in enumerate(group) if other is weight), None)
        if position is None:
            continue
        if hasattr(holder, "fp32_groups"):  # a master for each parameter
            owner: Tensor = holder.fp32_groups[number][position]
            start = 0
        elif hasattr(holder, "fp32_groups_flat"):  # one for the group
            owner = holder.fp32_groups_flat[number]
            start = sum(other.numel() for other in group[:position])
        else:
            break
        states = holder.optimizer.state.get(owner, {}).values()
        master, *moments = (
            view(tensor.data.view(-1)[start : start + weight.numel()])
            for tensor in (owner, *(value for value in states if is_moment(value, owner)))
        )
        return Shard(weight.shape, weight.dtype, 0, weight.numel(), master, view(weight), moments)
    raise UnsupportedShardingError(f"{type(holder).__name__} keeps its master weights in a way that is not known")
