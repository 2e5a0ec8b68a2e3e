"""Phases of an edit: names, timing and progress reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

PHASES = ("statistics", "targets", "features", "solve", "commit")
Progress = Callable[[str, int, int], None]


class Clock:
    """Measures the seconds of each phase.

    Args:
        phase: ``phase(name)`` is a context manager in which every part of a phase runs.
        device: the device of the model. A GPU is synchronised at the end of each part, so that its work is counted.
    """

    def __init__(self, phase: Callable[[str], AbstractContextManager[Any]], device: torch.device) -> None:
        self._phase, self._device = phase, device
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        start = time.perf_counter()
        try:
            with self._phase(phase):
                yield
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
        finally:
            self._seconds[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, and as ``edit`` those since the clock was made."""
        return {**self._seconds, "edit": time.perf_counter() - self._start}
