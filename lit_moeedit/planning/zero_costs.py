"""Memory and communication of DeepSpeed, FSDP2 and the optimizer: between steps, in a step, at start, in a checkpoint.

The formulas follow DeepSpeed 0.19 and torch 2.13. Names of its functions and settings say where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lit_moeedit.models.experts import find_model
from lit_moeedit.planning.fake_tensors import Cost
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.simulated_fsdp2 import shard_size, weights_together
from lit_moeedit.planning.simulated_zero import gathered_together

FLOAT = 4
"""Bytes of an element of master weights and Adam's moments."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, in elements.

    Attributes:
        parameters: number of elements of all weights.
        largest: number of elements of the largest weight.
        block: maximum number of elements that ZeRO stage 3 or FSDP2 gathers together; 0 without these.
        shard: number of elements of a rank's shards under FSDP2, with their padding; 0 without it.
    """

    parameters: int
    largest: int
    block: int
    shard: int = 0

    @classmethod
    def of(cls, model: nn.Module, sharding: Sharding) -> ModelSize:
        """Return the sizes of a model, real or fake."""
        sizes = [weight.numel() for weight in model.parameters()]
        if sharding.fsdp2:
            groups = [
                sum(shard_size(weight, sharding.ranks) for weight in weights)
                for _, weights in weights_together(find_model(model))
            ]
            return cls(sum(sizes), max(sizes), sharding.ranks * max(groups), sum(groups))
        together = gathered_together(model) if sharding.stage == 3 else []
        return cls(sum(sizes), max(sizes), max((sum(w.numel() for w in weights) for _, weights in together), default=0))


# -- between steps ----------------------------------------------------------------------------------------------------


def weights_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of the model weights: a shard of them in stage 3, else all."""
    return (_owned(model, sharding) if sharding.has_shards else model.parameters) * sharding.itemsize


def master_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of the optimizer's float32 master weights."""
    return _owned(model, sharding) * FLOAT if sharding.has_master else 0


def adam_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of Adam's two moments, which its first step creates."""
    itemsize = FLOAT if sharding.has_master else sharding.itemsize
    return 2 * _owned(model, sharding) * itemsize


def buffers_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of gradients, and of buffers for them, that are kept between steps."""
    if sharding.stage == 3:
        # grad_partitions_flat_buffer, and the bucket in which gradients are averaged
        return weights_size(model, sharding) + sharding.bucket * sharding.itemsize
    if sharding.fsdp2:
        return weights_size(model, sharding)  # the gradients, which the next backward pass replaces
    if sharding.stage is None and sharding.ranks > 1:
        return model.parameters * sharding.itemsize  # the buckets of DistributedDataParallel
    return 0


def held_in_training(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes that a rank holds between two training steps."""
    return sum(size(model, sharding) for size in (weights_size, master_size, adam_size, buffers_size))


# -- phases -----------------------------------------------------------------------------------------------------------


