"""Where the numbers of a parameter are: on this rank, in the optimizer's master copy, in its moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class UnsupportedShardingError(RuntimeError):
    """The parameter is laid out in a way that cannot be read or written here."""


def is_partitioned(weight: nn.Parameter) -> bool:
    """Whether a rank holds only a part of the weights that the model computes with (ZeRO-3, FSDP2)."""
    return hasattr(weight, "ds_id") or isinstance(weight, DTensor)


def _nothing_to_put_back(numbers: Tensor) -> None:
    return


@dataclass(frozen=True)
class Copy:
    """A run of a flattened parameter's numbers, as one owner (the model, the optimizer) holds it on this rank.

    Attributes:
        start: index of the first number in the flattened parameter.
        read: gives the numbers, ``[n]``: a view where that is possible.
        write: puts back what ``read`` gave, after it was changed in place; for a view there is nothing to do.
    """

    start: int
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None] = _nothing_to_put_back


@dataclass(frozen=True)
class Shard:
    """One parameter as this rank holds it.

    A rank *owns* a run of the numbers: all of them, unless the parameter or its master copy is partitioned. ``source``
    holds the owned run in the highest precision there is, and every other copy follows it by rounding.

    Attributes:
        shape: of the whole parameter.
        dtype: of the weights that the model computes with.
        start: index of the first owned number in the flattened parameter.
        stop: behind the last owned number.
        source: exactly the owned run.
        working: the weights that the model computes with, if they are not ``source`` itself: the owned run or all.
        moments: the owned run of each of the optimizer's moments.
        group: the processes whose owned runs make up the parameter; ``None`` if this rank owns all of it.
    """

    shape: torch.Size
    dtype: torch.dtype
    start: int
    stop: int
    source: Copy
    working: Copy | None = None
    moments: list[Copy] = field(default_factory=list)
    group: dist.ProcessGroup | None = None

    def exchange(self, numbers: Tensor) -> None:
        """Fill in what other ranks own; ``numbers`` is zero there. Bit by bit: bytes are added to zeros."""
        if self.group is not None:
            dist.all_reduce(numbers.view(torch.uint8), group=self.group)


def locate(weight: nn.Parameter, optimizers: Sequence[Any] = ()) -> Shard:
    """Find out how ``weight`` is held: whole, or partitioned by DeepSpeed ZeRO; alone, or with a master copy.

    A ZeRO-3 parameter that happens to be gathered is partitioned again, so that the next forward gathers what is
    written to its partitions.

    Args:
        weight: the parameter.
        optimizers: those that train it now, as ``trainer.optimizers`` has them; none outside of training.

    Raises:
        UnsupportedShardingError: naming the layout.
    """
    if isinstance(weight, DTensor):
        raise UnsupportedShardingError(
            "the parameter is a DTensor (FSDP2, tensor parallelism); supported are no sharding, DDP, and DeepSpeed "
            "ZeRO stages 0 to 3"
        )
    if hasattr(weight, "rehearsed"):  # by a process that stands for many, see lit_moeedit.planning.simulated_ranks
        shard: Shard = weight.rehearsed(optimizers)
        return shard
    holder = next((optimizer for optimizer in optimizers if _holds(optimizer, weight)), None)
    if hasattr(weight, "ds_id"):
        return _zero_3(weight, holder)
    whole = weight.data.view(-1)
    working = Copy(0, lambda: whole)
    if holder is None:
        moments = [Copy(0, lambda m=m: m.view(-1)) for m in _plain_moments(weight, optimizers)]  # type: ignore[misc]
        return Shard(weight.shape, weight.dtype, 0, weight.numel(), working, None, moments)
    if hasattr(weight, "_hp_mapping"):
        return _zero_1_or_2(weight, holder, working)
    master, moments = _half_precision(weight, holder)
    return Shard(weight.shape, weight.dtype, 0, weight.numel(), master, working, moments)


def _groups(optimizer: Any) -> Iterator[tuple[int, Sequence[nn.Parameter]]]:
    """The model's parameters as a DeepSpeed optimizer groups them; nothing for any other optimizer."""
    for name in ("fp16_groups", "bit16_groups", "bf16_groups"):
        yield from enumerate(getattr(optimizer, name, ()))


