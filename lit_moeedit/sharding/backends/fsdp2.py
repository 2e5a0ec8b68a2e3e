"""FSDP2: modules sharded by ``fully_shard``, as Lightning's ``ModelParallelStrategy`` and transformers use it.

FSDP2 replaces the parameters of a module by gathered ones for its forward and backward pass. A group of parameters may
stay gathered after it: that of the root after any forward without a backward pass, every group under
``reshard_after_forward=False``, and those of a forward that has failed. A gathered parameter is rounded to the dtype of
the forward, and nothing that is written to it lasts. So models are recognised by their modules, and settled before
their parameters are read or written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardedAlong
from transformers import PreTrainedModel
from typing_extensions import override

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.sharding.backends.backend import Backend
from lit_moeedit.sharding.backends.expert_shards import group_of_experts, is_of_experts, place_of_experts
from lit_moeedit.sharding.backends.unsharded import is_moment, view
from lit_moeedit.sharding.parallelism import Parallelism
from lit_moeedit.sharding.shards import Own, Shard, UnsupportedShardingError, Window

LAYOUT = "call fully_shard on each decoder layer and then on the transformers model itself"


class FSDP2(Backend):
    """Parameters that ``fully_shard`` has sharded along one dimension, on all ranks or on groups of them.

    The optimizer trains the shards themselves, in their own precision: there are no further master weights.
    """

    handles = frozenset({Parallelism.FSDP2})
    is_exclusive = True

    @override
    def holds(self, model: nn.Module) -> bool:
        return bool(_sharded_modules(model))

    @override
    def check(self, model: nn.Module) -> None:
        inner = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        if inner:
            _check_root(model, inner[0])
        sharded: set[tuple[nn.Module, str]] = set()
        for group in (group for part in _sharded_modules(model) for group in _state_of(part)._fsdp_param_groups):
            if isinstance(group.offload_policy, CPUOffloadPolicy):
                raise UnsupportedShardingError(
                    "FSDP2 with CPUOffloadPolicy is not supported; keep the shards on the device"
                )
            if group._use_post_forward_mesh:
                raise UnsupportedShardingError(
                    "FSDP2 with a number for reshard_after_forward is not supported; use true or false"
                )
            for one in group.fsdp_params:
                _place(one.sharded_param)
                held_by, ranks = one.sharded_param.device_mesh.size(), dist.get_world_size()
                if held_by != ranks:
                    raise UnsupportedShardingError(
                        f"FSDP2 shards the model over {held_by} of {ranks} ranks, so that others train weights of "
                        f"their own; give fully_shard a mesh of all ranks"
                    )
                sharded.update(_places_of(one))
        for path, module in model.named_modules() if inner else ():
            for name, weight in module._parameters.items():
                is_sharded = isinstance(weight, DTensor)
                if weight is not None and (is_sharded or weight.requires_grad) and (module, name) not in sharded:
                    what = "sharded by something else" if is_sharded else "trained, but not sharded"
                    raise UnsupportedShardingError(
                        f"{path}.{name} is {what} in a model under FSDP2, so that each rank has its own; {LAYOUT}"
                    )

    @override
    def settle(self, model: nn.Module) -> None:
        modules = _sharded_modules(model)
        for module in modules:
            state = _state_of(module)
            # a pass that has failed leaves its marks, with which groups would stay gathered
            if state._is_root and any(_is_running(one) for one in state._state_ctx.all_states):
                module.reset_iter_state()
        for module in modules:
            module.reshard()

    @override
    @contextmanager
    def beside_training(self, model: nn.Module, gradients: bool) -> Iterator[None]:
        # Parameters are not frozen: each group decides at every gathering by what is trainable then which dtype its
        # gradients have, and gradients of other tensors alone are asked for.
        with held(Undo()) as undo:
            undo.by(self.settle, model)
            self.settle(model)
            yield

    @override
    def entry(self, model: nn.Module, part: nn.Module) -> nn.Module:
        return model  # the root must be called first, and gathers what its own group has

    @override
    def skipping(self, layer: nn.Module) -> AbstractContextManager[object]:
        return without_hooks(layer) if isinstance(layer, FSDPModule) else nullcontext()

    @override
    def shard(self, weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
        if not isinstance(weight, DTensor):
            return None
        dim, first, _ = _place(weight)
        local = _local(weight)
        start, window = first * weight.shape[1:].numel(), None
        if dim > 0:
            start, window = 0, Window(weight.shape, dim, first, first + local.shape[dim])
        states = (getattr(optimizer, "state", {}).get(weight, {}) for optimizer in optimizers)
        moments = [value for state in states for value in state.values() if is_moment(value, weight)]
        of_last = weight.device_mesh.ndim - 1
        group = group_of_experts(weight) if is_of_experts(weight) else weight.device_mesh.get_group(of_last)
        return Shard(
            weight.shape if window is None else local.shape,
            weight.dtype,
            start,
            start + local.numel(),
            view(local, start),
            None,
            [view(_local(moment), start) for moment in moments],
            group if group.size() > 1 else None,
            window,
        )

    @override
    def own(self, tensor: Tensor) -> Own | None:
        if not isinstance(tensor, DTensor):
            return None
        dim, first, is_first = _place(tensor)
        start = first * tensor.shape[1:].numel() if dim == 0 else first
        return Own(tensor.shape, False, start, _local(tensor).view(-1), is_first, dim)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Run a module within this block without its forward hooks, of which some gather its weights."""
    with held(Undo()) as undo:
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            undo.by(setattr, module, name, getattr(module, name))
            setattr(module, name, OrderedDict())
        yield