def building_cost(model: ModelSize, sharding: Sharding, pretrained: bool) -> Cost:
    """Compute the cost of making the model and, under DeepSpeed, the engine and its optimizer."""
    weights, master = weights_size(model, sharding), master_size(model, sharding)
    all_weights, owned = model.parameters * sharding.itemsize, _owned(model, sharding)
    peak, sent = weights, 0
    if sharding.fsdp2:
        # the first rank's weights are broadcast, and then each layer is sharded
        sent = sharding.part(all_weights)
        if sharding.on_cpu:
            return Cost("building", 0, all_weights + model.block // sharding.ranks * sharding.itemsize, sent=sent)
        return Cost("building", 0, weights + model.block * sharding.itemsize, host=all_weights, sent=sent)
    if sharding.stage == 3:
        peak = max(
            # one block is gathered through a buffer to be initialised
            weights + 2 * model.block * sharding.itemsize,
            2 * weights,  # defragment() copies all shards to one buffer
            # a group's master weights are made and then cloned; later its first gradient is of zeros
            weights + master + group_size(model, sharding) * FLOAT,
            # the hooks of the first module gather its weights
            weights + master + buffers_size(model, sharding),
        )
        # each weight is broadcast when it is made, gathered and broadcast when it is initialised, which fresh weights
        # are twice (by their module and by its parent), and gathered when the hooks are registered
        sent = (4 if pretrained else 6) * sharding.part(all_weights)
    elif sharding.stage in (1, 2):
        # the weights are copied to one buffer; then the master weights and a first gradient of zeros are made; the
        # first rank's weights are broadcast
        peak, sent = max(2 * weights, weights + master + owned * FLOAT), sharding.part(weights)
    elif sharding.has_master:
        # FP16_UnfusedOptimizer makes a step without gradients, for which it makes gradients of zeros twice
        peak, sent = 2 * weights + master + adam_size(model, sharding) + owned * FLOAT, sharding.part(weights)
    # weights are read to main memory, by the first rank or by all that hold them whole
    return Cost("building", 0, peak, host=all_weights if pretrained and not sharding.on_cpu else 0, sent=sent)


def group_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the number of elements that a rank's optimizer updates at once: groups end at ``sub_group_size``."""
    elements = _share(model.parameters, sharding.ranks)
    return min(elements, sharding.sub_group + _share(model.largest, sharding.ranks))


def training_cost(model: ModelSize, sharding: Sharding, passes: Cost) -> Cost:
    """Compute the cost of a training step, whose peak is in its passes or in the optimizer's step.

    Args:
        model: sizes of the model.
        sharding: sharding of the model.
        passes: cost of the forward and the backward pass.
    """
    half = sharding.itemsize < FLOAT
    weights, owned = model.parameters * sharding.itemsize, _owned(model, sharding)
    gradients, sent = passes.peak - passes.held, passes.sent
    if sharding.fsdp2:
        step = 0  # in place
    elif sharding.stage == 3:
        # a group's gradients are copied to one tensor, and that to float32
        group = group_size(model, sharding)
        step = group * (FLOAT + sharding.itemsize if half else FLOAT)
    elif sharding.stage in (1, 2):
        # the owned gradients, a copy of them in one tensor, and that in float32
        step = 2 * owned * sharding.itemsize + (owned * FLOAT if half else 0)
        if sharding.stage == 1 and not sharding.overlap:
            # all gradients, while they are moved through the bucket to those owned
            gradients = max(gradients, weights + owned * sharding.itemsize)
            sent += 2 * sharding.part(weights)
        sent += sharding.part(weights)  # the new weights
    else:
        # the gradients, and in float32
        step = weights + (model.parameters * FLOAT if sharding.has_master else 0)
        sent += 2 * sharding.part(weights)
    # Adam: about ten operations per element
    return replace(passes, peak=passes.held + max(gradients, step), sent=sent, flops=passes.flops + 10 * owned)


def checkpoint_cost(model: ModelSize, sharding: Sharding) -> Cost:
    """Compute the cost of a checkpoint for the first rank, which writes its shard and all replicated weights."""
    held = held_in_training(model, sharding)
    # the shards of FSDP2 are the masters; those of stage 3 are rounded from them, and are not written
    replicated = 0 if sharding.stage == 3 else weights_size(model, sharding)
    written = replicated + master_size(model, sharding) + adam_size(model, sharding)
    # tensors on another device go through main memory
    host = 0 if sharding.on_cpu else group_size(model, sharding) * FLOAT
    return Cost("checkpoint", held, held, host, written=written)


def _owned(model: ModelSize, sharding: Sharding) -> int:
    """Return the number of elements whose optimizer's state a rank holds."""
    return model.shard if sharding.fsdp2 else _share(model.parameters, sharding.shards)


def _share(count: int, parts: int) -> int:
    return -(-count // parts)
