"""Replacement of experts by those of another copy of the same parameter, such as the base of an edited model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lit_moeedit.sharding.backends import locate
from lit_moeedit.sharding.rollback import Saved, Store
from lit_moeedit.sharding.shards import UnsupportedShardingError
from lit_moeedit.sharding.transaction import Transaction


@torch.no_grad()
def replace_experts(
    transaction: Transaction, weight: nn.Parameter, source: nn.Parameter, experts: Iterable[int]
) -> None:
    """Write the experts of another parameter into a parameter, in its model weights and master weights, bit by bit.

    Each rank writes what it holds. The change is part of the transaction, which undoes it if it fails.

    Args:
        transaction: the transaction, entered.
        weight: the parameter to change, ``[E, n, m]``.
        source: the parameter to read, of the same shape and dtype: whole on each rank, or sharded alike.
        experts: indices of the experts to replace.

    Raises:
        ValueError: if the source has another shape or dtype; nothing has changed.
        UnsupportedShardingError: if a parameter cannot be read or written here, or this rank lacks elements of the
            source.
        RankError: if another rank failed.
    """
    with transaction.ranks.together():
        shard, other = locate(weight, transaction.optimizers), locate(source)
        if (other.whole_shape, other.dtype) != (shard.whole_shape, shard.dtype):
            raise ValueError(
                f"expected a copy of the experts {list(shard.whole_shape)} in {shard.dtype}, "
                f"got {list(other.whole_shape)} in {other.dtype}"
            )
        held = other.model or other.master
        elements, store = held.read(), Store()
        if shard.window is not None and other.group is None:
            elements = shard.window.of(elements)
        elif shard.window != other.window:
            raise UnsupportedShardingError("the base is sharded along another dimension than the model")
        size = shard.shape[1] * shard.shape[2]
        saved = {expert: Saved(weight) for expert in experts}
        transaction.by(_restore, saved)
        for copy in filter(None, (shard.master, shard.model)):
            own = copy.read()
            for expert in saved:
                start = max(expert * size, copy.start)
                stop = min((expert + 1) * size, copy.start + len(own))
                if start >= stop:
                    continue
                if start < held.start or stop > held.start + len(elements):
                    raise UnsupportedShardingError(
                        "this rank holds other elements of the base than of the model; "
                        "shard both alike, or give the base whole on each rank"
                    )
                part = own[start - copy.start : stop - copy.start]
                saved[expert].add(copy, start, store.copy(part))
                part.copy_(elements[start - held.start : stop - held.start])
            copy.write(own)


@torch.no_grad()
def _restore(saved: dict[int, Saved]) -> None:
    for expert in saved.values():
        expert.restore()
    saved.clear()
