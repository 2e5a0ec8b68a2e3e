"""The ranks and the transaction of an edit, rehearsed by one process with tensors that have no numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.rehearsal import Send, Sharding
from lit_moeedit.sharding.shards import Copy, Shard
from lit_moeedit.sharding.weights import Transaction, Way

T = TypeVar("T")


class RehearsedRanks(Ranks):
    """The first of many ranks, without the others: what they would send is like its own.

    Args:
        sharding: says how many there are.
        send: called with the bytes that this rank sends.
        repeated: ``repeated(n)`` is a block that stands for ``n`` of its kind.
        rounds: how many rounds there are in :meth:`deal`, if not as many as the batches make.
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
    def agree(self, error: BaseException | None = None, flag: bool = False) -> bool:
        if error is not None:
            self._known = error
            raise error
        return flag

    @override
    def check_same(self, what: str, values: Sequence[str]) -> None:
        return

    @override
    def deal(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """The first batch, in place of all of this rank's."""
        rounds = -(-len(batches) // self.size) if self._rounds is None else self._rounds
        with self._repeated(rounds):
            yield batches[0], True

    @override
    def sum(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._send(2 * self._sharding.part(tensor.nbytes))

    @override
    def equalise(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._send(self._sharding.part(tensor.nbytes))

    @override
    def concatenate(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        padded = tensor.clone()
        parts = [padded.clone() for _ in range(self.size)]
        self._send(self._sharding.part(self.size * tensor.nbytes))
        return torch.cat(parts)


class _Group(dist.ProcessGroup):
    """All ranks, for what a commit sends."""

    def __init__(self, sharding: Sharding, send: Send) -> None:
        super().__init__(0, sharding.ranks)  # type: ignore[call-arg]
        self._sharding, self._send = sharding, send

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> None:  # type: ignore[override]
        for tensor in tensors:
            self._send(2 * self._sharding.part(tensor.nbytes))


def rehearsed_shard(weight: nn.Parameter, sharding: Sharding, send: Send) -> Shard:
    """Where the numbers of a weight would be on the first rank, master copy and moments included.

    Stage 3 splits every weight; stages 1 and 2 split the row of all weights, so that a layer can be one rank's alone:
    it is this one's.

    Args:
        weight: within a model without numbers.
        sharding: how the model is sharded.
        send: called with the bytes that a commit sends.
    """
    numbers = weight.numel()
    owned = -(-numbers // sharding.ranks) if sharding.stage == 3 else numbers
    dtype = torch.float32 if sharding.has_master else weight.dtype

    def copy(dtype: torch.dtype) -> Copy:
        flat = weight.new_empty(owned, dtype=dtype)
        return Copy(0, lambda: flat)

    return Shard(
        shape=weight.shape,
        dtype=weight.dtype,
        start=0,
        stop=owned,
        source=copy(dtype),
        working=copy(weight.dtype) if sharding.has_master else None,
        moments=[copy(dtype), copy(dtype)],
        group=_Group(sharding, send) if sharding.shards > 1 else None,
    )


class RehearsedTransaction(Transaction):
    """A transaction of weights whose numbers are where ``shards`` says, without optimizers."""

    def __init__(self, shards: Mapping[nn.Parameter, Shard], ranks: Ranks, way: Way, reset_moments: bool) -> None:
        super().__init__((), ranks, way, reset_moments)
        self._shards = shards

    @override
    def locate(self, weight: nn.Parameter) -> Shard:
        return self._shards[weight]
