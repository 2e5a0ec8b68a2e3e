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
from contextlib import contextmanager
from typing import Any

import torch
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
from lit_moeedit.sharding.shards import Own, Shard, UnsupportedShardingError

LAYOUT = "call fully_shard on each decoder layer and then on the transformers model itself"


class FSDP2(Backend):
    """Parameters that ``fully_shard`` has sharded along their first dimension, on all ranks or on groups of them.

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
        sharded: set[int] = set()
        for state in map(_state_of, _sharded_modules(model)):
            for group in state._fsdp_param_groups:
                if isinstance(group.offload_policy, CPUOffloadPolicy):
                    raise UnsupportedShardingError(
                        "FSDP2 with CPUOffloadPolicy is not supported; keep the shards on the device"
                    )
                if group._use_post_forward_mesh:
                    raise UnsupportedShardingError(
                        "FSDP2 with a number for reshard_after_forward is not supported; use true or false"
                    )
                sharded.update(id(parameter) for one in group.fsdp_params for parameter in _parameters_of(one))
                for one in group.fsdp_params:
                    _place(one.sharded_param)
        for name, weight in model.named_parameters():
            if id(weight) not in sharded and (isinstance(weight, DTensor) or weight.requires_grad) and inner:
                what = "sharded by something else" if isinstance(weight, DTensor) else "trained, but not sharded"
                raise UnsupportedShardingError(
                    f"{name} is {what} in a model under FSDP2, so that each rank has its own; {LAYOUT}"
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
    @contextmanager
    def skipping(self, layer: nn.Module) -> Iterator[None]:
        with held(Undo()) as undo:
            for name in ("_forward_pre_hooks", "_forward_hooks") if isinstance(layer, FSDPModule) else ():
                undo.by(setattr, layer, name, getattr(layer, name))
                setattr(layer, name, OrderedDict())
            yield

    @override
    def shard(self, weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
        if not isinstance(weight, DTensor):
            return None
        start, _ = _place(weight)
        local = _local(weight)
        states = (getattr(optimizer, "state", {}).get(weight, {}) for optimizer in optimizers)
        moments = [value for state in states for value in state.values() if is_moment(value, weight)]
        of_last = weight.device_mesh.ndim - 1
        group = group_of_experts(weight) if is_of_experts(weight) else weight.device_mesh.get_group(of_last)
        return Shard(
            weight.shape,
            weight.dtype,
            start,
            start + local.numel(),
            view(local, start),
            None,
            [view(_local(moment), start) for moment in moments],
            group if group.size() > 1 else None,
        )

    @override
    def own(self, tensor: Tensor) -> Own | None:
        if not isinstance(tensor, DTensor):
            return None
        start, is_first = _place(tensor)
        return Own(tensor.shape, False, start, _local(tensor).view(-1), is_first)


def lacks_sharding(model: nn.Module) -> bool:
    """Tell if there is a transformers model, of which no module is sharded by ``fully_shard``."""
    return not _sharded_modules(model) and any(isinstance(module, PreTrainedModel) for module in model.modules())


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _state_of(module: FSDPModule) -> Any:
    return module._get_fsdp_state()


def _parameters_of(one: Any) -> list[nn.Parameter]:
    """Return the parameter that FSDP2 trains, the gathered one if there is one, and what the modules have now."""
    # FSDP2 takes over weights that were read into the modules when the first forward begins
    info = one._module_info
    places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
    found = [one.sharded_param, getattr(one, "_unsharded_param", None)]
    found += [module._parameters.get(name) for module, name in places]
    return [parameter for parameter in found if parameter is not None]


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


def _place(tensor: DTensor) -> tuple[int, bool]:
    """Return where a rank's shard begins in the flattened tensor, and whether no other replica comes before it.

    Raises:
        UnsupportedShardingError: if the shard is not a run of the flattened tensor, or not in memory as it is.
    """
    if is_of_experts(tensor):
        return place_of_experts(tensor)
    *replicas, sharded = tensor.placements
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    is_known = type(sharded) is ShardedAlong and sharded.dim == 0 and all(type(x) is Replicate for x in replicas)
    if not is_known or len(replicas) > 1 or coordinate is None:
        raise UnsupportedShardingError(
            f"a parameter is sharded as {tensor.placements} on {tuple(mesh.shape)} ranks; supported are shards of "
            "FSDP2 along the first dimension, and replicas of these"
        )
    local, size = _local(tensor), mesh.size(mesh.ndim - 1)
    chunk = -(-tensor.shape[0] // size)
    first = min(coordinate[-1] * chunk, tensor.shape[0])
    if len(local) != min(chunk, tensor.shape[0] - first) or type(local) is not Tensor or not local.is_contiguous():
        raise UnsupportedShardingError(f"the shard of a parameter of shape {list(tensor.shape)} is of an unknown form")
    return first * tensor.shape[1:].numel(), not any(coordinate[:-1])
