"""One rank of an edit, simulated with fake tensors: its collective operations and its shards of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lit_moeedit.planning.sharding import Send, Sharding
from lit_moeedit.planning.simulated_fsdp2 import shard_size
from lit_moeedit.sharding.backends import Backend, extra_backend
from lit_moeedit.sharding.commit import LARGE_BLOCK
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import Copy, Shard

T = TypeVar("T")


class SimulatedRanks(Ranks):
    """The first of several ranks, without the others, which are taken to send the same as this one.

    Args:
        sharding: sharding of the model, which has the number of ranks.
        send: called with the bytes that this rank sends.
        repeated: ``repeated(n)`` returns a context manager whose block counts ``n`` times, or not at all for 0.
        rounds: number of rounds in :meth:`shard`; by default that of the batches.
    """

    def __init__(
        self,
        sharding: Sharding,
        send: Send,
        repeated: Callable[[int], AbstractContextManager[None]],
        rounds: int | None = None,
    ) -> None:
        super().__init__()
        # there is nobody to exchange errors and objects with
        self.size, self._control = sharding.ranks, None
        self._sharding, self._send, self._repeated, self._rounds = sharding, send, repeated, rounds

    @override
    def shard(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Yield the first batch for all of this rank's; then, if batches are lists or ranges, the rest.

        The rest counts nothing, and is there for the sizes of the results.
        """
        if not batches:
            return
        with self._repeated(-(-len(batches) // self.size) if self._rounds is None else self._rounds):
            yield batches[0], True
        first, *others = cast(Sequence[Any], batches)
        if others and isinstance(first, range | list):
            rest = range(first.stop, others[-1].stop) if isinstance(first, range) else [*chain(*others)]
            with self._repeated(0):
                yield cast(Any, rest), True

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
        """Return the tensor itself, which :meth:`shard` has made of the batches of all ranks."""
        if self.size == 1:
            return tensor
        self._send(self._sharding.part(tensor.nbytes))
        parts = tensor.clone()
        return parts.clone()


class _Group(dist.ProcessGroup):
    """The process group of all ranks, for the all_reduce of a commit."""

    def __init__(self, sharding: Sharding, send: Send) -> None:
        super().__init__(0, sharding.ranks)  # type: ignore[call-arg]
        self._sharding, self._send = sharding, send

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> None:  # type: ignore[override]
        for tensor in tensors:
            self._send(2 * self._sharding.part(tensor.nbytes))


class _Simulated(Backend):
    """Known shards of weights: without optimizers, and with them."""

    def __init__(self, known: Mapping[nn.Parameter, tuple[Shard, Shard]]) -> None:
        self._known = known

    @override
    def shard(self, weight: nn.Parameter, optimizers: Sequence[Any]) -> Shard | None:
        return self._known[weight][bool(optimizers)] if weight in self._known else None


@contextmanager
def simulated_shards(weights: Sequence[nn.Parameter], sharding: Sharding, send: Send) -> Iterator[list[Tensor]]:
    """Have :func:`~lit_moeedit.sharding.backends.locate` find the first rank's shards of weights, within this block.

    Stage 3 partitions every weight, and FSDP2 its rows. Stages 1 and 2 partition all weights end to end, so that one
    rank can own a whole layer: here the first rank does.

    Args:
        weights: fake weights, whole.
        sharding: sharding of the model.
        send: called with the bytes that a commit sends.

    Yields:
        Model weights, master weights and moments of all shards.
    """
    held: list[Tensor] = []
    group = _Group(sharding, send) if sharding.shards > 1 else None

    def copy(weight: nn.Parameter, dtype: torch.dtype) -> Copy:
        parts = sharding.ranks if sharding.has_shards else 1
        count = shard_size(weight, parts) if sharding.fsdp2 else -(-weight.numel() // parts)
        flat = weight.new_empty(count, dtype=dtype)
        held.append(flat)
        return Copy(0, lambda: flat)

    def shards(weight: nn.Parameter) -> tuple[Shard, Shard]:
        """Return the shard without optimizers, and with them."""
        model = copy(weight, weight.dtype)
        dtype = torch.float32 if sharding.has_master else weight.dtype
        # fake tensors are on the CPU, also those of a GPU
        block = None if sharding.on_cpu else LARGE_BLOCK
        of_model = group if sharding.has_shards else None
        untrained = Shard(weight.shape, weight.dtype, 0, len(model.read()), model, group=of_model, block=block)
        trained = replace(untrained, moments=[copy(weight, dtype), copy(weight, dtype)], group=group)
        if sharding.has_master:
            trained = replace(trained, master=copy(weight, dtype), model=model)
        return untrained, trained

    with extra_backend(_Simulated({weight: shards(weight) for weight in weights})):
        yield held
