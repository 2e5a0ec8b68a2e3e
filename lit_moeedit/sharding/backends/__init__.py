"""The sharding backends, one file for each, and the search for the one that holds a model or a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.sharding.backends.backend import Backend as Backend
from lit_moeedit.sharding.backends.deepspeed import Zero
from lit_moeedit.sharding.backends.expert_parallel import ExpertParallel
from lit_moeedit.sharding.backends.fsdp2 import FSDP2, lacks_sharding
from lit_moeedit.sharding.backends.unsharded import Unsharded
from lit_moeedit.sharding.parallelism import Parallelism, find_parallelism
from lit_moeedit.sharding.shards import Own, Shard, UnsupportedShardingError

_BACKENDS: ContextVar[tuple[Backend, ...]] = ContextVar(
    "backends", default=(Zero(), ExpertParallel(), FSDP2(), Unsharded())
)

SUPPORTED = (
    "supported are one process, DDP, DeepSpeed ZeRO stages 0 to 3, FSDP2 of the whole model, and expert parallelism of "
    "transformers with it"
)
"""The end of a message that refuses a kind of parallelism."""
_INSTEAD = {
    Parallelism.FSDP1: "use ModelParallelStrategy, which is FSDP2",
    Parallelism.TENSOR: "leave tp_size at 1, and give fsdp_size, or ep_size and fsdp_size",
    Parallelism.AUTO_EP: "use DistributedConfig(ep_size=…, fsdp_size=…) of transformers",
    Parallelism.DEEPSPEED_EXPERT: "use DistributedConfig(ep_size=…, fsdp_size=…) of transformers",
    Parallelism.DEEPSPEED_TENSOR: "use ZeRO stage 3, or FSDP2",
}
"""By kind of parallelism, what does the same for a run and can be edited."""


def find_backend(model: nn.Module) -> Backend:
    """Find the backend that holds a model, by marks that its modules keep while weights are gathered or released."""
    return next(backend for backend in _BACKENDS.get() if backend.holds(model))


def settle(model: nn.Module) -> None:
    """Release the gathered weights of a model; everything that reads or writes its parameters calls this first.

    See :meth:`~lit_moeedit.sharding.backends.backend.Backend.settle`.
    """
    find_backend(model).settle(model)


@contextmanager
def skipping(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Do not gather the weights of the given layers, whose ``forward`` is replaced within the block."""
    with held(Undo()) as undo:
        for layer in layers:
            undo.enter_context(find_backend(layer).skipping(layer))
        yield


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
    handled: set[Parallelism] = set().union(*(backend.handles for backend in _BACKENDS.get()))
    # apart, because a kind of parallelism of the strategy does not account for the parameters of the modules
    kinds = find_parallelism(strategy=strategy) | find_parallelism(model)
    found = {kind: where for kind, where in kinds.items() if kind not in handled}
    if model is not None and not found and Parallelism.FSDP2 in kinds and lacks_sharding(model):
        found = {Parallelism.FSDP2: f"{kinds[Parallelism.FSDP2]}, but no module is sharded by fully_shard"}
    if found:
        what = "; ".join(f"{kind.value} ({where})" for kind, where in found.items())
        instead = "".join(f"; {_INSTEAD[kind]}" for kind in found if kind in _INSTEAD)
        raise UnsupportedShardingError(f"models under {what} cannot be run, read or edited{instead}; {SUPPORTED}")
    if model is not None:
        find_backend(model).check(model)


def locate(weight: nn.Parameter, optimizers: Sequence[Any] = (), model: nn.Module | None = None) -> Shard:
    """Find this rank's shard of a parameter.

    A ZeRO-3 parameter that happens to be gathered is partitioned again, so that the next forward gathers what is
    written to its partitions.

    Args:
        weight: the parameter.
        optimizers: the optimizers that train it now, as ``trainer.optimizers`` has them. None outside of training.
        model: the model, if it is known, after :func:`settle`.

    Raises:
        UnsupportedShardingError: if no backend can read and write the parameter.
    """
    own = None if model is None else find_backend(model)
    for backend in _BACKENDS.get() if own is None or not own.is_exclusive else [own]:
        shard = backend.shard(weight, optimizers)
        if shard is not None:
            return shard
    raise UnsupportedShardingError(
        f"the parameter is a {type(weight.data).__name__}, or whole for a moment while the optimizer trains shards "
        f"(DTensor: FSDP2, tensor parallelism); {SUPPORTED}"
    )


def own_elements(tensor: Tensor) -> Own:
    """Return what this rank holds of the model weights of a parameter or buffer, without a copy.

    Raises:
        UnsupportedShardingError: if it cannot be read.
    """
    for backend in _BACKENDS.get():
        own = backend.own(tensor)
        if own is not None:
            return own
    raise UnsupportedShardingError(f"a {type(tensor).__name__} cannot be read; {SUPPORTED}")


def release(weight: nn.Parameter) -> None:
    """Release the gathered copy of a parameter, which no longer equals the shards."""
    for backend in _BACKENDS.get():
        backend.release(weight)


@contextmanager
def extra_backend(backend: Backend) -> Iterator[None]:
    """Have one more backend asked first, within this block.

    Args:
        backend: the backend.

    Example:
        >>> weight = nn.Linear(2, 3).weight
        >>> shard = locate(weight)
        >>> class Known(Backend):
        ...     def shard(self, parameter, optimizers):
        ...         return shard if parameter is weight else None
        >>> with extra_backend(Known()):
        ...     locate(weight) is shard
        True
    """
    with held(Undo()) as undo:
        undo.by(_BACKENDS.set, _BACKENDS.get())
        _BACKENDS.set((backend, *_BACKENDS.get()))
        yield
