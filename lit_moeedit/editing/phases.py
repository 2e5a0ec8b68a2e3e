"""Phases of an edit: names, timing and progress reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

PHASES = ("statistics", "targets", "features", "solve", "commit")
LOCATE, EVALUATION, OTHER = "locate", "evaluation", "other"
"""Phases around an edit: finding its place, measuring the model before and after it, and the rest."""
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


class Meter:
    """Measures the seconds and the peak of memory of phases, on this rank.

    It can be the ``phase`` of an :meth:`~lit_moeedit.editing.EditMethod.edit`. On a GPU each part of a phase resets the
    peak of :func:`torch.cuda.max_memory_allocated`. On a CPU no memory is measured.

    Args:
        device: the device of the model.

    Attributes:
        memory: by phase, the most bytes that were allocated on the GPU at once, with those that were before the phase.

    Example:
        >>> meter = Meter(torch.device("cpu"))
        >>> with meter("solve"):
        ...     pass
        >>> list(meter.seconds()), meter.memory
        (['solve', 'other'], {})
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._start = device, time.perf_counter()
        self._seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add a block to a phase."""
        start, is_gpu = time.perf_counter(), self._device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            if is_gpu:
                peak = torch.cuda.max_memory_allocated(self._device)
                self.memory[phase] = max(peak, self.memory.get(phase, 0))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, and as ``other`` the rest since this was made."""
        rest = time.perf_counter() - self._start - sum(self._seconds.values())
        return {**self._seconds, OTHER: max(0.0, rest)}
