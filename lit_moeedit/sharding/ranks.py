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


class Ranks:
    """All processes of a run, or one process alone.

    Work is dealt in rounds, so that every rank makes the same number of forwards: under ZeRO-3 a forward is a
    collective operation. Between forwards the ranks :meth:`agree` that none of them has failed; that goes through a
    group of its own on the CPU, so it cannot be mixed up with what the model's forward sends.

    A rank that fails *within* a collective forward cannot be told from a slow one: the others wait for at most
    ``timeout``, or until its process has ended.

    Args:
        group: the processes; ``None`` for all of them if ``torch.distributed`` is initialised, else this one alone.
        timeout: how long a rank waits for the others to agree.

    Making one is a collective operation.

    Example:
        >>> ranks = Ranks()
        >>> [(batch, mine) for batch, mine in ranks.deal(["a", "b"])], ranks.any(False)
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

    def agree(self, error: BaseException | None = None, flag: bool = False) -> bool:
        """Go on if no rank has an error, else raise on all of them.

        Every exchange on the way of an edit is this one, so a rank that fails meets the others wherever they are.

        Args:
            error: what happened on this rank; it is raised again, on the other ranks a :class:`RankError` with its
                message.
            flag: a question to all ranks, see :meth:`any`.

        Returns:
            whether the flag is set on some rank.

        Raises:
            RankError: naming the rank that failed and its message.
        """
        if self.size > 1:
            flags = torch.tensor([int(error is not None), int(flag)])
            dist.all_reduce(flags, group=self._control)
            if flags[0]:
                found: list[str | None] = [None] * self.size
                text = None if error is None else f"{type(error).__name__}: {error}"
                dist.all_gather_object(found, text, group=self._control)
                failed = [f"rank {rank} failed: {text}" for rank, text in enumerate(found) if text is not None]
                error = error if error is not None else RankError("; ".join(failed))
            flag = bool(flags[1])
        if error is not None:
            self._known = error
            raise error
        return flag

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
        self.agree(error)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.agree(flag=flag)

    def check_same(self, what: str, values: Sequence[str]) -> None:
        """Check that all ranks hold the same texts.

        Raises:
            ValueError: naming ``what``, if they do not.
        """
        if self.size == 1:
            return
        self.agree()
        digest = sha256("\0".join(values).encode()).hexdigest()
        found: list[str] = [""] * self.size
        dist.all_gather_object(found, digest, group=self._control)
        if len(set(found)) > 1:
            raise ValueError(f"{what} must be the same on all ranks, but are not; is something drawn without a seed?")

    # -- sharing work -------------------------------------------------------------------------------------------------

    def deal(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
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
            self.agree()
            yield (batches[index], True) if index < len(batches) else (batches[start], False)

    def sum(self, *tensors: Tensor) -> None:
        """Add up tensors over the ranks, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor, group=self._group_for(tensor))

    def equalise(self, *tensors: Tensor) -> None:
        """Give all ranks the first rank's numbers, in place: what is solved twice may differ in the last bit."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, self._first, group=self._group_for(tensor))

    def concatenate(self, tensor: Tensor) -> Tensor:
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
        self.sum(lengths)
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
