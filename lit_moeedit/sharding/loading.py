"""Making a transformers model, whole or sharded while it is made, with the same weights either way."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from lit_moeedit.pretrained import blamed_on, check_path, pretrained_config
from lit_moeedit.sharding.ranks import Ranks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from transformers import PretrainedConfig


def fresh_model(config: PretrainedConfig, dtype: torch.dtype, strategy: Strategy | None = None) -> PreTrainedModel:
    """A causal language model with random weights: one seed gives the same weights however they are sharded.

    Under ZeRO stage 3 a rank holds its shard of the weights and, one after the other, single modules of them. Rank 0
    draws all random numbers; the others take over its random state.

    Args:
        config: of transformers.
        dtype: of the weights.
        strategy: of the Trainer, if there is one; a ``DeepSpeedStrategy`` with stage 3 shards the model.
    """
    if not _shards(strategy):
        # random numbers go into the weights alone, as they do when these are sharded
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.initialize_weights()
        model.tie_weights()
        return model
    import deepspeed

    with _outside_of_init(), no_hoarding():
        # the first model of its family must not be made in the context, which would spoil the decorated classes of a
        # module that is imported there
        with torch.device("meta"):
            alike = AutoModelForCausalLM.from_config(config, dtype=dtype)
        init = deepspeed.zero.Init(config_dict_or_path=strategy.config, remote_device=strategy.remote_device)
        with no_init_weights(), init:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        # the context gives its dtype to buffers, too, even to frequencies of rotary embeddings
        for buffer, other in zip(model.buffers(), alike.buffers(), strict=True):
            buffer.data = buffer.data.to(other.dtype)
        with _gathered(model, dtype, strategy):
            model.initialize_weights()
        model.tie_weights()
        _broadcast(model, strategy)
    return model


def pretrained_model(path: str, dtype: torch.dtype, strategy: Strategy | None = None) -> PreTrainedModel:
    """The causal language model of a checkpoint (safetensors only): the same weights however they are sharded.

    Under ZeRO stage 3 a rank holds its shard of the weights and, one after the other, single modules of them. Only
    rank 0 reads weights.

    Args:
        path: a local path or hub id.
        dtype: of the weights.
        strategy: of the Trainer, if there is one; a ``DeepSpeedStrategy`` with stage 3 shards the model.

    Raises:
        OSError: if there is no such checkpoint, or no safetensors in it.
        ValueError: if its config or its files cannot be used, or its weights are not those of the model.
        RankError: if another rank has failed.
    """
    if not _shards(strategy):
        return _load(path, dtype)
    with _outside_of_init(), no_hoarding():
        ranks = Ranks()
        with ranks.together():
            # what may fail on some ranks alone, before they depend on each other
            pretrained_config(path)
        with ranks.together(), _known_to_transformers(strategy):
            model = _load(path, dtype)
        _round(model, dtype)
        _broadcast(model, strategy)
    return model


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, however little of it this rank holds at the moment."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _shards(strategy: Strategy | None) -> TypeGuard[DeepSpeedStrategy]:
    return isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3


def _load(path: str, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    check_path(path)
    with blamed_on(f"no model can be made of {path}"):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)
        except RuntimeError as error:
            if str(error).startswith("You set `ignore_mismatched_sizes`"):
                raise ValueError("its weights have other shapes than its config says; see the table above") from error
            raise
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise ValueError(f"the checkpoint {path!r} lacks {len(missing)} weights of the model: {shown}")
    return model


@contextmanager
def no_hoarding() -> Iterator[None]:
    """Memory that is freed goes back to the system at once.

    glibc keeps freed blocks of up to 32 MiB for later ones; but between shards that stay hardly any of these fits, and
    a rank that holds half of a model in medium-sized weights would grow by more than the whole of it.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is None:
        yield
        return
    threshold = -3  # M_MMAP_THRESHOLD in malloc.h
    set_option(threshold, 2**20)
    try:
        yield
    finally:
        # it cannot be left to glibc again; this is the largest of the values that glibc itself sets
        set_option(threshold, 2**25)


@contextmanager
def _known_to_transformers(strategy: DeepSpeedStrategy) -> Iterator[None]:
    """Transformers shards what it loads while an object with DeepSpeed's config is alive."""
    if is_deepspeed_zero3_enabled():
        yield
        return
    config = HfDeepSpeedConfig(strategy.config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


@contextmanager
def _outside_of_init() -> Iterator[None]:
    """Lightning calls ``configure_model`` in a ``deepspeed.zero.Init``: a model is made in one, but not filled in one.

    There ``torch.empty``, ``torch.arange`` and others round to the training's dtype, which breaks what transformers
    computes and sends between ranks.
    """
    from deepspeed.runtime.zero import partition_parameters as zero

    outer, depth = zero.top_level_context, zero.zero_init_context
    for _ in range(depth):
        outer.__exit__(None, None, None)
    try:
        yield
    finally:
        for _ in range(depth):
            outer.__enter__()


@contextmanager
def _gathered(model: PreTrainedModel, dtype: torch.dtype, strategy: DeepSpeedStrategy) -> Iterator[None]:
    """Modules that transformers initialises are gathered one by one, and rank 0 draws their weights in ``dtype``."""
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
    for part in parts:
        part._init_weights = partial(initialise, part._init_weights)
    try:
        yield
    finally:
        for part in parts:
            del part._init_weights


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Values of ``dtype`` in shards of a wider one: what the trainer's precision asks for."""
    weights: list[Any] = list(model.parameters())
    for weight in weights:
        if weight.is_floating_point() and torch.finfo(dtype).bits < torch.finfo(weight.dtype).bits:
            weight.ds_tensor.copy_(weight.ds_tensor.to(dtype))


def _broadcast(model: nn.Module, strategy: DeepSpeedStrategy) -> None:
    """Give all ranks the buffers and the random state of rank 0."""
    buffers = list(model.buffers())
    values, state = strategy.broadcast(([buffer.cpu() for buffer in buffers], torch.get_rng_state()))
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
    torch.set_rng_state(state)
