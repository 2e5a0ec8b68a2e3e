"""Expert parallelism: which rank has which experts of a layer, and the rows that ranks send to them and get back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError, whole_shape


def is_expert_parallel(module: nn.Module) -> bool:
    """Tell if a rank has only some of the experts of this module, and ranks exchange tokens in its forward."""
    return getattr(module, "_is_expert_parallel", None) is True


def refuse_shared_batch(layer: nn.Module) -> None:
    """Refuse a layer under expert parallelism that ranks run on the same batch, whose tokens would count several times.

    Raises:
        UnsupportedShardingError: under tensor parallelism beside it (``tp_size``).
    """
    meshes: list[Any] = [weight.device_mesh for weight in layer.parameters() if isinstance(weight, DTensor)]
    if any("tp" in (mesh.mesh_dim_names or ()) and mesh["tp"].size() > 1 for mesh in meshes):
        raise UnsupportedShardingError(
            "under expert parallelism with tensor parallelism the routing of a layer can be watched, but not the keys "
            "of its experts; leave tp_size at 1, and give ep_size and fsdp_size"
        )


def own_experts(weight: Tensor) -> Tensor:
    """Return this rank's experts of a parameter, without a copy; the parameter itself if this rank has all of them."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True)
class Owners:
    """The ranks that share the experts of a layer: each has the same number of them, the first rank the first ones.

    Attributes:
        group: the ranks.
        size: number of ranks.
        count: number of experts of a rank.
        first: this rank's first expert.
    """

    group: dist.ProcessGroup
    size: int
    count: int
    first: int

    @classmethod
    def of(cls, experts: nn.Module) -> Owners:
        """Find the owners of the experts of a module that :func:`is_expert_parallel`."""
        weight: Any = experts.down_proj
        mesh = weight.device_mesh  # further dimensions come first, and are those of FSDP2
        group: dist.ProcessGroup = mesh.get_group(mesh.ndim - 1)
        count = whole_shape(weight)[0] // group.size()
        return cls(group, group.size(), count, mesh.get_local_rank(mesh.ndim - 1) * count)

    def begin(self, counts: Sequence[int], device: torch.device) -> Exchange:
        """Tell the owners how many rows they get. All ranks call this together.

        Args:
            counts: number of this rank's rows of each expert, of all experts of the layer.
            device: device of the rows.
        """
        sent = torch.tensor(counts, device=device).view(self.size, self.count)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        expert = torch.arange(self.count, device=device).repeat(self.size).repeat_interleave(received.flatten())
        return Exchange(self, sent.sum(1).tolist(), received.sum(1).tolist(), expert)


@dataclass(frozen=True)
class Exchange:
    """Rows on their way to the owners of their experts, and back.

    Attributes:
        owners: the ranks.
        sent: number of rows that each rank gets from this one.
        received: number of rows that this rank gets from each.
        expert: index of the expert among this rank's own, of each row that it gets, int64 ``[m]``.
    """

    owners: Owners
    sent: list[int]
    received: list[int]
    expert: Tensor

    def send(self, rows: Tensor) -> Tensor:
        """Send rows to the owners.

        Args:
            rows: this rank's rows ``[n, …]``, sorted by expert.

        Returns:
            ``[m, …]``, the rows of this rank's experts: those of the first rank first.
        """
        return self._all_to_all(rows, self.sent, self.received)

    def back(self, rows: Tensor) -> Tensor:
        """Send results ``[m, …]``, in the order of :meth:`send`'s, back to the ranks that sent rows: ``[n, …]``."""
        return self._all_to_all(rows, self.received, self.sent)

    def _all_to_all(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        found = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=self.owners.group)
        return found


@dataclass(frozen=True)
class Part:
    """The experts of a layer for which a rank keeps values: all of them or, under expert parallelism, its own.

    Values of a part are tensors ``[n, …]`` with one entry for each of its experts.

    Attributes:
        first: the first of the experts.
        owners: number of ranks that share the experts of the layer, each with the same number of them.
        is_first: whether no rank before this one has the same experts; of no meaning if there is one owner.
    """

    first: int = 0
    owners: int = 1
    is_first: bool = True

    @classmethod
    def of(cls, experts: nn.Module) -> Part:
        """Find this rank's part of an experts module."""
        if not is_expert_parallel(experts):
            return cls()
        owners = Owners.of(experts)
        return cls(owners.first, owners.size, 0 in dist.get_process_group_ranks(owners.group))

    def is_counted(self, ranks: Ranks) -> bool:
        """Tell if this rank's values enter a sum over all ranks, to which those of each expert contribute once."""
        return self.is_first if self.owners > 1 else ranks.rank == 0

    def all_reduce(self, values: Tensor, ranks: Ranks) -> None:
        """Sum values over the ranks that have the same experts, in place. All ranks call this together."""
        if self.owners == 1:
            ranks.all_reduce(values)
        elif ranks.size > self.owners:
            for first in self._firsts(values):
                ranks.all_reduce(values if first == self.first else torch.zeros_like(values))

    def gather(self, values: Tensor, ranks: Ranks) -> Tensor:
        """Gather the values of all parts, which are the same on all ranks with the same experts.

        All ranks call this together. None holds more than two parts besides the result.

        Returns:
            On the first rank, values of all experts on the CPU; on the others, those of this part.
        """
        if self.owners == 1:
            return values.cpu() if ranks.rank == 0 else values
        whole = values.new_empty(self.whole_shape(values) if ranks.rank == 0 else 0, device="cpu")
        for first in self._firsts(values):
            is_own = first == self.first and self.is_first
            part = values.clone() if is_own else torch.zeros_like(values)
            ranks.all_reduce(part)
            if ranks.rank == 0:
                whole[first : first + len(part)] = part
        return whole if ranks.rank == 0 else values

    def scatter(self, whole: Tensor | None, values: Tensor, ranks: Ranks) -> None:
        """Overwrite values with the first rank's. All ranks call this together.

        Args:
            whole: values of all experts; ``None`` on ranks other than the first.
            values: those of this part.
            ranks: the ranks.
        """
        for first in self._firsts(values):
            part = values if first == self.first else torch.empty_like(values)
            if whole is not None:
                part.copy_(whole[first : first + len(part)])
            ranks.broadcast(part)

    def whole_shape(self, values: Tensor) -> torch.Size:
        """Return the shape of the values of all experts."""
        return torch.Size((len(values) * self.owners, *values.shape[1:]))

    def _firsts(self, values: Tensor) -> range:
        return range(0, len(values) * self.owners, len(values))
