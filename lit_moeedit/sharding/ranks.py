"""The processes that edit together: work sharded in rounds, collective operations, and failing together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from hashlib import sha256
from typing import ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from lit_moeedit.sharding.told_to_end import DeferredSignal
from lit_moeedit.sharding.watch import Watch

log = logging.getLogger(__name__)
T = TypeVar("T")
PART = timedelta(seconds=1)
"""Time between two looks at the watch while a rank waits for the others."""


class RankError(RuntimeError):
    """Raised on a rank that must change nothing because another one failed."""


class RankOutOfMemoryError(RankError):
    """Raised where other ranks ran out of memory and no rank failed otherwise."""


class RankFloatingPointError(RankError):
    """Raised where other ranks had values that are not finite and no rank failed otherwise."""


class RankTerminated(SystemExit):
    """The end of a rank because another one was told to end, with the same exit code."""


_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for its work space
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell if memory ran out, on this rank or another: smaller batches may avoid such an error."""
    if isinstance(error, torch.OutOfMemoryError | RankOutOfMemoryError):
        return True
    # CUDA's libraries and the CPU's allocator raise a plain error
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


_OF_OTHERS = {"memory": RankOutOfMemoryError, "finite": RankFloatingPointError}
"""Error of another rank after which all may try again together, by what they try it for."""


def _further_try(error: BaseException) -> str | None:
    """Return what ranks might try again for after an error, see :data:`_OF_OTHERS`; ``None`` if they cannot."""
    if is_out_of_memory(error):
        return "memory"
    return "finite" if isinstance(error, FloatingPointError | RankFloatingPointError) else None


