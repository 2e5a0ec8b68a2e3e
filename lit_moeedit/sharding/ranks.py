"""The processes that edit together: who does what, what they tell each other, and how all of them fail at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed, so that nothing may be changed on this one either."""


class RankOutOfMemoryError(RankError):
    """Other ranks ran out of memory, and no rank failed otherwise."""


_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no memory for its work space
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on this rank or another: an error that less work at a time may not meet."""
    if isinstance(error, torch.OutOfMemoryError | RankOutOfMemoryError):
        return True
    # libraries on the device and the CPU's allocator raise a plain error
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _OUT_OF_MEMORY)


class Ranks:
    """All processes of a run, or one process alone.

    Work is sharded in rounds, so that every rank makes the same number of forwards: under ZeRO-3 a forward is a
    collective operation. Between forwards :meth:`check_errors` makes sure that no rank has failed; that goes through a
    group of its own on the CPU, so it cannot be mixed up with what the model's forward sends.

    A rank that fails *within* a collective forward cannot be told from a slow one: the others wait for at most
    ``timeout``, or until its process has ended.

    Args:
        group: the processes; ``None`` for all of them if ``torch.distributed`` is initialised, else this one alone.
        timeout: how long a rank waits for the others to agree.

    Making one is a collective operation.

    Example:
        >>> ranks = Ranks()
        >>> [(batch, mine) for batch, mine in ranks.shard(["a", "b"])], ranks.any(False)
        ([('a', True), ('b', True)], False)
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta = timedelta(minutes=10)) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        self._control: dist.ProcessGroup | None = None
        self._known: BaseException | None = None  # the failure that all ranks know of
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.size > 1:
            members = dist.get_process_group_ranks(group)
            self._control = dist.new_group(members, timeout=timeout, backend="gloo")
            self._first = members[0]

    # -- failing together ---------------------------------------------------------------------------------------------

    def check_errors(self, error: BaseException | None = None, flag: bool = False) -> bool:
        """Go on if no rank has an error, else raise on all of them.

        Every exchange on the way of an edit is this one, so a rank that fails meets the others wherever they are.

        Args:
            error: what happened on this rank; it is raised again, on the other ranks a :class:`RankError` with its
                message.
            flag: a question to all ranks, see :meth:`any`.

        Returns:
            whether the flag is set on some rank.

        Raises:
            RankError: naming the rank that failed and its message. A :class:`RankOutOfMemoryError` if memory is all
                that any rank lacked; where another rank failed otherwise, one that lacked memory raises a plain one,
                so that it does not try again alone.
        """
        if self.size > 1:
            flags = torch.tensor([int(error is not None), int(flag)])
            dist.all_reduce(flags, group=self._control)
            if flags[0]:
                error = self._everybodys(error)
            flag = bool(flags[1])
        if error is not None:
            self._known = error
            raise error
        return flag

    def _everybodys(self, error: BaseException | None) -> BaseException:
        """The error to raise on this rank when some rank has one."""
        found: list[tuple[str, bool] | None] = [None] * self.size
        own = None if error is None else (f"{type(error).__name__}: {error}", is_out_of_memory(error))
        dist.all_gather_object(found, own, group=self._control)
        failed = {rank: state for rank, state in enumerate(found) if state is not None}
        message = "; ".join(f"rank {rank} failed: {text}" for rank, (text, _) in failed.items())
        is_memory = all(lacked for _, lacked in failed.values())
        if error is not None and (is_memory or not is_out_of_memory(error)):
            return error
        return RankOutOfMemoryError(message) if is_memory else RankError(message)

    def forget(self) -> None:
        """Drop the last failure, with the frames in which it happened and all that these hold."""
        self._known = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that succeeds on all ranks or fails on all of them, whatever the exception is."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            if caught is self._known:
                raise
            error = caught
        self.check_errors(error)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.check_errors(flag=flag)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.size == 1:
            return number
        self.check_errors()
        smallest = torch.tensor(number)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._control)
        return int(smallest)

    def check_same(self, what: str, values: Sequence[str]) -> None:
        """Check that all ranks hold the same texts.

        Raises:
            ValueError: naming ``what``, if they do not.
        """
        if self.size == 1:
            return
        self.check_errors()
        digest = sha256("\0".join(values).encode()).hexdigest()
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, digest, group=self._control)
        if len(set(found)) > 1:
            raise ValueError(f"{what} must be the same on all ranks, but are not; is something drawn without a seed?")

    # -- sharing work -------------------------------------------------------------------------------------------------

    def shard(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        """This rank's batches, in rounds: as many on every rank.

        Before each the ranks agree that none has failed. Where there are fewer batches than ranks left, a rank gets a
        batch that is not its own and must drop the result (``mine`` is ``False``).

        Args:
            batches: all batches, the same on all ranks.

        Returns:
            pairs ``(batch, mine)``.
        """
        for start in range(0, len(batches), self.size):
            index = start + self.rank
            self.check_errors()
            yield (batches[index], True) if index < len(batches) else (batches[start], False)

    def all_reduce(self, *tensors: Tensor) -> None:
        """Add up tensors over the ranks, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor, group=self._group_for(tensor))

    def broadcast(self, *tensors: Tensor) -> None:
        """Give all ranks the first rank's numbers, in place: what is solved twice may differ in the last bit."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, self._first, group=self._group_for(tensor))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors one after the other; they may differ in their first dimension.

        Args:
            tensor: ``[n, …]`` of this rank.

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
            # as bytes, because not every backend knows every dtype
            raw = [part.view(-1).view(torch.uint8) for part in parts]
            dist.all_gather(raw, padded.view(-1).view(torch.uint8), group=self._group_for(tensor))
        return torch.cat([part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)])

    def _group_for(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """The model's group may know its own device only."""
        return self._control if tensor.device.type == "cpu" else self.group
