"""Copies of weights for a rollback: where they are kept, and how they are put back."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_moeedit.sharding import device_memory
from lit_moeedit.sharding.ranks import is_out_of_memory
from lit_moeedit.sharding.shards import Copy

log = logging.getLogger(__name__)

RESERVE = 2**32
"""Free bytes of an accelerator that copies leave alone."""
PINNED = 2**32
"""Most bytes of copies in pinned memory; PyTorch keeps what was pinned once until the process ends."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on an accelerator; 0 where that is not known, and for main memory.

    What PyTorch's allocator holds without using it is free: a forward that comes while there are copies (of a guard)
    finds out how much room is left.
    """
    return device_memory.free_memory(device) if device.type == "cuda" else 0


def pinned_like(numbers: Tensor) -> Tensor | None:
    """Pinned main memory for a copy of an accelerator's numbers; ``None`` where there is none."""
    if numbers.device.type == "cpu":
        return None
    try:
        return torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # no more memory that can be pinned, or a device without such
        return None


def select(numbers: Tensor, rows: Tensor | None) -> Tensor:
    """A new tensor of all numbers, or of some rows ``[n]`` of them, on their own device."""
    return numbers.clone() if rows is None else numbers.index_select(0, rows)


class Store:
    """Memory for the copies of one transaction.

    They stay on the weights' device if they, together with the copies of the commits before, leave :data:`RESERVE` of
    what was free there at the first commit, and of what is free now. That is decided once for each commit. If memory
    runs out all the same, the rest of them goes to main memory, as they do where there is no room: pinned up to
    :data:`PINNED`, so that the device does not wait for them. Numbers in main memory are copied there.

    A copy to pinned memory may still be under way when :meth:`copy` returns. What overwrites the numbers, and what
    puts them back if the commit fails, is queued behind it on the same stream; and a commit that succeeds has read a
    result of that stream after its last copy.
    """

    def __init__(self) -> None:
        self._room: dict[torch.device, int] = {}
        self._near: torch.device | None = None
        self._pinned = 0

    def begin(self, device: torch.device, size: int, held: int) -> None:
        """Decide where the copies of a commit go.

        Args:
            device: the weights'.
            size: bytes of the copies that it will ask for there.
            held: bytes of the copies there of the commits before.
        """
        free = free_memory(device) - RESERVE
        room = self._room.setdefault(device, free) - held
        self._near = device if size <= min(free, room) else None

    def copy(self, numbers: Tensor) -> Tensor:
        """A copy of numbers."""
        near = self._copy_near(numbers, None)
        return self._beside(numbers) if near is None else near

    def copy_rows(self, numbers: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor | list[Tensor]:
        """Copies of some rows ``[n]`` of numbers, also given as ``places``: one tensor near, or a list beside them."""
        near = self._copy_near(numbers, rows)
        # row by row: the device may have no room for all of them once more
        return [self._beside(numbers[place]) for place in places] if near is None else near

    def _copy_near(self, numbers: Tensor, rows: Tensor | None) -> Tensor | None:
        """A copy on the numbers' own device; ``None`` if it is not to be there, or has no room."""
        if numbers.device != self._near:
            return None
        try:
            return select(numbers, rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.info("no room on %s: what a rollback needs is kept in main memory", self._near)
            self._room[numbers.device], self._near = 0, None
            return None

    def _beside(self, numbers: Tensor) -> Tensor:
        """A copy in main memory."""
        pinned = pinned_like(numbers) if self._pinned + numbers.nbytes <= PINNED else None
        if pinned is None:
            return numbers.to("cpu", copy=True)
        self._pinned += numbers.nbytes
        return pinned.copy_(numbers, non_blocking=True)


class Saved:
    """The numbers of one expert that this rank held before, in all copies."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._numbers: list[tuple[Copy, int, Tensor]] = []

    def add(self, copy: Copy, start: int, numbers: Tensor) -> None:
        """Note what the run of the flattened parameter held that begins at ``start``."""
        self._numbers.append((copy, start, numbers))

    def held(self, device: torch.device) -> int:
        """Bytes that this takes on a device."""
        return sum(numbers.nbytes for _, _, numbers in self._numbers if numbers.device == device)

    def restore(self) -> None:
        """Put all of it back, without further memory on the weights' device."""
        drop_gathered(self.weight)
        for copy, start, saved in self._numbers:
            numbers = copy.read()
            numbers[start - copy.start :][: len(saved)].copy_(saved)
            copy.write(numbers)


def drop_gathered(weight: Any) -> None:
    """Forget a gathered copy of a ZeRO-3 parameter, which no longer shows what its partitions hold."""
    if hasattr(weight, "ds_id") and weight.ds_status.name == "AVAILABLE":
        weight.partition()
