"""Transactions on expert weights, sharded or not: the one place that writes parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lit_moeedit.interrupts import Undo, uninterrupted
from lit_moeedit.precision import full_precision
from lit_moeedit.sharding.backends import locate
from lit_moeedit.sharding.batches import Batch, Batches
from lit_moeedit.sharding.checks import Checks
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.rollback import Saved, Store
from lit_moeedit.sharding.shards import Copy, Shard

if TYPE_CHECKING:
    from lit_moeedit.solvers import ExpertDeltas

BLOCK = {"cpu": 2**19}
"""Elements that are changed at once, by the type of device.

A commit needs, besides its copies for the rollback, 16 bytes for each element of a block (32 in float64), and the
factors of its delta. That does not grow with the parameter.
"""
LARGE_BLOCK = 2**25
"""Elements of a block on other devices, where starting an operation takes longer than computing it.

A commit takes 512 MiB for its work then.
"""


@full_precision()
def delta_slice(deltas: ExpertDeltas, expert: int, start: int, stop: int, transposed: bool = False) -> Tensor:
    """Compute the elements ``[start, stop)`` of one expert's flattened dense change, and no row outside of them.

    Args:
        deltas: the deltas.
        expert: one of ``deltas.experts``.
        start: index of the first element, counted in the flattened ``[d_model, d_hidden]``.
        stop: index after the last element.
        transposed: whether the expert is flattened as ``[d_hidden, d_model]``.
    """
    factors = deltas.rows(expert)
    assert factors is not None
    left, right = factors
    width = (left if transposed else right).shape[1]
    first, last = start // width, -(-stop // width)
    rows = (left.T @ right[:, first:last]).T if transposed else left[:, first:last].T @ right
    return rows.reshape(-1)[start - first * width : stop - first * width]


class Transaction(Undo):
    r"""A set of weight changes that is applied as a whole, on all ranks, or not at all.

    A commit changes everything that holds the weights as one act: the model weights, be they whole or a ZeRO-3
    partition, and the optimizer's float32 master weights, if there are any. (A change of only one of them is lost with
    the optimizer's next step, or seen only after it.) The sum is taken in the precision of the master weights, and the
    model weights are ``round(master + delta)``, which is what the optimizer itself would write.

    Each rank computes the slice of ``Σ_t a_t φ_tjᵀ`` that falls in its own range. Under ZeRO stage 3 nothing is sent.
    Under stages 1 and 2, where every rank holds all model weights, the rounded weights are all-reduced once.

    Before an expert is changed, this rank's elements of it are copied, see
    :class:`~lit_moeedit.sharding.rollback.Store`. :meth:`rollback` puts them back bit by bit, and needs no other rank
    for it. Leaving the ``with`` block by any exception rolls back. What changes together with the weights can be part
    of the transaction, too: say by :meth:`by` how to undo a change before making it.

    Inside :func:`~lit_moeedit.interrupts.held`, no interrupt, and no second one while the weights are put back, leaves
    a part of the changes.

    Args:
        optimizers: the optimizers that train the weights now, as ``trainer.optimizers`` has them. None outside of
            training.
        ranks: the processes that commit together. Each calls every method with the same deltas.
        reset_moments: whether to set Adam's moments of the edited experts to zero. Kept (the default), the next steps
            push the edited weights where the gradients of the last steps pointed, as if nothing had happened. Reset,
            they forget that direction. Since the step count goes on, the first steps on those experts are then of a
            size like ``(1 - β₁) / sqrt(1 - β₂)`` times the learning rate, whatever the gradients' size.
        copies: further copies of parameters, such as averages of the weights that another part of the run keeps. The
            delta of a parameter is added to each of them in the same commit, and undone with it. Each has the
            parameter's shape, and any dtype and device.

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
        reset_moments: bool = False,
        copies: Mapping[nn.Parameter, Sequence[nn.Parameter]] | None = None,
    ) -> None:
        super().__init__()
        self.optimizers = list(optimizers)
        self.ranks = ranks or Ranks.current()
        self.reset_moments = reset_moments
        self.copies = copies or {}
        # what each commit has changed, by expert
        self._journal: list[dict[int, Saved]] = []
        self._store = Store()

    @property
    def touched(self) -> int:
        """Number of experts changed so far."""
        return sum(map(len, self._journal))

    @torch.no_grad()
    def commit(self, weight: nn.Parameter, deltas: ExpertDeltas, transposed: bool = False) -> float:
        """Add deltas to the experts of one parameter.

        The sum is taken in float32 (or float64, if either is) and rounded once to each copy's dtype.

        Args:
            weight: ``[E, d_model, d_hidden]``, or ``[E, d_hidden, d_model]`` if ``transposed``.
            deltas: the deltas to add.
            transposed: whether the experts are stored transposed.

        Returns:
            ``‖ΔW‖_F / ‖W‖_F`` over the experts that changed; 0 if none did.

        Raises:
            FloatingPointError: if a delta or a changed weight is not finite; nothing of this parameter has changed.
            UnsupportedShardingError: if the parameter cannot be written here.
            RuntimeError: if the optimizer's master weights are not those of the model.
            RankError: if another rank failed.
        """
        done, known = len(self._undos), len(self._journal)
        try:
            with self.ranks.together():
                if not deltas.is_finite():
                    raise FloatingPointError("a delta has values that are not finite")
                commit = _Commit(weight, locate(weight, self.optimizers), deltas, transposed, self._store)
                further = [
                    _Commit(copy, locate(copy), deltas, transposed, self._store, commit.saved)
                    for copy in self.copies.get(weight, ())
                ]
                # known before anything is written
                self.by(_restore, commit.saved)
                self._journal.append(commit.saved)
                for change in (commit, *further):
                    held = sum(saved.held(change.device) for entry in self._journal for saved in entry.values())
                    self._store.begin(change.device, change.size_of_copies(self.reset_moments), held)
                    change.change_own_range()
                if self.reset_moments:
                    commit.reset_moments()
            if commit.is_replicated():
                with self.ranks.together():
                    commit.all_reduce_model_weights(self.ranks)
            relative_change = commit.relative_change()
            self.ranks.check_errors()
        except BaseException:
            self.undo(done)
            raise
        # an expert that was changed before goes back to what it was at first
        first = {expert for entry in self._journal[:known] for expert, saved in entry.items() if saved.weight is weight}
        for expert in first & commit.saved.keys():
            del commit.saved[expert]
        return relative_change

    @torch.no_grad()
    def rollback(self) -> None:
        """Put back what every changed expert held before, bit by bit; an interrupt waits until that is done."""
        self.undo()
        self._forget()

    def keep(self) -> None:
        """Make the changes final, on all ranks, or on none of them if one has failed.

        Raises:
            RankError: if another rank failed.
        """
        # a rank that is interrupted in between would undo what the others keep
        with uninterrupted():
            self.ranks.check_errors()
            self._forget()

    @override
    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.rollback()
        self._forget()

    def _forget(self) -> None:
        self._undos.clear()
        self._journal.clear()
        self._store = Store()


