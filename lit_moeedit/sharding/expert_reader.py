"""Blocks of experts, read from sharded weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_moeedit.sharding.backends import locate
from lit_moeedit.sharding.ranks import Ranks


class ExpertReader:
    """The model weights of one layer's experts, indexed like a tensor ``[E, d_model, d_hidden]``.

    Two types of blocks can be read: one expert (``reader[j]``), and some output rows of all experts
    (``reader[:, first:last]``). Under ZeRO stage 3 each is a collective operation: every rank contributes what it owns
    of the block, so that no rank holds more than its shard and one block. Otherwise blocks are views of the weights.

    Args:
        weight: ``[E, d_model, d_hidden]``, or ``[E, d_hidden, d_model]`` if ``transposed``.
        transposed: whether the experts are stored transposed.
        ranks: the processes that read together. Each reads the same blocks in the same order.

    Raises:
        UnsupportedShardingError: if the parameter cannot be read here.

    Example:
        >>> reader = ExpertReader(nn.Parameter(torch.zeros(4, 3, 2)), transposed=True)
        >>> reader.shape, reader[1].shape, reader[:, 0:1].shape
        ((4, 2, 3), torch.Size([2, 3]), torch.Size([4, 1, 3]))
    """

    def __init__(self, weight: nn.Parameter, transposed: bool = False, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks.current()
        self.transposed = transposed
        self._device = weight.device
        # without optimizers, because the reader needs no master weights
        self._shard = locate(weight)
        experts, rows, columns = self._shard.whole_shape
        self.shape = (experts, columns, rows) if transposed else (experts, rows, columns)

    @torch.no_grad()
    def __getitem__(self, block: int | tuple[slice, slice]) -> Tensor:
        """Read ``[d_model, d_hidden]`` of one expert, or ``[E, n, d_hidden]`` of all experts.

        Raises:
            IndexError: if there is no such block.
            RankError: if another rank failed.
        """
        experts, d_model, d_hidden = self.shape
        if isinstance(block, int):
            if not 0 <= block < experts:
                raise IndexError(f"expert must be in [0, {experts}), got {block}")
            size = d_model * d_hidden
            if self._shard.window is None:
                expert = self._columns(1, block * size, (block + 1) * size)
            else:
                expert = self._from_windows(slice(block, block + 1), *map(range, self._shard.whole_shape[1:]))
            return expert.view(d_hidden, d_model).T if self.transposed else expert.view(d_model, d_hidden)
        whole, part = block
        first, last, step = part.indices(d_model)
        if whole != slice(None) or step != 1 or first >= last:
            raise IndexError(f"only blocks [j] and [:, first:last] can be read, got {block}")
        if self._shard.window is not None:
            ranges = range(first, last), range(d_hidden)
            stored = self._from_windows(slice(0, experts), *(reversed(ranges) if self.transposed else ranges))
            return stored.mT if self.transposed else stored
        if self.transposed:
            return self._columns(experts * d_hidden, first, last).view(experts, d_hidden, -1).mT
        return self._columns(experts, first * d_hidden, last * d_hidden).view(experts, -1, d_hidden)

    def _from_windows(self, experts: slice, rows: range, columns: range) -> Tensor:
        """Read ``[n, rows, columns]`` of some experts as they are stored."""
        shard, window = self._shard, self._shard.window
        assert window is not None
        own = shard.master.read().view(shard.shape)[experts]
        self.ranks.check_errors()
        block = torch.zeros(len(own), len(rows), len(columns), dtype=own.dtype, device=self._device)
        wanted = (rows, columns)[window.dim - 1]
        first, last = max(wanted.start, window.start), min(wanted.stop, window.stop)
        if first < last:
            other = (columns, rows)[window.dim - 1]
            held = own.narrow(window.dim, first - window.start, last - first)
            held = held.narrow(3 - window.dim, other.start, len(other))
            block.narrow(window.dim, first - wanted.start, last - first).copy_(held)
        shard.all_reduce(block)
        return block

    def _columns(self, rows: int, first: int, last: int) -> Tensor:
        """Read the columns ``[first, last)`` of the parameter, seen as a matrix with ``rows`` rows."""
        shard = self._shard
        own, width = shard.master.read(), shard.shape.numel() // rows
        if shard.group is None:
            return own.view(rows, width)[:, first:last]
        self.ranks.check_errors()
        # an offloaded partition is on the CPU, which the backend of the model's group may not support
        block = torch.zeros(rows, last - first, dtype=own.dtype, device=self._device)
        begin, end = -(-shard.start // width), shard.stop // width  # the rows that this rank owns completely
        if begin < end:
            run = own[begin * width - shard.start : end * width - shard.start]
            block[begin:end] = run.view(-1, width)[:, first:last]
        cut = [(shard.start, begin * width), (end * width, shard.stop)]  # and those that it owns in part
        for start, stop in cut if begin <= end else [(shard.start, shard.stop)]:
            row = start // width
            left, right = max(start - row * width, first), min(stop - row * width, last)
            if left < right:
                offset = row * width - shard.start
                block[row, left - first : right - first] = own[offset + left : offset + right]
        shard.all_reduce(block)
        return block
