"""Construction of transformers models, whole or sharded from the start, with the same weights either way."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedAlong
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.pretrained import as_value_error, check_path, pretrained_config
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PretrainedConfig


def fresh_model(config: PretrainedConfig, dtype: torch.dtype, strategy: Strategy | None = None) -> PreTrainedModel:
    """Make a causal language model with random weights, which depend on the seed and not on the sharding.

    Under ZeRO stage 3 a rank holds its shard of the weights and, one after the other, single gathered modules. Rank 0
    draws all random numbers; the others take over its random state.

    Args:
        config: a config of transformers.
        dtype: dtype of the weights.
        strategy: the Trainer's strategy, if there is one. A ``DeepSpeedStrategy`` with stage 3 shards the model.
    """
    if not _shards(strategy):
        # weights take the random numbers in the same order as they do when they are sharded
        with no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.initialize_weights()
        model.tie_weights()
        return model
    import deepspeed

    with _outside_of_init(), no_hoarding():
        # the first model of its family must not be made inside Init, which would break the decorated classes of a
        # module that is imported there
        with torch.device("meta"):
            alike = AutoModelForCausalLM.from_config(config, dtype=dtype)
        init = deepspeed.zero.Init(config_dict_or_path=strategy.config, remote_device=strategy.remote_device)
        with no_init_weights(), init:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # Init gives its dtype to buffers, too, even to frequencies of rotary embeddings
        for buffer, other in zip(model.buffers(), alike.buffers(), strict=True):
            buffer.data = buffer.data.to(other.dtype)
        with _gathered(model, dtype, strategy):
            model.initialize_weights()
        model.tie_weights()
        _broadcast(model, strategy)
    return model


def pretrained_model(path: str, dtype: torch.dtype, strategy: Strategy | None = None) -> PreTrainedModel:
    """Load the causal language model of a checkpoint (safetensors only), with the same weights for any sharding.

    Under ZeRO stage 3 a rank holds its shard of the weights and, one after the other, single gathered modules. Only
    rank 0 reads weights.

    Args:
        path: a local path or hub id.
        dtype: dtype of the weights.
        strategy: the Trainer's strategy, if there is one. A ``DeepSpeedStrategy`` with stage 3 shards the model.

    Raises:
        OSError: if there is no such checkpoint, or no safetensors in it.
        ValueError: if its config or its files cannot be used, or its weights are not those of the model.
        RankError: if another rank has failed.
    """
    if not _shards(strategy):
        return _load(path, dtype)
    with _outside_of_init(), no_hoarding():
        ranks = Ranks.current()
        with ranks.together():
            # this may fail on some ranks only, so it comes before the first collective operation
            pretrained_config(path)
        with ranks.together(), _known_to_transformers(strategy):
            model = _load(path, dtype)
        _round(model, dtype)
        _broadcast(model, strategy)
    return model


def expert_parallel_model(path: str, dtype: torch.dtype, strategy: Strategy, size: int) -> PreTrainedModel:
    """Load a checkpoint (safetensors only) so that ranks share its experts, and FSDP2 shards the rest.

    Each rank reads only what it holds.

    Args:
        path: a local path or hub id.
        dtype: dtype of the weights.
        strategy: the Trainer's strategy, whose ranks all call this: a ``ModelParallelStrategy``.
        size: number of ranks that share the experts of a layer; it divides ``ranks`` and the number of experts.

    Raises:
        OSError: if there is no such checkpoint, or no safetensors in it.
        ValueError: if its config or its files cannot be used, or its weights are not those of the model; or if there
            is another strategy, or the experts cannot be shared by so many ranks, or the files have parts of a weight
            that must be joined or split along its rows.
        RankError: if another rank has failed.
    """
    if not isinstance(strategy, ModelParallelStrategy) or strategy.world_size % size:
        raise ValueError(
            f"expert_parallel_size={size} needs ModelParallelStrategy on a multiple of {size} ranks, got "
            f"{type(strategy).__name__} on {getattr(strategy, 'world_size', 1)}"
        )
    everyone = Ranks.current()
    with everyone.together():
        # this may fail on some ranks only, so it comes before the first collective operation
        pretrained_config(path)
    with everyone.together():
        model = _load(path, dtype, distributed_config=DistributedConfig(ep_size=size, fsdp_size=strategy.world_size))
        used: Any = model._weight_conversions
        mixed = sorted(name for converter in used or () if _mixes_rows(converter) for name in converter.target_patterns)
        if mixed:
            raise ValueError(
                f"the checkpoint {path!r} has parts of the weights {first_few(mixed)}, of which transformers joins or "
                "splits wrong rows here; save it with save_original_format=False, or leave expert_parallel_size at 1"
            )
        return model


def _mixes_rows(converter: Any) -> bool:
    """Tell if rows of a converted weight are not those of the files, so that a rank cannot read its own ones alone."""
    if not isinstance(converter, WeightConverter):
        return False
    # single experts become rows, of which a rank leaves out those of others
    steps: list[Any] = [step for step in converter.operations if not isinstance(step, MergeModulelist)]
    return any(
        min(step.dim0, step.dim1) < 1 if isinstance(step, Transpose) else getattr(step, "dim", 0) < 1 for step in steps
    )


def _shards(strategy: Strategy | None) -> TypeGuard[DeepSpeedStrategy]:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3


def _load(path: str, dtype: torch.dtype, **further: Any) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, **further}
    check_path(path)
    with as_value_error(f"no model can be made of {path}"):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)
        except RuntimeError as error:
            if str(error).startswith("You set `ignore_mismatched_sizes`"):
                raise ValueError("its weights have other shapes than its config says; see the table above") from error
            raise
    model: PreTrainedModel = loaded[0]
    found = loaded[1]
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"the checkpoint {path!r} lacks {len(missing)} weights of the model: {first_few(missing)}")
    return model


def read_shards(path: str, dtype: torch.dtype, mesh: DeviceMesh) -> PreTrainedModel:
    """Load a checkpoint (safetensors only) for :func:`shard_fully`: of each weight a rank reads its own rows.

    With fewer experts than ranks, a rank reads those of all layers whole; likewise weights that the files have in parts
    which are joined or split along rows, such as the convolutions of kimi_linear.

    Args:
        path: a local path or hub id.
        dtype: dtype of the weights.
        mesh: the ranks, as a mesh of one dimension.

    Raises:
        OSError: if there is no such checkpoint, or no safetensors in it.
        ValueError: if its config or its files cannot be used, or its weights are not those of the model.
        RankError: if another rank has failed.
    """
    ranks = Ranks.current()
    with ranks.together():
        # this may fail on some ranks only, so it comes before the first collective operation
        pretrained_config(path)
    with ranks.together(), no_hoarding(), _distributed_by(partial(_cut, mesh)):
        # a config of one rank, for which transformers distributes nothing itself
        model = _load(path, dtype, distributed_config=DistributedConfig())
    del model.config.distributed_config
    return model


def _cut(mesh: DeviceMesh, model: PreTrainedModel) -> None:
    """Replace the weights of a model, which are not in memory yet, by shards: transformers reads these alone."""
    model.tie_weights()
    mixed = [converter for converter in get_model_conversion_mapping(model) if _mixes_rows(converter)]
    targets = [target for converter in mixed for target in converter.target_patterns]
    cut: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None or any(target in f"{path}.{name}" for target in targets):
                continue
            # transformers cannot stack single experts where a rank has none
            if weight.ndim > 2 and len(weight.data.chunk(mesh.size())) < mesh.size():
                continue
            if weight not in cut:
                own = weight.data.chunk(mesh.size())[mesh.get_local_rank() :][:1]
                local, shape, strides = own[0] if own else weight.data[:0], weight.shape, weight.stride()
                shard = DTensor.from_local(local, mesh, [ShardedAlong(0)], run_check=False, shape=shape, stride=strides)
                cut[weight] = nn.Parameter(shard)
            module._parameters[name] = cut[weight]


@contextmanager
def _distributed_by(cut: Callable[[PreTrainedModel], None]) -> Iterator[None]:
    """Have a function distribute what transformers makes within this block, before it reads the weights."""

    def distribute(model: PreTrainedModel, *_: Any) -> PreTrainedModel:
        cut(model)
        return model

    with held(Undo()) as undo:
        undo.by(delattr, PreTrainedModel, "maybe_distribute_model")  # the one it inherits is left
        PreTrainedModel.maybe_distribute_model = staticmethod(distribute)  # type: ignore[assignment, method-assign]
        yield


def shard_fully(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard each decoder layer of a model, and then the model, by FSDP2's ``fully_shard``.

    Whole tensors get the values of the first rank, whatever the others have drawn.

    Args:
        model: the model, of which each rank holds a copy in main memory, or on its device; or :func:`read_shards`, to
            which whole weights may have been added.
        mesh: the ranks, as a mesh of one dimension.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            value = tensor.data.to(mesh.device_type)  # the backend of the ranks may know no other device
            dist.broadcast(value, 0)
            tensor.data.copy_(value)
    for part in (*layers_to_shard(model), model):
        # FSDP2 takes the shards that come back when the model is run first
        with stand_ins(part, on_meta=True):
            fully_shard(part, mesh=mesh)


@contextmanager
def stand_ins(part: nn.Module, on_meta: bool = False) -> Iterator[None]:
    """Replace shards, whose shape libraries take for that of the weight, by zeros without memory within this block.

    Args:
        part: the module that has them.
        on_meta: whether to have weights on the meta device instead, which are contiguous.
    """
    shards: list[tuple[nn.Module, str, Any]] = [
        (module, name, weight)
        for module in part.modules()
        for name, weight in module._parameters.items()
        if isinstance(weight, DTensor)
    ]
    zeros: dict[Any, nn.Parameter] = {}
    for weight in (weight for _, _, weight in shards):
        zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        zeros[weight] = nn.Parameter(zero.to("meta").contiguous() if on_meta else zero, weight.requires_grad)
    with held(Undo()) as undo:
        for module, name, weight in shards:
            undo.by(module._parameters.__setitem__, name, weight)
            module._parameters[name] = zeros[weight]
        yield
        for weight, zero in zeros.items():
            weight.requires_grad_(zero.requires_grad)


def layers_to_shard(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers one by one: those in the outermost lists of modules."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {part for one in lists for part in one.modules() if part is not one}
    return [layer for one in lists if one not in inner for layer in one]


def constructed_whole(strategy: Strategy | None) -> AbstractContextManager[None]:
    """Construct further modules within this block as whole ones, whatever the strategy shards during construction.

    Under ZeRO stage 3 a module has empty weights as soon as its constructor has returned, and an initialisation that
    follows has no effect. DeepSpeed shards whole weights when training begins.

    Args:
        strategy: the Trainer's strategy, if there is one.
    """
    return _outside_of_init() if _shards(strategy) else nullcontext()


@contextmanager
def no_hoarding() -> Iterator[None]:
    """Return freed memory to the system at once, within this block.

    glibc keeps freed blocks of up to 32 MiB for later allocations. Between shards that stay, hardly any of these fits,
    and a rank that holds half of a model in medium-sized weights would grow by more than the whole model.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    with held(Undo()) as undo:
        if set_option is not None:
            # glibc's own choice cannot be restored; this is the largest value that it sets itself
            undo.by(set_option, threshold, 2**25)
            set_option(threshold, 2**20)
        yield


