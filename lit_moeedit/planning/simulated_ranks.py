"""The ranks of an edit, and where its weights are, rehearsed by one process with tensors that have no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lit_moeedit.planning.simulated_zero import Send, Sharding
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import Copy, Shard

T = TypeVar("T")


class RehearsedRanks(Ranks):
    """The first of many ranks, without the others: what they would send is like its own.

    Args:
        sharding: says how many there are.
        send: called with the bytes that this rank sends.
        repeated: ``repeated(n)`` is a block that stands for ``n`` of its kind; for none, if nothing in it counts.
        rounds: how many rounds there are in :meth:`shard`, if not as many as the batches make.
    """

    def __init__(
        self,
        sharding: Sharding,
        send: Send,
        repeated: Callable[[int], AbstractContextManager[None]],
        rounds: int | None = None,
    ) -> None:
        super().__init__()
        self.size = sharding.ranks
        self._sharding, self._send, self._repeated, self._rounds = sharding, send, repeated, rounds

    @override
    def check_errors(self, error: BaseException | None = None, flag: bool = False) -> bool:
        if error is not None:
            self._known = error
            raise error
        return flag

    @override
    def least(self, number: int) -> int:
        return number

    @override
    def check_same(self, what: str, values: Sequence[str]) -> None:
        return

    @override
    def shard(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """The first batch, in place of all of this rank's; and of ranges the rest, in place of all other ranks'."""
        with self._repeated(-(-len(batches) // self.size) if self._rounds is None else self._rounds):
            yield batches[0], True
        first: Any = batches[0]
        if len(batches) > 1 and isinstance(first, range):
            rest: Any = range(first.stop, batches[-1].stop)  # type: ignore[attr-defined]
            with self._repeated(0):
                yield rest, True

    @override
    def all_reduce(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._send(2 * self._sharding.part(tensor.nbytes))

    @override
    def broadcast(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._send(self._sharding.part(tensor.nbytes))

    @override
    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself: what other ranks would send is in it."""
        if self.size == 1:
            return tensor
        self._send(self._sharding.part(tensor.nbytes))
        parts = tensor.clone()
        return parts.clone()


class _Group(dist.ProcessGroup):
    """All ranks, for what a commit sends."""

    def __init__(self, sharding: Sharding, send: Send) -> None:
        super().__init__(0, sharding.ranks)  # type: ignore[call-arg]
        self._sharding, self._send = sharding, send

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> None:  # type: ignore[override]
        for tensor in tensors:
            self._send(2 * self._sharding.part(tensor.nbytes))


@contextmanager
def rehearsed_shards(weights: Sequence[nn.Parameter], sharding: Sharding, send: Send) -> Iterator[list[Tensor]]:
    """A block in which :func:`~lit_moeedit.sharding.shards.locate` finds weights where they would be on the first rank.

    Stage 3 splits every weight; stages 1 and 2 split the row of all weights, so that a layer can be one rank's alone:
    it is this one's.

    Args:
        weights: within a model without numbers, whole.
        sharding: how the model is sharded.
        send: called with the bytes that a commit sends.

    Returns:
        all copies of the weights, and the moments.
    """
    held: list[Tensor] = []

    def copy(weight: nn.Parameter, dtype: torch.dtype) -> Copy:
        flat = weight.new_empty(
            -(-weight.numel() // sharding.ranks) if sharding.stage == 3 else weight.numel(), dtype=dtype
        )
        held.append(flat)
        return Copy(0, lambda: flat)

    def shard(weight: nn.Parameter) -> Callable[[Sequence[Any]], Shard]:
        working, group = copy(weight, weight.dtype), _Group(sharding, send) if sharding.shards > 1 else None
        stop = len(working.read())
        read = Shard(weight.shape, weight.dtype, 0, stop, working, group=group if sharding.stage == 3 else None)
        dtype = torch.float32 if sharding.has_master else weight.dtype
        trained = replace(read, moments=[copy(weight, dtype), copy(weight, dtype)], group=group)
        if sharding.has_master:
            trained = replace(trained, source=copy(weight, dtype), working=working)
        return lambda optimizers: trained if optimizers else read

    marked: list[Any] = list(weights)
    for weight in marked:
        weight.rehearsed = shard(weight)
    try:
        yield held
    finally:
        for weight in marked:
            del weight.rehearsed
