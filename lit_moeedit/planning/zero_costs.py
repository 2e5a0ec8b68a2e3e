"""What DeepSpeed and the optimizer take: between steps, when the model is made, in a step, and in a checkpoint.

The formulas follow DeepSpeed 0.19; the names of its functions and settings are where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from lit_moeedit.planning.fake_tensors import Cost
from lit_moeedit.planning.simulated_zero import Sharding, gathered_together

FLOAT = 4
"""Bytes of a number in master copies and Adam's moments."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, in numbers.

    Attributes:
        parameters: in all weights.
        largest: in the largest weight.
        block: in the weights that ZeRO stage 3 gathers together, at most; 0 in other stages.
    """

    parameters: int
    largest: int
    block: int

    @classmethod
    def of(cls, model: nn.Module, sharding: Sharding) -> ModelSize:
        """The sizes of a model, with or without numbers."""
        sizes = [weight.numel() for weight in model.parameters()]
        together = gathered_together(model) if sharding.stage == 3 else []
        return cls(sum(sizes), max(sizes), max((sum(w.numel() for w in weights) for _, weights in together), default=0))


# -- what is there all the time ---------------------------------------------------------------------------------------


def weights_size(model: ModelSize, sharding: Sharding) -> int:
    """The weights that the model computes with: a shard of them in stage 3, else all."""
    shards = sharding.ranks if sharding.stage == 3 else 1
    return _share(model.parameters, shards) * sharding.itemsize


def master_size(model: ModelSize, sharding: Sharding) -> int:
    """The optimizer's float32 copy of the weights."""
    return _share(model.parameters, sharding.shards) * FLOAT if sharding.has_master else 0


def adam_size(model: ModelSize, sharding: Sharding) -> int:
    """Two moments of each number that the optimizer updates, made by its first step."""
    itemsize = FLOAT if sharding.has_master else sharding.itemsize
    return 2 * _share(model.parameters, sharding.shards) * itemsize


def buffers_size(model: ModelSize, sharding: Sharding) -> int:
    """What the optimizer keeps for gradients between steps."""
    if sharding.stage == 3:
        # grad_partitions_flat_buffer, and the bucket in which gradients are averaged
        return weights_size(model, sharding) + sharding.bucket * sharding.itemsize
    if sharding.stage is None and sharding.ranks > 1:
        return model.parameters * sharding.itemsize  # the buckets of DistributedDataParallel
    return 0


def held_in_training(model: ModelSize, sharding: Sharding) -> int:
    """What a rank holds between two training steps."""
    return (
        weights_size(model, sharding)
        + master_size(model, sharding)
        + adam_size(model, sharding)
        + buffers_size(model, sharding)
    )


# -- phases -----------------------------------------------------------------------------------------------------------


def building_cost(model: ModelSize, sharding: Sharding, pretrained: bool) -> Cost:
    """Making the model and, under DeepSpeed, the engine and its optimizer."""
    weights, master = weights_size(model, sharding), master_size(model, sharding)
    all_weights, owned = model.parameters * sharding.itemsize, _share(model.parameters, sharding.shards)
    peak, sent = weights, 0
    if sharding.stage == 3:
        peak = max(
            # one block is gathered through a buffer to be filled
            weights + 2 * model.block * sharding.itemsize,
            2 * weights,  # defragment() copies all shards to one buffer
            # a group's master is made and then cloned; later its first gradient is of zeros
            weights + master + group_size(model, sharding) * FLOAT,
            # the hooks of the first module gather its weights
            weights + master + buffers_size(model, sharding),
        )
        # each weight is sent to all when it is made, gathered and sent to all when it is filled, which fresh ones are
        # twice (by their module and by the one above it), and gathered when the hooks are set
        sent = (4 if pretrained else 6) * sharding.part(all_weights)
    elif sharding.stage in (1, 2):
        # the weights are copied to one buffer; then the master and a first gradient of zeros are made
        peak, sent = max(2 * weights, weights + master + owned * FLOAT), sharding.part(weights)  # the first rank's
    elif sharding.has_master:
        # FP16_UnfusedOptimizer makes a step without gradients: for that, it has gradients of zeros twice
        peak, sent = 2 * weights + master + adam_size(model, sharding) + owned * FLOAT, sharding.part(weights)
    # read to main memory: by the first rank, or by all that keep them whole
    return Cost("building", 0, peak, host=all_weights if pretrained and not sharding.on_cpu else 0, sent=sent)


def group_size(model: ModelSize, sharding: Sharding) -> int:
    """Numbers that a rank's optimizer updates at once: groups are closed when they have reached ``sub_group_size``."""
    numbers = _share(model.parameters, sharding.ranks)
    return min(numbers, sharding.sub_group + _share(model.largest, sharding.ranks))


def training_cost(model: ModelSize, sharding: Sharding, passes: Cost) -> Cost:
    """One training step: its passes, or the optimizer's step, whichever needs more.

    Args:
        model: sizes of the model.
        sharding: how it is sharded.
        passes: what the forward and the backward pass take.
    """
    half = sharding.itemsize < FLOAT
    weights, owned = model.parameters * sharding.itemsize, _share(model.parameters, sharding.shards)
    gradients, sent = passes.peak - passes.held, passes.sent
    if sharding.stage == 3:
        # a group's gradients are copied to one tensor, and this to float32
        group = group_size(model, sharding)
        step = group * (FLOAT + sharding.itemsize if half else FLOAT)
    elif sharding.stage in (1, 2):
        # the owned gradients, a copy of them in one tensor, and this in float32
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
    # Adam: some ten operations for each number
    return replace(passes, peak=passes.held + max(gradients, step), sent=sent, flops=passes.flops + 10 * owned)


def checkpoint_cost(model: ModelSize, sharding: Sharding) -> Cost:
    """What the first rank writes: its shard, and what all of them have."""
    held = held_in_training(model, sharding)
    weights = 0 if sharding.stage == 3 else weights_size(model, sharding)
    # a tensor is written from where it is; one of another device goes through main memory
    host = 0 if sharding.on_cpu else group_size(model, sharding) * FLOAT
    return Cost(
        "checkpoint", held, held, host, written=weights + master_size(model, sharding) + adam_size(model, sharding)
    )


def _share(count: int, parts: int) -> int:
    return -(-count // parts)
