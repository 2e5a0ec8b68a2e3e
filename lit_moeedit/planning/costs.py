"""From sizes to costs: one function for each phase of a run, and the order they come in."""

from __future__ import annotations

from dataclasses import replace

from lit_moeedit.planning.sizes import Cost, EditSize, ModelSize, Passes, TrainingSize
from lit_moeedit.sharding.rehearsal import Sharding
from lit_moeedit.sharding.weights import BLOCK, Way

FLOAT = 4
"""Bytes of a number in master copies, Adam's moments, second moments, features and deltas."""
EIGH = 9
"""``9 n³`` operations find all eigenvalues and eigenvectors of a symmetric matrix (Golub and Van Loan, section 8.3)."""


def plan_costs(
    model: ModelSize, sharding: Sharding, training: TrainingSize, edit: EditSize, passes: Passes
) -> list[Cost]:
    """What every phase takes on one rank, in the order of a run that edits behind some training step.

    Args:
        model: sizes of the model.
        sharding: how it is sharded.
        training: the training step.
        edit: the edit.
        passes: what the passes through the model take.
    """
    held = held_in_training(model, sharding)
    step = training_cost(model, sharding, passes, held)
    statistics = statistics_cost(model, sharding, edit, passes, held)
    # the sums of all layers are there until the edit has ended
    held += moments_size(model, edit)
    targets = targets_cost(model, sharding, edit, passes, held)
    held += targets_size(model, edit)
    # the last layer finds deltas and saved weights of all others
    before = len(edit.layers) - 1
    held += before * deltas_size(model, edit)
    saved = saved_size(model, sharding, edit)
    held, host = (held + before * saved, 0) if sharding.on_cpu else (held, before * saved)
    features = features_cost(model, sharding, edit, passes, held, host)
    solve = solve_cost(model, sharding, edit, held + keys_size(model, sharding, edit), host)
    commits = [
        commit_cost(model, sharding, edit, held + deltas_size(model, edit), host, way) for way in _ways(sharding)
    ]
    return [
        loading_cost(model, sharding),
        step,
        statistics,
        targets,
        features,
        solve,
        *commits,
        checkpoint_cost(model, sharding),
    ]


def _ways(sharding: Sharding) -> tuple[Way, ...]:
    return ("local", "gather") if sharding.shards > 1 else ("local",)


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


# -- loading and training ---------------------------------------------------------------------------------------------


def loading_cost(model: ModelSize, sharding: Sharding) -> Cost:
    """Making the model and, under DeepSpeed, the engine and its optimizer."""
    weights, master, share = weights_size(model, sharding), master_size(model, sharding), sharding.shards
    numbers = _share(model.parameters, share)
    if sharding.stage == 3:
        group = group_size(model, sharding) * FLOAT
        peak = max(
            # one block is gathered through a buffer to be filled
            weights + 2 * model.block * sharding.itemsize,
            2 * weights,  # defragment() copies all shards to one buffer
            weights + master + group,  # a group's master is made and then cloned; later its first gradient is of zeros
            # the hooks of the first module gather its weights
            weights + master + buffers_size(model, sharding),
        )
        # each weight is sent to all when it is made, gathered and sent to all when it is filled, which fresh ones are
        # twice (by their module and by the one above it), and gathered when the hooks are set
        times = 4 if model.pretrained else 6
        sent = times * _sent(model.parameters * sharding.itemsize, sharding.ranks)
    elif sharding.stage in (1, 2):
        # the weights are copied to one buffer; then the master and a first gradient of zeros are made
        peak = max(2 * weights, weights + master + numbers * FLOAT)
        sent = _sent(weights, sharding.ranks)  # the first rank's weights
    elif sharding.has_master:
        # FP16_UnfusedOptimizer makes a step without gradients: for that, it has gradients of zeros twice
        peak, sent = weights + master + adam_size(model, sharding) + weights + numbers * FLOAT, 0
    else:
        peak, sent = weights, 0
    # pretrained weights are read to main memory: by the first rank, or by all that keep them whole
    return Cost("loading", 0, peak, host=0 if sharding.on_cpu else model.parameters * sharding.itemsize, sent=sent)


def group_size(model: ModelSize, sharding: Sharding) -> int:
    """Numbers that a rank's optimizer updates at once: groups are closed when they have reached ``sub_group_size``."""
    numbers = _share(model.parameters, sharding.ranks)
    return min(numbers, sharding.sub_group + _share(model.largest, sharding.ranks))


