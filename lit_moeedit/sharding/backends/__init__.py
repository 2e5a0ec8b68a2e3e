"""The sharding backends, one file for each, and the search for the one that holds a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from lit_moeedit.sharding.backends.deepspeed import deepspeed_shard
from lit_moeedit.sharding.backends.unsharded import unsharded
from lit_moeedit.sharding.shards import Backend, Shard, UnsupportedShardingError

_BACKENDS: ContextVar[tuple[Backend, ...]] = ContextVar("backends", default=(deepspeed_shard, unsharded))


def locate(weight: nn.Parameter, optimizers: Sequence[Any] = ()) -> Shard:
    """Find this rank's shard of a parameter.

    A ZeRO-3 parameter that happens to be gathered is partitioned again, so that the next forward gathers what is
    written to its partitions.

    Args:
        weight: the parameter.
        optimizers: the optimizers that train it now, as ``trainer.optimizers`` has them. None outside of training.

    Raises:
        UnsupportedShardingError: if no backend can read and write the parameter.
    """
    for backend in _BACKENDS.get():
        shard = backend(weight, optimizers)
        if shard is not None:
            return shard
    raise UnsupportedShardingError(
        f"the parameter is a {type(weight.data).__name__} (FSDP2, tensor parallelism); supported are no sharding, DDP, "
        "and DeepSpeed ZeRO stages 0 to 3"
    )


@contextmanager
def extra_backend(backend: Backend) -> Iterator[None]:
    """Have :func:`locate` ask one more backend first, within this block.

    Args:
        backend: the backend.

    Example:
        >>> weight = nn.Linear(2, 3).weight
        >>> shard = locate(weight)
        >>> with extra_backend(lambda parameter, optimizers: shard if parameter is weight else None):
        ...     locate(weight) is shard
        True
    """
    token = _BACKENDS.set((backend, *_BACKENDS.get()))
    try:
        yield
    finally:
        _BACKENDS.reset(token)
