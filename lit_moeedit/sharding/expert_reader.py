"""Reading experts a block at a time, wherever their numbers are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import locate


class ExpertReader:
    """The experts of one layer as the model computes with them, indexed like a tensor ``[E, d_model, d_hidden]``.

    Two kinds of blocks can be read: one expert (``reader[j]``), and some output rows of all experts
    (``reader[:, first:last]``). Under ZeRO-3 each is a collective operation: every rank contributes what it owns of the
    block, so that no rank holds more than its shard and one block. Otherwise blocks are views of the weights.

    Args:
        weight: ``[E, d_model, d_hidden]``, or ``[E, d_hidden, d_model]`` if ``transposed``.
        transposed: whether the experts are stored transposed.
        ranks: the processes that read together; each reads the same blocks in the same order.

    Raises:
        UnsupportedShardingError: if the parameter cannot be read here.

    Example:
        >>> reader = ExpertReader(nn.Parameter(torch.zeros(4, 3, 2)), transposed=True)
        >>> reader.shape, reader[1].shape, reader[:, 0:1].shape
        ((4, 2, 3), torch.Size([2, 3]), torch.Size([4, 1, 3]))
    """

    def __init__(self, weight: nn.Parameter, transposed: bool = False, ranks: Ranks | None = None) -> None:
        self.ranks = ranks if ranks is not None else Ranks()
        self.transposed = transposed
        self._device = weight.device
        # without optimizers: a master copy is none of the reader's business
        self._shard = locate(weight)
        experts, rows, columns = self._shard.shape
        self.shape = (experts, columns, rows) if transposed else (experts, rows, columns)

    @torch.no_grad()
    def __getitem__(self, block: int | tuple[slice, slice]) -> Tensor:
        """``[d_model, d_hidden]`` of one expert, or ``[E, n, d_hidden]`` of all.

        Raises:
            IndexError: if there is no such block.
            RankError: if another rank failed.
        """
        experts, d_model, d_hidden = self.shape
        if isinstance(block, int):
            if not 0 <= block < experts:
                raise IndexError(f"expert must be in [0, {experts}), got {block}")
            size = d_model * d_hidden
            expert = self._columns(1, block * size, (block + 1) * size)
            return expert.view(d_hidden, d_model).T if self.transposed else expert.view(d_model, d_hidden)
        whole, part = block
        first, last, step = part.indices(d_model)
        if whole != slice(None) or step != 1 or first >= last:
            raise IndexError(f"only blocks [j] and [:, first:last] can be read, got {block}")
        if self.transposed:
            return self._columns(experts * d_hidden, first, last).view(experts, d_hidden, -1).mT
        return self._columns(experts, first * d_hidden, last * d_hidden).view(experts, -1, d_hidden)

    def _columns(self, rows: int, first: int, last: int) -> Tensor:
        """Columns ``[first, last)`` of the parameter, seen as a matrix with so many rows."""
        shard = self._shard
        own, width = shard.source.read(), shard.shape.numel() // rows
        if shard.group is None:
            return own.view(rows, width)[:, first:last]
        self.ranks.check_errors()
        # a partition that is offloaded is on the CPU, which the model's group may not serve
        block = torch.zeros(rows, last - first, dtype=own.dtype, device=self._device)
        begin, end = -(-shard.start // width), shard.stop // width  # the rows that this rank owns as a whole
        if begin < end:
            run = own[begin * width - shard.start : end * width - shard.start]
            block[begin:end] = run.view(-1, width)[:, first:last]
        cut = [(shard.start, begin * width), (end * width, shard.stop)]  # and those that it owns a part of
        for start, stop in cut if begin <= end else [(shard.start, shard.stop)]:
            row = start // width
            left, right = max(start - row * width, first), min(stop - row * width, last)
            if left < right:
                offset = row * width - shard.start
                block[row, left - first : right - first] = own[offset + left : offset + right]
        shard.exchange(block)
        return block