class Ranks:
    """All processes of a run, or one process alone.

    Work is sharded in rounds, so that every rank makes the same number of forwards, because a forward is a collective
    operation under ZeRO stage 3. Between forwards :meth:`check_errors` makes sure that no rank has failed. It uses a
    process group of its own on the CPU, so it cannot be mixed up with the communication of the model's forward, nor
    with that of tensors.

    If a rank fails *within* a collective forward, the others cannot come to the check. A
    :class:`~lit_moeedit.sharding.watch.Watch` tells them of it and ends them after some seconds. Ranks that are slow
    while no rank has failed are waited for, at most for ``timeout``.

    The constructor is a collective operation. :meth:`current` is none if there are ranks of all processes already.

    Args:
        group: the processes. ``None`` for all of them if ``torch.distributed`` is initialised, else this one alone.
        timeout: maximum time that a rank waits for the others in :meth:`check_errors`.

    Example:
        >>> ranks = Ranks.current()
        >>> [(batch, mine) for batch, mine in ranks.shard(["a", "b"])], ranks.any(False)
        ([('a', True), ('b', True)], False)
    """

    # By default process group, and dropped with it. The values are strong references: if one were collected earlier on
    # one rank than on another, only one of them would enter the collective constructor.
    _made: ClassVar[WeakKeyDictionary[dist.ProcessGroup, Ranks]] = WeakKeyDictionary()

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta = timedelta(minutes=10)) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        self._control: dist.ProcessGroup | None = None
        self._data: dist.ProcessGroup | None = None
        self._watch: Watch | None = None
        self._known: BaseException | None = None  # the failure that all ranks have been told of
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.size > 1:
            # before any collective operation, in which a rank may wait for one that has failed
            self._watch = Watch.of(group)
            members = dist.get_process_group_ranks(group)
            self._control = dist.new_group(members, timeout=timeout, backend="gloo")
            self._data = dist.new_group(members, timeout=timeout, backend="gloo")
            self._first = members[0]
            if group is None and dist.group.WORLD is not None:
                Ranks._made[dist.group.WORLD] = self

    @classmethod
    def current(cls) -> Ranks:
        """Return the ranks of all processes that were made last, or make them if there are none yet."""
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        made = None if world is None else cls._made.get(world)
        return cls() if made is None else made

    # -- failing together ---------------------------------------------------------------------------------------------

    def check_errors(self, error: BaseException | None = None, flag: bool = False) -> bool:
        """Raise on all ranks if one of them has an error.

        Every exchange of control information during an edit is this one, so a rank that fails reaches the others
        wherever they wait.

        Args:
            error: this rank's error. It is raised again here; the other ranks raise a :class:`RankError` with its
                message.
            flag: this rank's flag, see :meth:`any`.

        Returns:
            whether the flag is set on any rank.

        Raises:
            RankError: naming the rank that failed and its message. It is a :class:`RankOutOfMemoryError` if memory is
                all that any rank lacked, and a :class:`RankFloatingPointError` if all that failed had values that are
                not finite. Where another rank failed otherwise, a rank that might try again raises a plain
                :class:`RankError`, so that it does not try alone.
        """
        error = DeferredSignal.take() if error is None else error
        if self._control is not None:
            flags = torch.tensor([int(error is not None), int(flag)])
            error = self._exchange(flags, error)
            flag = bool(flags[1])
        if error is not None:
            self._known = error
            raise error
        return flag

    def _exchange(self, flags: Tensor, error: BaseException | None) -> BaseException | None:
        """Sum flags over the ranks, and return the error to raise on this one."""
        watch = self._watch
        if watch is not None and error is not None:
            watch.post(error)
        try:
            if watch is None:
                dist.all_reduce(flags, group=self._control)
            elif not self._sum_watched(flags, watch):
                return error if error is not None and watch.is_own else RankError(watch.reason)
        except RuntimeError as failure:  # another rank has ended
            if watch is not None and watch.reason is not None and not watch.is_own:
                raise RankError(watch.reason) from failure
            if error is not None:
                return error
            raise
        return self._error_of_all(error) if flags[0] else error

    def _sum_watched(self, flags: Tensor, watch: Watch) -> bool:
        """Sum flags over the ranks; tells if all came to it, that is, if none failed alone elsewhere."""
        with watch.watching(), watch.waiting():
            if watch.reason is not None:
                return False
            work = dist.all_reduce(flags, group=self._control, async_op=True)
            while not work.is_completed():
                if watch.reason is not None:
                    return False
                with suppress(RuntimeError):  # the time is over, or an error that is raised below
                    work.wait(PART)
            work.wait()
        if flags[0]:
            watch.settle()
        return True

    def _error_of_all(self, error: BaseException | None) -> BaseException:
        """Return the error to raise on this rank when any rank has one."""
        own = None
        if error is not None:
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else None
            own = (f"{type(error).__name__}: {error}", _further_try(error), code)
        found = self._all_gather_objects(own, self._control)
        failed = {rank: state for rank, state in enumerate(found) if state is not None}
        message = "; ".join(f"rank {rank} failed: {text}" for rank, (text, *_) in failed.items())
        tries = {others_try for _, others_try, _ in failed.values()}
        further = tries.pop() if len(tries) == 1 else None
        if error is not None and (further is not None or _further_try(error) is None):
            return error
        codes = {code for *_, code in failed.values()}
        if len(codes) == 1 and (code := codes.pop()) is not None:
            log.warning("%s", message)
            return RankTerminated(code)
        return RankError(message) if further is None else _OF_OTHERS[further](message)

    def _all_gather_objects(self, own: T, group: dist.ProcessGroup | None) -> list[T]:
        """Return the object of every rank."""
        found = [own] * self.size
        if group is not None:
            dist.all_gather_object(found, own, group=group)
        return found

    def forget(self) -> None:
        """Drop the last failure, with the frames in which it happened and everything that these refer to."""
        self._known = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make this block succeed on all ranks or fail on all of them, whatever the exception is."""
        error: BaseException | None = None
        with self.watching():
            try:
                yield
            except BaseException as caught:
                if caught is self._known:
                    raise
                error = caught
            self.check_errors(error)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Allow this process to be ended within this block, if it waits for a rank that has failed."""
        with nullcontext() if self._watch is None else self._watch.watching():
            yield

    def leave(self, error: BaseException) -> None:
        """Tell the other ranks, unless they know it, that this one has failed alone, and begin anew.

        Every rank calls this when it ends a run with an exception, so that a later run of the same processes is not
        taken for the one that has failed.
        """
        if self._watch is not None:
            self._watch.leave(None if error is self._known else error)

    def any(self, flag: bool) -> bool:
        """Tell if the flag is set on any rank."""
        return self.check_errors(flag=flag)

    def least(self, number: int) -> int:
        """Return the smallest of the ranks' numbers."""
        self.check_errors()
        return min(self._all_gather_objects(number, self._data))

    def check_same(self, what: str, values: Sequence[str]) -> None:
        """Check that all ranks hold the same texts.

        Raises:
            ValueError: naming ``what``, if they do not.
        """
        self.check_errors()
        digest = sha256("\0".join(values).encode()).hexdigest()
        if len(set(self._all_gather_objects(digest, self._data))) > 1:
            raise ValueError(f"{what} must be the same on all ranks, but are not; is something drawn without a seed?")

    # -- collective operations ----------------------------------------------------------------------------------------

    def shard(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """Yield this rank's batches, the same number on every rank.

        Before each, :meth:`check_errors` makes sure that no rank has failed. Where fewer batches than ranks are left, a
        rank gets a batch that is not its own and must drop the result (``mine`` is ``False``).

        Args:
            batches: all batches, the same on all ranks.

        Yields:
            Pairs ``(batch, mine)``.
        """
        for start in range(0, len(batches), self.size):
            index = start + self.rank
            self.check_errors()
            yield (batches[index], True) if index < len(batches) else (batches[start], False)

    def all_reduce(self, *tensors: Tensor) -> None:
        """Sum tensors over the ranks, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor, group=self._group_for(tensor))

    def broadcast(self, *tensors: Tensor) -> None:
        """Copy the first rank's tensors to all ranks, in place. Solutions of two ranks may differ in the last bit."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, self._first, group=self._group_for(tensor))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the ranks' tensors, which may differ in their first dimension.

        Args:
            tensor: this rank's tensor, ``[n, …]``.

        Returns:
            ``[Σ n, …]``, the same on all ranks.
        """
        if self.size == 1:
            return tensor
        lengths = torch.zeros(self.size, dtype=torch.long, device=tensor.device)
        lengths[self.rank] = len(tensor)
        self.all_reduce(lengths)
        padded = tensor.new_zeros((int(lengths.max()), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        if padded.numel():
            # as bytes, because not every backend supports every dtype
            raw = [part.view(-1).view(torch.uint8) for part in parts]
            dist.all_gather(raw, padded.view(-1).view(torch.uint8), group=self._group_for(tensor))
        return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])

    def _group_for(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """Return the group for a tensor's device, because the model's group may support only its own."""
        return self._data if tensor.device.type == "cpu" else self.group