@torch.no_grad()
def _restore(changed: dict[int, Saved]) -> None:
    """Put back what experts held. To do so twice does no harm."""
    for saved in changed.values():
        saved.restore()
    changed.clear()


class _Commit:
    """The change of one parameter by one set of deltas, on this rank, block by block.

    A further copy of a parameter adds what it changes to what is ``saved`` for the parameter.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        shard: Shard,
        deltas: ExpertDeltas,
        transposed: bool,
        store: Store,
        saved: dict[int, Saved] | None = None,
    ) -> None:
        self.weight, self.shard, self.deltas, self.transposed = weight, shard, deltas, transposed
        self.size = shard.shape[1] * shard.shape[2]
        self.saved = {expert: Saved(weight) for expert in deltas.experts} if saved is None else saved
        self.checks, self._store = Checks(shard.dtype), store

    @property
    def device(self) -> torch.device:
        """Device on which this rank holds the model weights."""
        return (self.shard.model or self.shard.master).read().device

    def size_of_copies(self, with_moments: bool) -> int:
        """Return the bytes of the copies for a rollback, if all of them are on the weights' device."""
        ranges = [self._own_range(expert * self.size, (expert + 1) * self.size) for expert in self.deltas.experts]
        own = sum(stop - start for start, stop in ranges)
        model = len(ranges) * self.size if self.is_replicated() else own
        masters = (self.shard.model is not None) + (len(self.shard.moments) if with_moments else 0)
        return model * self.shard.dtype.itemsize + masters * own * torch.float32.itemsize

    def is_replicated(self) -> bool:
        """Tell if every rank holds all model weights, though each owns only a range of the master weights."""
        shared = self.shard.group is not None and self.shard.model is not None
        return shared and len(self._model_weights()) == self.shard.shape.numel()

    def change_own_range(self) -> None:
        """Change what this rank owns, in the master weights and in the model weights, and check it."""
        master = self.shard.master.read()
        if self._is_batched(master):
            batches = Batches(self.deltas, master.device, self.transposed, LARGE_BLOCK)
            for batch in batches:
                self._add_batch(batches, batch, master.view(-1, self.size))
        else:
            for expert, first, last in self._blocks(master.device):
                start, stop = self._own_range(first, last)
                if start < stop:
                    self._add_block(expert, start, stop, master)
        self.checks.verify()
        self.shard.master.write(master)

    def all_reduce_model_weights(self, ranks: Ranks) -> None:
        """Exchange the rounded weights between ranks that own different ranges of them."""
        model = self._model_weights()
        for expert, first, last in self._blocks(self.weight.device):
            start, stop = self._own_range(first, last)
            block = torch.zeros(last - first, dtype=self.shard.dtype, device=model.device)
            block[start - first : stop - first] = model[start:stop]
            ranks.check_errors()
            self.shard.all_reduce(block)
            self._write_others(expert, first, block)

    def reset_moments(self) -> None:
        """Set this rank's moments of the changed experts to zero."""
        for moment in self.shard.moments:
            elements = moment.read()
            for expert in self.deltas.experts:
                start, stop = self._own_range(expert * self.size, (expert + 1) * self.size)
                self._save(expert, moment, elements, start, stop)
                elements[start - moment.start : stop - moment.start] = 0
            moment.write(elements)

    def relative_change(self) -> float:
        """Return ``‖ΔW‖_F / ‖W‖_F`` over the experts that changed, on all ranks together."""
        squares = self.checks.squares(self.weight.device)
        if self.shard.group is not None:
            dist.all_reduce(squares, group=self.shard.group)
        change, before = squares.tolist()
        return (change / before) ** 0.5 if before else 0.0

    def _blocks(self, device: torch.device) -> Iterator[tuple[int, int, int]]:
        """Yield the changed experts and blocks of their elements, the same on all ranks with one type of device."""
        block = BLOCK.get(device.type, LARGE_BLOCK)
        for expert in self.deltas.experts:
            for first in range(expert * self.size, (expert + 1) * self.size, block):
                yield expert, first, min(first + block, (expert + 1) * self.size)

    def _own_range(self, first: int, last: int) -> tuple[int, int]:
        """Return the part of a range that this rank owns, empty if it owns none of it."""
        start, stop = (min(max(index, self.shard.start), self.shard.stop) for index in (first, last))
        return start, stop

    def _model_weights(self) -> Tensor:
        assert self.shard.model is not None
        return self.shard.model.read()

    def _is_batched(self, master: Tensor) -> bool:
        """Tell if several experts are changed at once: one accelerator has all of them, and none fills a block."""
        on_accelerator = master.device.type not in BLOCK and self.device == master.device
        return on_accelerator and len(master) == self.shard.shape.numel() and self.size <= LARGE_BLOCK

    def _add_batch(self, batches: Batches, batch: Batch, master: Tensor) -> None:
        """Change whole experts in the master weights ``[E, n]`` and in the model weights."""
        old = self._save_rows(batch, self.shard.master, master)
        model = None
        if self.shard.model is not None:
            model = self._model_weights().view(master.shape)
            held = self._save_rows(batch, self.shard.model, model)
            self.checks.compare(batch.experts, old.to(held.dtype), held)
        delta = batches.dense(batch).view(old.shape)
        self.checks.measure(delta, old)
        new = self._add(batch.experts, old, delta)
        master.index_copy_(0, batch.rows, new.to(master.dtype))
        if model is not None:
            model.index_copy_(0, batch.rows, new.to(model.dtype))

    def _add_block(self, expert: int, start: int, stop: int, master: Tensor) -> None:
        """Change the owned range ``[start, stop)`` of one expert in the master weights and in the model weights."""
        old = master[start - self.shard.start : stop - self.shard.start]
        offset = expert * self.size
        delta = delta_slice(self.deltas, expert, start - offset, stop - offset, self.transposed).to(old.device)
        self.checks.measure(delta, old)
        new = self._add([expert], old[None], delta[None])[0]
        if self.shard.model is not None:
            model = self._model_weights()
            held = model[start - self.shard.model.start : stop - self.shard.model.start]
            self.checks.compare([expert], old.to(held)[None], held[None])
            self._save(expert, self.shard.model, model, start, stop)
            held.copy_(new)
        self._save(expert, self.shard.master, master, start, stop)
        old.copy_(new)

    def _add(self, experts: list[int], old: Tensor, delta: Tensor) -> Tensor:
        """Return the sum ``[n, k]`` for ``n`` experts, in the place of the delta if its precision is enough."""
        precision = torch.promote_types(torch.promote_types(old.dtype, delta.dtype), torch.float32)
        new = delta.to(precision).add_(old)
        self.checks.change(experts, new.to(self.shard.dtype))
        return new

    def _save(self, expert: int, copy: Copy, elements: Tensor, start: int, stop: int) -> None:
        """Save the range ``[start, stop)`` of the flattened parameter, out of the elements that ``copy`` read."""
        self.saved[expert].add(copy, start, self._store.copy(elements[start - copy.start : stop - copy.start]))

    def _save_rows(self, batch: Batch, copy: Copy, elements: Tensor) -> Tensor:
        """Save the experts of a batch, and return them where ``elements [E, n]`` are."""
        kept = self._store.copy_rows(elements, batch.rows, batch.experts)
        for expert, row in zip(batch.experts, kept, strict=True):
            self.saved[expert].add(copy, expert * self.size, row)
        return kept if isinstance(kept, Tensor) else elements[batch.rows]

    def _write_others(self, expert: int, first: int, block: Tensor) -> None:
        """Write what other ranks own of the block that begins at ``first`` into the model weights."""
        assert self.shard.model is not None
        model, last = self._model_weights(), first + len(block)
        start, stop = self._own_range(first, last)
        for begin, end in ((first, start), (stop, last)) if start < stop else ((first, last),):
            if begin < end:
                self._save(expert, self.shard.model, model, begin, end)
                model[begin:end] = block[begin - first : end - first]