def lacks_sharding(model: nn.Module) -> bool:
    """Tell if there is a transformers model, of which no module is sharded by ``fully_shard``."""
    return not _sharded_modules(model) and any(isinstance(module, PreTrainedModel) for module in model.modules())


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _state_of(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _places_of(one: Any) -> list[tuple[nn.Module, str]]:
    """Return the modules that have a parameter of FSDP2, with its name there: parameters may be replaced after it."""
    info = one._module_info
    return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]


def _is_running(state: Any) -> bool:
    parts = (state, *state._fsdp_param_groups)
    is_begun = state._state_ctx.iter_forward_root is not None or bool(state._modules_to_run_forward)
    return is_begun or any(part._training_state.name != "IDLE" for part in parts)


def _check_root(model: nn.Module, root: nn.Module) -> None:
    """Check that the transformers model is the outermost sharded module, through which every forward goes."""
    above = [part for part in model.modules() if isinstance(part, FSDPModule) and root in set(part.modules())]
    if above[:1] == [root] and _state_of(above[0])._is_root is not False:
        return
    what = "is not sharded itself" if not above else "is inside of another module that is sharded"
    raise UnsupportedShardingError(f"the {type(root).__name__} under FSDP2 (fully_shard) {what}; {LAYOUT}")


@torch.no_grad()
def _local(tensor: DTensor) -> Tensor:
    local: Tensor = tensor.to_local()
    return local.detach()


def _place(tensor: DTensor) -> tuple[int, int, bool]:
    """Find a rank's shard of a tensor.

    Returns:
        The dimension along which the tensor is cut, the index of the first entry, and whether no other replica of the
        shard comes before it.

    Raises:
        UnsupportedShardingError: if it is sharded in another way, or not in memory as it is.
    """
    if is_of_experts(tensor):
        return place_of_experts(tensor)
    *replicas, sharded = tensor.placements
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    are_known = len(replicas) <= 1 and all(type(replica) is Replicate for replica in replicas)
    if type(sharded) is not ShardedAlong or not are_known or coordinate is None:
        raise UnsupportedShardingError(
            f"a parameter is sharded as {tensor.placements} on {tuple(mesh.shape)} ranks; supported are shards of "
            "FSDP2 along one dimension, and replicas of these"
        )
    dim = sharded.dim % tensor.ndim
    local, length, chunk = _local(tensor), tensor.shape[dim], -(-tensor.shape[dim] // mesh.size(mesh.ndim - 1))
    first = min(coordinate[-1] * chunk, length)
    shape = (*tensor.shape[:dim], min(chunk, length - first), *tensor.shape[dim + 1 :])
    if local.shape != shape or type(local) is not Tensor or not local.is_contiguous():
        raise UnsupportedShardingError(f"the shard of a parameter of shape {list(tensor.shape)} is of an unknown form")
    return dim, first, not any(coordinate[:-1])
