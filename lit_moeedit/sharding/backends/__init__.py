"""The sharding backends, one file for each, and the search for the one that holds a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.sharding.backends.deepspeed import deepspeed_shard
from lit_moeedit.sharding.backends.unsharded import unsharded
from lit_moeedit.sharding.parallelism import Parallelism, find_parallelism
from lit_moeedit.sharding.shards import Backend, Shard, UnsupportedShardingError

_BACKENDS: ContextVar[tuple[Backend, ...]] = ContextVar("backends", default=(deepspeed_shard, unsharded))

SUPPORTED = "supported are one process, DDP, and DeepSpeed ZeRO stages 0 to 3"
"""The end of a message that refuses a kind of parallelism."""


def refuse_parallelism(model: nn.Module | None = None, strategy: object = None) -> None:
    """Refuse a model of which a rank holds or computes only a part, unless a backend handles that.

    Everything that runs or reads a model calls this first. Nothing is run, read or communicated here.

    Args:
        model: the model, or a module that holds it.
        strategy: the Trainer's strategy.

    Raises:
        UnsupportedShardingError: naming what was found, where, and what is supported.

    Example:
        >>> refuse_parallelism(nn.Linear(2, 2))
    """
    handled: set[Parallelism] = set().union(*(getattr(backend, "handles", ()) for backend in _BACKENDS.get()))
    found = {kind: where for kind, where in find_parallelism(model, strategy).items() if kind not in handled}
    if found:
        what = "; ".join(f"{kind.value} ({where})" for kind, where in found.items())
        raise UnsupportedShardingError(f"models under {what} cannot be run, read or edited; {SUPPORTED}")


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
        f"the parameter is a {type(weight.data).__name__}, or whole for a moment while the optimizer trains shards "
        f"(DTensor: FSDP2, tensor parallelism); {SUPPORTED}"
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
    with held(Undo()) as undo:
        undo.by(_BACKENDS.set, _BACKENDS.get())
        _BACKENDS.set((backend, *_BACKENDS.get()))
        yield