def _holds(optimizer: Any, weight: nn.Parameter) -> bool:
    return any(weight is other for _, group in _groups(optimizer) for other in group)


def _plain_moments(weight: nn.Parameter, optimizers: Sequence[Any]) -> list[Tensor]:
    states = (getattr(optimizer, "state", {}).get(weight, {}) for optimizer in optimizers)
    return [value for state in states for value in state.values() if _is_moment(value, weight.shape)]


def _is_moment(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


def zero_3_partition(weight: Any) -> tuple[int, Tensor]:
    """What this rank owns of a parameter under ZeRO stage 3: index of its first number, and a view of all of them.

    Raises:
        UnsupportedShardingError: if they are not in memory as they are.
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
    start, owned = zero_3_partition(weight)
    group, count = weight.ds_process_group, len(owned)
    working = Copy(start, lambda: owned)
    common = {"shape": weight.ds_shape, "dtype": owned.dtype, "start": start, "stop": start + count}
    if dist.get_world_size(group) == 1:
        group = None
    if holder is None:
        return Shard(**common, source=working, group=group)
    padded: list[Tensor] = []

    def read() -> Tensor:
        # a view of the optimizer's partition, or a copy of one that is offloaded
        padded[:] = [safe_get_local_fp32_param(weight)]
        return padded[0].view(-1)[:count]

    def write(numbers: Tensor) -> None:
        safe_set_local_fp32_param(weight, padded.pop())

    return Shard(
        **common, source=Copy(start, read, write), working=working, moments=_moments_3(weight, holder), group=group
    )


def _moments_3(weight: Any, holder: Any) -> list[Copy]:
    from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

    part = weight.ds_tensor
    start = dist.get_rank(weight.ds_process_group) * part.numel()
    states = holder.optimizer.state.values()
    names = {name for state in states for name, value in state.items() if isinstance(value, Tensor) and value.ndim}

    def copy(name: str) -> Copy:
        return Copy(
            start,
            lambda: safe_get_local_optimizer_state(weight, name).view(-1),
            lambda numbers: safe_set_local_optimizer_state(weight, numbers, name),
        )

    return [copy(name) for name in sorted(names)]


def _zero_1_or_2(weight: Any, holder: Any, working: Copy) -> Shard:
    group = weight._dp_group
    common = {
        "shape": weight.shape,
        "dtype": weight.dtype,
        "working": working,
        "group": group if dist.get_world_size(group) > 1 else None,
    }
    mapping = weight._hp_mapping
    if mapping is None:  # other ranks own all of it
        nothing = torch.empty(0, device=weight.device)
        return Shard(**common, start=0, stop=0, source=Copy(0, lambda: nothing))
    address = mapping.lp_fragment_address
    master = mapping.hp_fragment.data.view(-1)
    moments = [Copy(address.start, lambda m=m: m) for m in _moments_1_or_2(mapping, holder)]  # type: ignore[misc]
    return Shard(
        **common,
        start=address.start,
        stop=address.start + address.numel,
        source=Copy(address.start, lambda: master),
        moments=moments,
    )


def _moments_1_or_2(mapping: Any, holder: Any) -> list[Tensor]:
    """From the inner optimizer: after a resume DeepSpeed links a weight to its moments with the next step at best."""
    groups = getattr(holder, "single_partition_of_fp32_groups", None) or holder.fp32_groups_flat_partition
    partition, run = groups[mapping.param_group_index], mapping.hp_fragment_address
    state = holder.optimizer.state.get(partition, {})
    found = (value.data.view(-1) for value in state.values() if _is_moment(value, partition.shape))
    return [moment[run.start : run.start + run.numel] for moment in found]


def _half_precision(weight: nn.Parameter, holder: Any) -> tuple[Copy, list[Copy]]:
    """Master copy and moments in the optimizers that DeepSpeed wraps around another at stage 0."""
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

        def copy(numbers: Tensor, start: int = start) -> Copy:
            run = numbers.data.view(-1)[start : start + weight.numel()]
            return Copy(0, lambda: run)

        state = holder.optimizer.state.get(owner, {})
        return copy(owner), [copy(value) for value in state.values() if _is_moment(value, owner.shape)]
    raise UnsupportedShardingError(f"{type(holder).__name__} keeps its master copies in a way that is not known")