@contextmanager
def _known_to_transformers(strategy: DeepSpeedStrategy) -> Iterator[None]:
    """Have transformers shard what it loads, which it does while an object with DeepSpeed's config is alive."""
    with held(Undo()) as undo:
        config = None
        if not is_deepspeed_zero3_enabled():
            undo.by(unset_hf_deepspeed_config)
            config = HfDeepSpeedConfig(strategy.config)
        yield
        del config  # transformers holds only a weak reference to it


@contextmanager
def _outside_of_init() -> Iterator[None]:
    """Leave the ``deepspeed.zero.Init`` in which Lightning calls ``configure_model``, within this block.

    Inside of it ``torch.empty``, ``torch.arange`` and others round to the training's dtype, which breaks what
    transformers computes and broadcasts when it initialises or loads weights.
    """
    from deepspeed.runtime.zero import partition_parameters as zero

    outer, depth = zero.top_level_context, zero.zero_init_context

    def enter_again() -> None:
        while zero.zero_init_context < depth:
            outer.__enter__()

    with held(Undo()) as undo:
        undo.by(enter_again)
        for _ in range(depth):
            outer.__exit__(None, None, None)
        yield


@contextmanager
def _gathered(model: PreTrainedModel, dtype: torch.dtype, strategy: DeepSpeedStrategy) -> Iterator[None]:
    """Gather the modules that transformers initialises one by one, and have rank 0 draw their weights in ``dtype``."""
    import deepspeed

    def initialise(original: Callable[[nn.Module], None], module: nn.Module) -> None:
        # some modules initialise weights of their children
        near = [weight for part in (module, *module.children()) for weight in part.parameters(recurse=False)]
        weights = list(dict.fromkeys(near))
        if not weights:
            original(module)
            return
        with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
            if strategy.is_global_zero:
                gathered = [weight.data for weight in weights]
                for weight in weights:
                    weight.data = weight.data.to(dtype)
                original(module)
                for weight, data in zip(weights, gathered, strict=True):
                    weight.data = data.copy_(weight.data)

    parts: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    with held(Undo()) as undo:
        for part in parts:
            undo.by(vars(part).pop, "_init_weights", None)
            part._init_weights = partial(initialise, part._init_weights)
        yield


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the shards of a wider dtype to values of ``dtype``, as the trainer's precision asks for."""
    weights: list[Any] = list(model.parameters())
    for weight in weights:
        if weight.is_floating_point() and torch.finfo(dtype).bits < torch.finfo(weight.dtype).bits:
            weight.ds_tensor.copy_(weight.ds_tensor.to(dtype))


def _broadcast(model: nn.Module, strategy: DeepSpeedStrategy) -> None:
    """Broadcast the buffers and the random state of rank 0."""
    buffers = list(model.buffers())
    values, state = strategy.broadcast(([buffer.cpu() for buffer in buffers], torch.get_rng_state()))
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
    torch.set_rng_state(state)