def training_cost(model: ModelSize, sharding: Sharding, passes: Passes, held: int) -> Cost:
    """One training step: the passes, or the optimizer's step, whichever needs more."""
    ranks, sent = sharding.ranks, passes.training.sent
    weights, gradients = model.parameters * sharding.itemsize, passes.training.peak
    owned = _share(model.parameters, sharding.shards) * sharding.itemsize
    if sharding.stage == 3:
        # a group's gradients are copied to one tensor, and this to float32
        group = group_size(model, sharding)
        step = group * FLOAT + (group * sharding.itemsize if sharding.itemsize < FLOAT else 0)
    elif sharding.stage in (1, 2):
        # the owned gradients, a copy of them in one tensor, and this in float32
        step = 2 * owned + (_share(model.parameters, ranks) * FLOAT if sharding.itemsize < FLOAT else 0)
        if sharding.stage == 1 and not sharding.overlap:
            # all gradients, while they are moved through the bucket to those owned
            gradients = max(gradients, weights + owned)
            sent += 2 * _sent(weights, ranks)
        sent += _sent(weights, ranks)  # the new weights
    else:
        # the gradients, and in float32
        step = weights + (model.parameters * FLOAT if sharding.has_master else 0)
        sent += 2 * _sent(weights, ranks)
    # Adam: some ten operations for each number
    flops = passes.training.flops + 10 * _share(model.parameters, sharding.shards)
    return Cost("training step", held, held + max(gradients, step), sent=sent, flops=flops)


# -- the edit ---------------------------------------------------------------------------------------------------------


def moments_size(model: ModelSize, edit: EditSize) -> int:
    """``Σ k kᵀ`` in float32 for every expert of every edited layer, the same on all ranks."""
    return len(edit.layers) * model.experts * model.d_hidden**2 * FLOAT if edit.preserve else 0


def targets_size(model: ModelSize, edit: EditSize) -> int:
    """Target vectors, and the hidden states that the prompts are to reach."""
    return (edit.edits + edit.prompts) * model.d_model * FLOAT


def keys_size(model: ModelSize, sharding: Sharding, edit: EditSize) -> int:
    """Keys and hidden states of all prompts, on every rank, and the residuals."""
    pairs = edit.prompts * model.active
    return pairs * model.d_hidden * sharding.itemsize + 2 * edit.prompts * model.d_model * FLOAT


def deltas_size(model: ModelSize, edit: EditSize) -> int:
    """Factors of a layer's deltas: a row for each prompt, and a shaped feature for each pair."""
    rows = edit.prompts * model.active if edit.passes else edit.prompts
    return (rows * model.d_model + edit.prompts * model.active * model.d_hidden) * FLOAT


def saved_size(model: ModelSize, sharding: Sharding, edit: EditSize) -> int:
    """What a transaction saves of a layer's changed experts: the numbers that this rank has, in every copy."""
    own, working = owned_numbers(model, sharding, edit), 0
    if sharding.has_master:
        working = own * sharding.itemsize
    source = own * (FLOAT if sharding.has_master else sharding.itemsize)
    moments = 2 * own * FLOAT if edit.reset_moments else 0
    return source + working + moments


def owned_numbers(model: ModelSize, sharding: Sharding, edit: EditSize) -> int:
    """Numbers of a layer's changed experts that the rank with the most of them owns.

    Stage 3 splits every weight; stages 1 and 2 split the row of all weights, so that a layer can be one rank's alone.
    """
    numbers = edit.changed(model) * model.d_model * model.d_hidden
    return _share(numbers, sharding.ranks) if sharding.stage == 3 else numbers


