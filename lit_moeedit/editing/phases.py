"""The phases of an edit: their names, how they are timed, and who is told how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

PHASES = ("statistics", "targets", "features", "solve", "commit")
Progress = Callable[[str, int, int], None]


def no_progress(phase: str, done: int, total: int) -> None:
    """Tells nobody."""


class Clock:
    """Seconds by phase.

    Args:
        phase: ``phase(name)`` is a block in which every part of a phase is run.
        device: where the work is done; a GPU is waited for at the end of each part, so that its work counts there.
    """

    def __init__(self, phase: Callable[[str], AbstractContextManager[Any]], device: torch.device) -> None:
        self._phase, self._device = phase, device
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count a block's seconds as those of a phase."""
        start = time.perf_counter()
        try:
            with self._phase(phase):
                yield
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """By phase, and since this was made."""
        return {**self._seconds, "edit": time.perf_counter() - self._start}
