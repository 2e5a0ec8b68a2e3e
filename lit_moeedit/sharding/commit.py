"""The change of one parameter on one rank: what it owns of the sum is computed, checked and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_moeedit.precision import full_precision
from lit_moeedit.sharding.backends import locate
from lit_moeedit.sharding.batches import Batch, Batches
from lit_moeedit.sharding.checks import Checks
from lit_moeedit.sharding.history import EditSum
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
def delta_slice(
    deltas: ExpertDeltas,
    expert: int,
    start: int,
    stop: int,
    transposed: bool = False,
    like: Tensor | None = None,
) -> Tensor:
    """Compute the elements ``[start, stop)`` of one expert's flattened dense change, and no row outside of them.

    Args:
        deltas: the deltas.
        expert: one of ``deltas.experts``.
        start: index of the first element, counted in the flattened ``[d_model, d_hidden]``.
        stop: index after the last element.
        transposed: whether the expert is flattened as ``[d_hidden, d_model]``.
        like: a tensor with the device and the dtype in which to compute; by default those of the factors.
    """
    factors = deltas.rows(expert)
    assert factors is not None
    left, right = factors if like is None else (factor.to(like) for factor in factors)
    width = (left if transposed else right).shape[1]
    first, last = start // width, -(-stop // width)
    rows = (left.T @ right[:, first:last]).T if transposed else left[:, first:last].T @ right
    return rows.reshape(-1)[start - first * width : stop - first * width]


class Commit:
    """The change of one parameter, on this rank, block by block.

    A further copy of a parameter adds what it changes to what is ``saved`` for the parameter. A change that is exact
    (summed in float64) is made expert by expert on every device, so that it can be made again with the same result.

    Attributes:
        given: the deltas of whole experts.
        deltas: the deltas of the window of each expert to which the shard refers.
        before: what this rank held, on the CPU, of the experts that no ``earlier`` change has touched; only of exact
            changes.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        shard: Shard,
        deltas: Sequence[ExpertDeltas],
        transposed: bool,
        store: Store,
        is_exact: bool = False,
        earlier: EditSum | None = None,
        saved: dict[int, Saved] | None = None,
    ) -> None:
        self.weight, self.shard, self.given, self.transposed = weight, shard, deltas, transposed
        self.deltas = self._in_window(deltas)
        self.is_exact, self.earlier = is_exact, earlier
        self._all_deltas = (*self._in_window(() if earlier is None else earlier.deltas), *self.deltas)
        self.size = shard.shape[1] * shard.shape[2]
        self.experts = sorted({expert for change in deltas for expert in change.experts})
        self.saved = {expert: Saved(weight) for expert in self.experts} if saved is None else saved
        self.before: dict[int, Tensor] = {}
        self.checks, self._store = Checks(shard.dtype), store

    def of_copy(self, copy: nn.Parameter, is_equal: bool) -> Commit:
        """Return the same change of a copy; one that is equal to the parameter gets the same result."""
        shard = locate(copy)
        own, other = ((x.start, x.stop, x.window) for x in (self.shard, shard))
        is_alike = is_equal and own == other
        earlier = self.earlier if is_alike else None
        return Commit(copy, shard, self.given, self.transposed, self._store, self.is_exact, earlier, self.saved)

    @property
    def device(self) -> torch.device:
        """Device on which this rank holds the model weights."""
        return (self.shard.model or self.shard.master).read().device

    def size_of_copies(self, with_moments: bool) -> int:
        """Return the bytes of the copies for a rollback, if all of them are on the weights' device."""
        ranges = [self._own_range(expert * self.size, (expert + 1) * self.size) for expert in self.experts]
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
        self._keep_base(master)
        if self._is_batched(master):
            batches = Batches(self.deltas[0], master.device, self.transposed, LARGE_BLOCK)
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
            for expert in self.experts:
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

    def _in_window(self, deltas: Sequence[ExpertDeltas]) -> list[ExpertDeltas]:
        """Return the deltas of what the shard stands for."""
        window = self.shard.window
        return [change if window is None else window.narrowed(change, self.transposed) for change in deltas]

    def _blocks(self, device: torch.device) -> Iterator[tuple[int, int, int]]:
        """Yield the changed experts and blocks of their elements, the same on all ranks with one type of device."""
        block = self.shard.block or BLOCK.get(device.type, LARGE_BLOCK)
        for expert in self.experts:
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
        return (
            on_accelerator
            and not self.is_exact
            and len(master) == self.shard.shape.numel()
            and self.size <= LARGE_BLOCK
        )

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
        delta = self._delta(self.deltas, expert, start, stop, old.device)
        self.checks.measure(delta, old)
        base = old
        if self.earlier is not None and (elements := (self.earlier.elements or {}).get(expert)) is not None:
            first = start - self._own_range(expert * self.size, (expert + 1) * self.size)[0]
            base = elements[first : first + len(old)].to(old.device)
            delta = self._delta(self._all_deltas, expert, start, stop, old.device)
        new = self._add([expert], base[None], delta[None])[0]
        if self.shard.model is not None:
            model = self._model_weights()
            held = model[start - self.shard.model.start : stop - self.shard.model.start]
            self.checks.compare([expert], old.to(held)[None], held[None])
            self._save(expert, self.shard.model, model, start, stop)
            held.copy_(new)
        self._save(expert, self.shard.master, master, start, stop)
        old.copy_(new)

    def _delta(
        self, deltas: Sequence[ExpertDeltas], expert: int, start: int, stop: int, device: torch.device
    ) -> Tensor:
        """Compute the sum of changes in the range ``[start, stop)`` of the flattened parameter."""
        offset = expert * self.size
        # on the device of the weights, wherever the factors are when the change is made again
        like = torch.empty(0, dtype=torch.float64, device=device) if self.is_exact else None
        parts = (
            delta_slice(change, expert, start - offset, stop - offset, self.transposed, like).to(device)
            for change in deltas
            if change.changes(expert)
        )
        total = next(parts)
        for part in parts:
            total += part
        return total

    def _keep_base(self, master: Tensor) -> None:
        if not self.is_exact:
            return
        known = {} if self.earlier is None else self.earlier.elements or {}
        for expert in (expert for expert in self.experts if expert not in known):
            start, stop = self._own_range(expert * self.size, (expert + 1) * self.size)
            own = master[start - self.shard.start : stop - self.shard.start] if start < stop else master[:0]
            self.before[expert] = own.to("cpu", copy=True)

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