def statistics_cost(model: ModelSize, sharding: Sharding, edit: EditSize, passes: Passes, held: int) -> Cost:
    """Rounds of forwards up to the highest edited layer, whose keys are added up; then the ranks' sums are."""
    if not edit.preserve:
        return Cost("statistics", held, held)
    moments = moments_size(model, edit)
    rounds = _share(-(-edit.texts // edit.text_batch()), sharding.ranks)
    sent = rounds * passes.statistics.sent + 2 * _sent(moments, sharding.ranks)
    return Cost(
        "statistics", held, held + moments + passes.statistics.peak, sent=sent, flops=rounds * passes.statistics.flops
    )


def targets_cost(model: ModelSize, sharding: Sharding, edit: EditSize, passes: Passes, held: int) -> Cost:
    """Rounds of batches of edits: all steps, unless all edits of a round are done before."""
    rounds = _share(-(-edit.edits // edit.target_batch(sharding.ranks)), sharding.ranks)

    def total(what: str) -> int:
        before, forward, step = (getattr(part, what) for part in (passes.before, passes.forward, passes.step))
        return rounds * int(before + edit.steps * step + forward)

    peak = held + max(passes.before.peak, passes.step.peak)
    return Cost("targets", held, peak, sent=total("sent"), flops=total("flops"))


def features_cost(model: ModelSize, sharding: Sharding, edit: EditSize, passes: Passes, held: int, host: int) -> Cost:
    """Forwards up to the target layer, once for every edited layer; all ranks get all keys."""
    rounds = _share(-(-edit.prompts // edit.feature_batch(sharding.ranks)), sharding.ranks)
    keys = keys_size(model, sharding, edit)
    # a rank's keys, padded, as a list from all ranks, together, and in order
    gathered = 3 * keys if sharding.ranks > 1 else keys
    return Cost(
        "features",
        held,
        held + max(passes.features.peak, gathered),
        host=host,
        sent=len(edit.layers) * (rounds * passes.features.sent + _sent(keys, sharding.ranks)),
        flops=len(edit.layers) * rounds * passes.features.flops,
    )


def solve_cost(model: ModelSize, sharding: Sharding, edit: EditSize, held: int, host: int) -> Cost:
    """Every rank solves the same problem; the first one's solution is sent to all."""
    experts, prompts, pairs = edit.changed(model), edit.prompts, edit.prompts * model.active
    matrix = experts * model.d_hidden**2
    features = pairs * model.d_hidden * FLOAT
    # C_j, its eigenvectors, these scaled, and their product: each for all visited experts at once
    shaping = 4 * matrix * FLOAT if edit.preserve else 0
    shaping_flops = matrix * model.d_hidden * (EIGH + 2) + 4 * pairs * model.d_hidden**2 if edit.preserve else 0
    per_expert = pairs / experts
    if edit.passes:
        # for every expert the factor of its system, its kernel and the rows of its delta
        system = int(2 * pairs * per_expert) * FLOAT + pairs * model.d_model * FLOAT
        once = pairs * per_expert * (2 * model.d_hidden + per_expert)
        flops = int(once + edit.passes * 8 * pairs * per_expert * model.d_model)
    else:
        # G with its Cholesky factor, and A
        system = 2 * prompts**2 * FLOAT + prompts * model.d_model * FLOAT
        flops = int(2 * pairs * per_expert * model.d_hidden + prompts**3 / 3 + 2 * prompts**2 * model.d_model)
    # gated keys and features; then the shaping matrices, the features and the system
    matrices = matrix * FLOAT if edit.preserve else 0
    peak = held + features + max(shaping, matrices + features + system)
    layers = len(edit.layers)
    return Cost(
        "solve",
        held,
        peak,
        host=host,
        sent=layers * _sent(deltas_size(model, edit), sharding.ranks),
        flops=layers * (flops + shaping_flops),
    )


def commit_cost(model: ModelSize, sharding: Sharding, edit: EditSize, held: int, host: int, way: Way) -> Cost:
    """Changing the experts block by block, after what the rank has of them was saved."""
    experts, itemsize = edit.changed(model), sharding.itemsize
    numbers = experts * model.d_model * model.d_hidden
    saved = saved_size(model, sharding, edit)
    block = min(BLOCK, model.d_model * model.d_hidden)
    # of a block: the delta and its rows, the sum and the last one, both rounded twice, and a mask
    blocks = block * (3 * FLOAT + 2 * itemsize + 1)
    sent, changed = 0, _share(numbers, sharding.shards)
    if way == "gather":
        blocks += block * FLOAT
        sent, changed = 2 * _sent(numbers * FLOAT, sharding.ranks), numbers
    elif sharding.stage in (1, 2):
        sent = 2 * _sent(numbers * itemsize, sharding.ranks)
    # a delta of one expert is a product of its pairs' rows
    flops = int(2 * changed * edit.prompts * model.active / experts)
    layers = len(edit.layers)
    cost = Cost(f"commit ({way})", held, held + blocks, sent=layers * sent, flops=layers * flops)
    if sharding.on_cpu:
        return replace(cost, peak=cost.peak + saved)
    return replace(cost, host=host + saved)


def checkpoint_cost(model: ModelSize, sharding: Sharding) -> Cost:
    """Tensors are written from where they are; a tensor of another device goes through main memory."""
    held = held_in_training(model, sharding)
    master, adam = master_size(model, sharding), adam_size(model, sharding)
    weights = 0 if sharding.stage == 3 else _share(weights_size(model, sharding), sharding.ranks)
    host = 0 if sharding.on_cpu else group_size(model, sharding) * FLOAT
    return Cost("checkpoint", held, held, host=host, written=weights + master + adam)


def _share(count: int, parts: int) -> int:
    return -(-count // parts)


def _sent(size: int, ranks: int) -> int:
    """What each rank sends in an all-gather or a reduce-scatter of ``size`` bytes, or hands on in a broadcast."""
    return size * (ranks - 1) // ranks
