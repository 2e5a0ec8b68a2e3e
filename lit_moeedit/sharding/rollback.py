"""Copies of weights for a rollback, on the weights' device or in main memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_moeedit.sharding import device_memory
from lit_moeedit.sharding.backends import release
from lit_moeedit.sharding.ranks import is_out_of_memory
from lit_moeedit.sharding.shards import Copy

log = logging.getLogger(__name__)

RESERVE = 2**32
"""Bytes of an accelerator's free memory that copies leave free."""
PINNED = 2**32
"""Maximum bytes of copies in pinned memory, which PyTorch keeps until the process ends."""


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on an accelerator; 0 where that is not known, and for main memory.

    Blocks that PyTorch's allocator caches count as free. A forward while there are copies (by a guard) measures the
    memory that is left.
    """
    return device_memory.free_memory(device) if device.type == "cuda" else 0


def pinned_like(elements: Tensor) -> Tensor | None:
    """Allocate pinned main memory for a copy of an accelerator's tensor; ``None`` where there is none."""
    if elements.device.type == "cpu":
        return None
    try:
        return torch.empty(elements.shape, dtype=elements.dtype, device="cpu", pin_memory=True)
    except RuntimeError:  # no memory that can be pinned is left, or the device has none
        return None


def select(elements: Tensor, rows: Tensor | None) -> Tensor:
    """Copy all elements, or some rows ``[n]`` of them, on their own device."""
    return elements.clone() if rows is None else elements.index_select(0, rows)


class Store:
    """Memory for the copies of one transaction.

    They stay on the weights' device if they, together with the copies of earlier commits, leave :data:`RESERVE` of what
    was free there at the first commit, and of what is free now. That is decided once for each commit. Where there is
    no room, and when memory runs out all the same, copies go to main memory: pinned up to :data:`PINNED`, so that the
    device does not wait for them. Weights in main memory are copied there.

    A copy to pinned memory may still be in progress when :meth:`copy` returns. Operations that overwrite the elements,
    or put them back if the commit fails, are queued after it on the same stream. A commit that succeeds has read a
    result of that stream after its last copy.
    """

    def __init__(self) -> None:
        self._room: dict[torch.device, int] = {}
        self._device: torch.device | None = None
        self._pinned = 0

    def begin(self, device: torch.device, size: int, held: int) -> None:
        """Decide where the copies of a commit go.

        Args:
            device: the weights' device.
            size: bytes of the copies that the commit will make there.
            held: bytes of the copies that earlier commits made there.
        """
        free = free_memory(device) - RESERVE
        room = self._room.setdefault(device, free) - held
        self._device = device if size <= min(free, room) else None

    def copy(self, elements: Tensor) -> Tensor:
        """Copy elements."""
        copied = self._copy_on_device(elements, None)
        return self._copy_to_host(elements) if copied is None else copied

    def copy_rows(self, elements: Tensor, rows: Tensor, places: Sequence[int]) -> Tensor | list[Tensor]:
        """Copy some rows ``[n]``, also given as ``places``: one tensor on their device, or a list in main memory."""
        copied = self._copy_on_device(elements, rows)
        # row by row, because the device may have no room for a second copy of all
        return [self._copy_to_host(elements[place]) for place in places] if copied is None else copied

    def _copy_on_device(self, elements: Tensor, rows: Tensor | None) -> Tensor | None:
        """Copy on the elements' own device; ``None`` if copies are not to be there, or there is no room."""
        if elements.device != self._device:
            return None
        try:
            return select(elements, rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.info("no room on %s: the copies for a rollback go to main memory", self._device)
            self._room[elements.device], self._device = 0, None
            return None

    def _copy_to_host(self, elements: Tensor) -> Tensor:
        """Copy to main memory."""
        pinned = pinned_like(elements) if self._pinned + elements.nbytes <= PINNED else None
        if pinned is None:
            return elements.to("cpu", copy=True)
        self._pinned += elements.nbytes
        return pinned.copy_(elements, non_blocking=True)


class Saved:
    """The elements of one expert that this rank held before a commit, of all copies."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._elements: list[tuple[Copy, int, Tensor]] = []

    def add(self, copy: Copy, start: int, elements: Tensor) -> None:
        """Add the elements of the range of the flattened parameter that begins at ``start``."""
        self._elements.append((copy, start, elements))

    def held(self, device: torch.device) -> int:
        """Return the bytes that this takes on a device."""
        return sum(elements.nbytes for _, _, elements in self._elements if elements.device == device)

    def restore(self) -> None:
        """Put all elements back, without further memory on the weights' device."""
        release(self.weight)
        for copy, start, saved in self._elements:
            elements = copy.read()
            elements[start - copy.start :][: len(saved)].copy_(saved)
            copy.write(elements)
