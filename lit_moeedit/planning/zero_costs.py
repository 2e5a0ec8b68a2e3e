"""Memory and communication of DeepSpeed and the optimizer: between steps, in a step, at the start, in a checkpoint.

The formulas follow DeepSpeed 0.19. Names of its functions and settings say where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lit_moeedit.planning.fake_tensors import Cost
from lit_moeedit.planning.simulated_zero import Sharding, gathered_together

FLOAT = 4
"""Bytes of an element of master weights and Adam's moments."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, in elements.

    Attributes:
        parameters: number of elements of all weights.
        largest: number of elements of the largest weight.
        block: maximum number of elements that ZeRO stage 3 gathers together; 0 in other stages.
    """

    parameters: int
    largest: int
    block: int

    @classmethod
    def of(cls, model: nn.Module, sharding: Sharding) -> ModelSize:
        """Return the sizes of a model, real or fake."""
        sizes = [weight.numel() for weight in model.parameters()]
        together = gathered_together(model) if sharding.stage == 3 else []
        return cls(sum(sizes), max(sizes), max((sum(w.numel() for w in weights) for _, weights in together), default=0))


# -- between steps ----------------------------------------------------------------------------------------------------


def weights_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of the model weights: a shard of them in stage 3, else all."""
    shards = sharding.ranks if sharding.stage == 3 else 1
    return _share(model.parameters, shards) * sharding.itemsize


def master_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of the optimizer's float32 master weights."""
    return _share(model.parameters, sharding.shards) * FLOAT if sharding.has_master else 0


def adam_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of Adam's two moments, which its first step creates."""
    itemsize = FLOAT if sharding.has_master else sharding.itemsize
    return 2 * _share(model.parameters, sharding.shards) * itemsize


def buffers_size(model: ModelSize, sharding: Sharding) -> int:
    """Return the bytes of the buffers for gradients that are kept between steps."""
    if sharding.stage == 3:
        # grad_partitions_flat_buffer, and the bucket in which gradients are averaged
        return weights_size(model, sharding) + sharding.bucket * sharding.itemsize
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
    all_weights, owned = model.parameters * sharding.itemsize, _share(model.parameters, sharding.shards)
    peak, sent = weights, 0
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
    weights, owned = model.parameters * sharding.itemsize, _share(model.parameters, sharding.shards)
    gradients, sent = passes.peak - passes.held, passes.sent
    if sharding.stage == 3:
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
    replicated = 0 if sharding.stage == 3 else weights_size(model, sharding)
    written = replicated + master_size(model, sharding) + adam_size(model, sharding)
    # tensors on another device go through main memory
    host = 0 if sharding.on_cpu else group_size(model, sharding) * FLOAT
    return Cost("checkpoint", held, held, host, written=written)


def _share(count: int, parts: int) -> int:
    return -(-count // parts)
