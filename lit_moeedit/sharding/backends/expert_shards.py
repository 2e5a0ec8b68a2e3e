"""The shards of experts under expert parallelism of transformers, which FSDP2 may shard once more."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lit_moeedit.sharding.shards import UnsupportedShardingError


def is_of_experts(tensor: DTensor) -> bool:
    """Tell if ranks share the experts along the last dimension of the mesh, and FSDP2 shards those of each rank."""
    *replicas, sharded, shared = (None, *tensor.placements)
    return (
        isinstance(sharded, _StridedShard)
        and (sharded.dim, sharded.split_factor) == (0, tensor.device_mesh.size(-1))
        and type(shared) is Shard
        and shared.dim == 0
        and all(one is None or type(one) is Replicate for one in replicas)
    )


@torch.no_grad()
def place_of_experts(tensor: DTensor) -> tuple[int, int, bool]:
    """Find a rank's shard of a parameter.

    Returns:
        0, the dimension of the experts; the first expert; and whether no other replica of the shard comes before it.

    Raises:
        UnsupportedShardingError: if the shard is not in memory as it is.
    """
    mesh: Any = tensor.device_mesh
    *replica, part, owner = mesh.get_coordinate()
    local: Tensor = tensor.to_local().detach()
    experts = tensor.shape[0] // mesh.size(-1)
    chunk = -(-experts // mesh.size(-2))
    first = min(part * chunk, experts)
    is_whole = len(local) == min(chunk, experts - first) and type(local) is Tensor and local.is_contiguous()
    if tensor.shape[0] % mesh.size(-1) or not is_whole:
        raise UnsupportedShardingError(
            f"the shard of experts of shape {list(tensor.shape)} is of an unknown form ({list(local.shape)} on "
            f"{tuple(mesh.shape)} ranks)"
        )
    return 0, owner * experts + first, not any(replica)


def group_of_experts(tensor: DTensor) -> dist.ProcessGroup:
    """Return the ranks whose shards make up the parameter. All ranks call this together, for the first time."""
    mesh: Any = tensor.device_mesh
    if mesh.size(-2) == 1:
        group: dist.ProcessGroup = mesh.get_group(mesh.ndim - 1)
        return group
    both = mesh[mesh.mesh_dim_names[-2:]] if mesh.ndim > 2 else mesh
    flat: dist.ProcessGroup = both._flatten().get_group()
    return flat
