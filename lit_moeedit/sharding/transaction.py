"""The one place that reads or writes parameters: expert weights are changed in a transaction, sharded or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_moeedit.precision import full_precision
from lit_moeedit.sharding.batches import Batch, Batches, Terms
from lit_moeedit.sharding.checks import Checks
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.rollback import Saved, Store
from lit_moeedit.sharding.shards import Copy, Shard, locate

Way = Literal["local", "gather"]

BLOCK = {"cpu": 2**19}
"""Numbers that are changed at once, by the kind of device; :data:`LARGE_BLOCK` on others.

What a commit needs besides its copies for the rollback does not grow with the parameter: for each number of a block 16
bytes, or 32 in float64, and the factors of its delta.
"""
LARGE_BLOCK = 2**25
"""A block where starting an operation takes longer than computing it: 512 MiB for the work of a commit."""


class Deltas(Terms, Protocol):
    """What a commit needs to know of low-rank deltas: the experts that change, and each one's factors."""

    @property
    def experts(self) -> list[int]:
        """Experts that change, the same on all ranks."""
        ...

    def rows(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """Factors ``(left [M, d_model], right [M, d_hidden])`` of one expert's change ``leftᵀ right``."""
        ...

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        ...


@full_precision()
def delta_slice(deltas: Deltas, expert: int, start: int, stop: int, transposed: bool = False) -> Tensor:
    """The numbers ``[start, stop)`` of one expert's flattened dense change; no row outside of them is computed.

    Args:
        deltas: what to take from.
        expert: one of ``deltas.experts``.
        start: first number, counted in the flattened ``[d_model, d_hidden]``.
        stop: behind the last number.
        transposed: whether the expert is flattened as ``[d_hidden, d_model]``.
    """
    factors = deltas.rows(expert)
    assert factors is not None
    left, right = factors
    width = (left if transposed else right).shape[1]
    first, last = start // width, -(-stop // width)
    rows = (left.T @ right[:, first:last]).T if transposed else left[:, first:last].T @ right
    return rows.reshape(-1)[start - first * width : stop - first * width]


class Transaction:
    r"""A set of weight changes that is applied as a whole, on all ranks, or not at all.

    A commit changes everything that holds the weights as one act: the copy that the model computes with, be it whole
    or a ZeRO-3 partition, and the optimizer's float32 master copy, if there is one. (A change of only one of them is
    lost with the optimizer's next step, or seen only after it.) The sum is taken in the precision of the master, and
    the working copy is ``round(master + delta)``, which is what the optimizer itself would write.

    Before an expert is changed, this rank's numbers of it are copied, see
    :class:`~lit_moeedit.sharding.rollback.Store`; :meth:`rollback` puts them back bit by bit, and needs no other rank
    for it. Leaving the ``with`` block by an exception rolls back, whatever it is.

    Args:
        optimizers: those that train the weights now, as ``trainer.optimizers`` has them; none outside of training.
        ranks: the processes that commit together; each calls every method with the same deltas.
        way: how to commit what is partitioned. ``local``: each rank computes the slice of ``Σ_t a_t φ_tjᵀ`` that falls
            in its own partition; under ZeRO-3 nothing is sent, under ZeRO-1 and -2 the rounded weights are, once.
            ``gather``: one expert after the other is gathered, changed, and scattered again.
        reset_moments: whether to set Adam's moments of the edited experts to zero. Kept (the default), the next steps
            push the edited weights where the gradients of the last steps pointed, as if nothing had happened. Reset,
            they forget that direction; since the step count goes on, the first steps on those experts are then of a
            size like ``(1 - β₁) / sqrt(1 - β₂)`` times the learning rate, whatever the gradients' size.

    Raises:
        ValueError: if ``way`` is unknown.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, 3, 4))
        >>> with Transaction() as transaction:
        ...     transaction.touched
        0
    """

    def __init__(
        self,
        optimizers: Sequence[Any] = (),
        ranks: Ranks | None = None,
        way: Way = "local",
        reset_moments: bool = False,
    ) -> None:
        if way not in get_args(Way):
            raise ValueError(f"way must be one of {', '.join(get_args(Way))}, got {way!r}")
        self.optimizers = list(optimizers)
        self.ranks = ranks if ranks is not None else Ranks()
        self.way, self.reset_moments = way, reset_moments
        # what each commit changes, by expert, known here before anything is written
        self._journal: list[dict[int, Saved]] = []
        self._store = Store()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.rollback()
        except KeyboardInterrupt:  # between the lines that hold one back
            self.rollback()
            raise
        self._forget()

    @property
    def touched(self) -> int:
        """Number of experts changed so far."""
        return sum(map(len, self._journal))

    @torch.no_grad()
    def commit(self, weight: nn.Parameter, deltas: Deltas, transposed: bool = False) -> float:
        """Add deltas to the experts of one parameter.

        The sum is taken in float32 (or float64, if either is) and rounded once to each copy's dtype.

        Args:
            weight: ``[E, d_model, d_hidden]``, or ``[E, d_hidden, d_model]`` if ``transposed``.
            deltas: what to add.
            transposed: whether the experts are stored transposed.

        Returns:
            ``‖ΔW‖_F / ‖W‖_F`` over the experts that changed; 0 if none did.

        Raises:
            FloatingPointError: if a delta or a changed weight is not finite; nothing of this parameter has changed.
            UnsupportedShardingError: if the parameter cannot be written here.
            RuntimeError: if the optimizer's master copy is not that of the weights.
            RankError: if another rank failed.
        """
        done = len(self._journal)
        try:
            with self.ranks.together():
                if not deltas.is_finite():
                    raise FloatingPointError("a delta has values that are not finite")
                commit = _Commit(weight, locate(weight, self.optimizers), deltas, transposed, self._store)
                held = sum(saved.held(commit.device) for entry in self._journal for saved in entry.values())
                self._journal.append(commit.saved)
                self._store.begin(commit.device, commit.size_of_copies(self.reset_moments), held)
                if self.way == "local" or commit.shard.group is None:
                    commit.add_own()
            if commit.shard.group is not None:
                with self.ranks.together():
                    if self.way == "local":
                        commit.send_working(self.ranks)
                    else:
                        commit.gather_and_add(self.ranks)
            if self.reset_moments:
                with self.ranks.together():
                    commit.reset_moments()
            change = commit.relative_change()
            self.ranks.check_errors()
        except BaseException:
            self._restore(done)
            raise
        # an expert that was changed before goes back to what it was at first
        first = {expert for entry in self._journal[:done] for expert, saved in entry.items() if saved.weight is weight}
        for expert in first & commit.saved.keys():
            del commit.saved[expert]
        return change

    @torch.no_grad()
    def rollback(self) -> None:
        """Put back what every changed expert held before, bit by bit; an interrupt waits until that is done."""
        self._restore(0)
        self._forget()

    def _restore(self, commits: int) -> None:
        """Undo all but so many commits, the last first. To put something back twice does no harm."""
        interrupt: KeyboardInterrupt | None = None
        while len(self._journal) > commits:
            try:
                for saved in self._journal[-1].values():
                    saved.restore()
                self._journal.pop()
            except KeyboardInterrupt as caught:
                interrupt = caught
        if interrupt is not None:
            raise interrupt

    def _forget(self) -> None:
        self._journal.clear()
        self._store = Store()


class _Commit:
    """The change of one parameter by one set of deltas, on this rank, block by block."""

    def __init__(self, weight: nn.Parameter, shard: Shard, deltas: Deltas, transposed: bool, store: Store) -> None:
        self.weight, self.shard, self.deltas, self.transposed = weight, shard, deltas, transposed
        self.size = shard.shape[1] * shard.shape[2]
        self.saved: dict[int, Saved] = {expert: Saved(weight) for expert in deltas.experts}
        self.checks, self._store = Checks(shard.dtype), store

    @property
    def device(self) -> torch.device:
        """Device on which this rank holds the weights that the model computes with."""
        return (self.shard.working or self.shard.source).read().device

    def size_of_copies(self, with_moments: bool) -> int:
        """Bytes of the copies for a rollback, if all of them are on the weights' device."""
        parts = [self._own_part(expert * self.size, (expert + 1) * self.size) for expert in self.deltas.experts]
        own = sum(stop - start for start, stop in parts)
        working = len(parts) * self.size if self._is_shared() else own
        masters = (self.shard.working is not None) + (len(self.shard.moments) if with_moments else 0)
        return working * self.shard.dtype.itemsize + masters * own * torch.float32.itemsize

    def add_own(self) -> None:
        """Change what this rank owns, in the source and in the working copy, and check it."""
        source = self.shard.source.read()
        if self._is_batched(source):
            batches = Batches(self.deltas, source.device, self.transposed, LARGE_BLOCK)
            for batch in batches:
                self._add_batch(batches, batch, source.view(-1, self.size))
        else:
            for expert, first, last in self._blocks(source.device):
                start, stop = self._own_part(first, last)
                if start < stop:
                    self._write(expert, start, source, self._sum(expert, start, source[self._within(start, stop)]))
        self.checks.verify()
        self.shard.source.write(source)

    def send_working(self, ranks: Ranks) -> None:
        """Give each other the rounded weights, where every rank computes with all of them."""
        if not self._is_shared():
            return
        working = self._working()
        for expert, first, last in self._blocks(self.weight.device):
            start, stop = self._own_part(first, last)
            whole = torch.zeros(last - first, dtype=self.shard.dtype, device=working.device)
            whole[start - first : stop - first] = working[start:stop]
            ranks.check_errors()
            self.shard.exchange(whole)
            self._write_others(expert, first, whole)

    def gather_and_add(self, ranks: Ranks) -> None:
        """Gather the source, change it, and keep what this rank needs of it."""
        source = self.shard.source.read()
        for expert, first, last in self._blocks(self.weight.device):
            start, stop = self._own_part(first, last)
            # an offloaded master is on the CPU, which the model's group may not serve
            whole = torch.zeros(last - first, dtype=source.dtype, device=self.weight.device)
            whole[start - first : stop - first] = source[self._within(start, stop)]
            ranks.check_errors()
            self.shard.exchange(whole)
            new = self._sum(expert, first, whole)
            self._write(expert, start, source, new[start - first : stop - first])
            if self._is_shared():
                self._write_others(expert, first, new.to(self.shard.dtype))
        self.checks.verify()
        self.shard.source.write(source)

    def reset_moments(self) -> None:
        """Set this rank's moments of the changed experts to zero."""
        for moment in self.shard.moments:
            numbers = moment.read()
            for expert in self.deltas.experts:
                start, stop = self._own_part(expert * self.size, (expert + 1) * self.size)
                self._keep(expert, moment, numbers, start, stop)
                numbers[start - moment.start : stop - moment.start] = 0
            moment.write(numbers)

    def relative_change(self) -> float:
        """``‖ΔW‖_F / ‖W‖_F`` over the experts that changed, on all ranks together."""
        squares = self.checks.squares(self.weight.device)
        if self.shard.group is not None:
            dist.all_reduce(squares, group=self.shard.group)
        change, before = squares.tolist()
        return (change / before) ** 0.5 if before else 0.0

    def _blocks(self, device: torch.device) -> Iterator[tuple[int, int, int]]:
        """The changed experts and runs of their numbers, the same on all ranks for the same kind of device."""
        block = BLOCK.get(device.type, LARGE_BLOCK)
        for expert in self.deltas.experts:
            for first in range(expert * self.size, (expert + 1) * self.size, block):
                yield expert, first, min(first + block, (expert + 1) * self.size)

    def _own_part(self, first: int, last: int) -> tuple[int, int]:
        """What this rank owns of a run; empty if that is nothing."""
        start, stop = (min(max(number, self.shard.start), self.shard.stop) for number in (first, last))
        return start, stop

    def _within(self, start: int, stop: int) -> slice:
        return slice(start - self.shard.start, stop - self.shard.start)

    def _is_shared(self) -> bool:
        """Whether every rank computes with all of the weights, though each owns a part of them only."""
        shared = self.shard.group is not None and self.shard.working is not None
        return shared and len(self._working()) == self.shard.shape.numel()

    def _working(self) -> Tensor:
        assert self.shard.working is not None
        return self.shard.working.read()

    def _is_batched(self, source: Tensor) -> bool:
        """Tell if several experts are changed at once: one accelerator has all of them, and none fills a block."""
        on_accelerator = source.device.type not in BLOCK and self.device == source.device
        return on_accelerator and len(source) == self.shard.shape.numel() and self.size <= LARGE_BLOCK

    def _add_batch(self, batches: Batches, batch: Batch, source: Tensor) -> None:
        """Change whole experts in the source ``[E, n]`` and in the working copy."""
        old = self._keep_rows(batch, self.shard.source, source)
        working = None if self.shard.working is None else self._working().view(source.shape)
        if self.shard.working is not None and working is not None:
            held = self._keep_rows(batch, self.shard.working, working)
            self.checks.compare(batch.experts, old.to(held.dtype), held)
        delta = batches.dense(batch).view(old.shape)
        self.checks.measure(delta, old)
        new = self._add(batch.experts, old, delta)
        source.index_copy_(0, batch.rows, new.to(source.dtype))
        if working is not None:
            working.index_copy_(0, batch.rows, new.to(working.dtype))

    def _sum(self, expert: int, start: int, old: Tensor) -> Tensor:
        """``old``, the run of the source that begins at ``start``, with the delta added."""
        stop, offset = start + len(old), expert * self.size
        delta = delta_slice(self.deltas, expert, start - offset, stop - offset, self.transposed).to(old.device)
        first, last = (x - start for x in self._own_part(start, stop))
        self.checks.measure(delta[first:last], old[first:last])
        return self._add([expert], old[None], delta[None])[0]

    def _add(self, experts: list[int], old: Tensor, delta: Tensor) -> Tensor:
        """The sum, in the place of the delta if its precision is enough, ``[n, k]`` for ``n`` experts."""
        precision = torch.promote_types(torch.promote_types(old.dtype, delta.dtype), torch.float32)
        new = delta.to(precision).add_(old)
        self.checks.change(experts, new.to(self.shard.dtype))
        return new

    def _write(self, expert: int, start: int, source: Tensor, new: Tensor) -> None:
        """Write an owned run that begins at ``start`` into the source and the working copy."""
        stop = start + len(new)
        own, working = self._within(start, stop), self.shard.working
        if working is not None:
            numbers = self._working()
            held = slice(start - working.start, stop - working.start)
            if start < stop:
                self.checks.compare([expert], source[own].to(numbers)[None], numbers[held][None])
            self._keep(expert, working, numbers, start, stop)
        self._keep(expert, self.shard.source, source, start, stop)
        source[own] = new
        if working is not None:
            numbers[held] = new

    def _keep(self, expert: int, copy: Copy, numbers: Tensor, start: int, stop: int) -> None:
        """Copy the run ``[start, stop)`` of the flattened parameter, of what ``copy`` read."""
        self.saved[expert].add(copy, start, self._store.copy(numbers[start - copy.start : stop - copy.start]))

    def _keep_rows(self, batch: Batch, copy: Copy, numbers: Tensor) -> Tensor:
        """Copy the experts of a batch; gives them where ``numbers [E, n]`` are."""
        kept = self._store.copy_rows(numbers, batch.rows, batch.experts)
        for expert, row in zip(batch.experts, kept, strict=True):
            self.saved[expert].add(copy, expert * self.size, row)
        return kept if isinstance(kept, Tensor) else numbers[batch.rows]

    def _write_others(self, expert: int, first: int, whole: Tensor) -> None:
        """Write what other ranks own of the run that begins at ``first`` into the working copy."""
        assert self.shard.working is not None
        working, last = self._working(), first + len(whole)
        start, stop = self._own_part(first, last)
        for begin, end in ((first, start), (stop, last)) if start < stop else ((first, last),):
            if begin < end:
                self._keep(expert, self.shard.working, working, begin, end)
                working[begin:end] = whole[begin - first : end - first]
