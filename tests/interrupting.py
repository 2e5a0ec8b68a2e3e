"""Interrupts at chosen lines, and everything that they must leave as it was."""

from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROOT = f"{Path(__file__).resolve().parents[1]}/"


def by_exception() -> None:
    """Interrupt as Python does when a signal has come: between two lines."""
    raise KeyboardInterrupt


def by_signal() -> None:
    """Interrupt by the signal of Ctrl-C, whoever handles it."""
    signal.raise_signal(signal.SIGINT)


class Interrupts:
    """Counts the lines that a function runs in some files, and interrupts at some of them.

    Python stops tracing when a trace function raises. Here it goes on, so that the next interrupt can hit the code that
    handles the first one.

    Args:
        files: parts of the files' paths.
        at: numbers of the lines to interrupt at, counted as they run from 1.
        interrupt: interrupts.
    """

    def __init__(self, files: tuple[str, ...], *at: int, interrupt: Callable[[], None] = by_exception) -> None:
        self.files, self.at, self.interrupt = files, set(at), interrupt
        self.places: list[tuple[str, int]] = []
        self.raised: list[tuple[str, int]] = []
        self._dropped: list[weakref.ref[Any]] = []

    def run(self, function: Callable[[], Any]) -> bool:
        """Run a function, and tell if it came to its end."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            function()
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(before)
            # they hold every frame of the function, and with them its tensors: 15 MB for each interrupted edit
            self._dropped.clear()
        return True

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        is_chosen = path.startswith(ROOT) and any(part in path for part in self.files)
        return self._local(frame) if is_chosen else None

    def _local(self, frame: FrameType) -> Any:
        trace: Any = partial(_line, self)

        def on_drop(_: Any) -> None:
            if self.raised and sys.gettrace() is None:
                sys.settrace(self._call)
                frame.f_trace = self._local(frame)

        self._dropped.append(weakref.ref(trace, on_drop))
        return trace


def _line(owner: Interrupts, frame: FrameType, event: str, argument: Any) -> None:
    if event != "line":
        return
    owner.places.append((frame.f_code.co_filename, frame.f_lineno))
    if len(owner.places) in owner.at:
        owner.raised.append(owner.places[-1])
        owner.interrupt()


def last_of_each(places: list[tuple[str, int]]) -> list[int]:
    """When each line runs for the last time, as numbers from 1."""
    return sorted({place: number for number, place in enumerate(places, 1)}.values())


def ends_of_each(places: list[tuple[str, int]]) -> list[int]:
    """When each line runs for the first and for the last time, as numbers from 1."""
    first = {place: number for number, place in reversed(list(enumerate(places, 1)))}
    return sorted({*first.values(), *last_of_each(places)})


def spread(count: int, most: int | None) -> list[int]:
    """At most this many numbers from 1 to ``count``, evenly spread; all of them if ``most`` is ``None``."""
    if most is None or count <= most:
        return list(range(1, count + 1))
    return sorted({1 + i * (count - 1) // max(1, most - 1) for i in range(most)})


def interrupt_everywhere(
    start: Callable[[], Callable[[], Any]],
    check: Callable[[Interrupts, bool], None],
    files: tuple[str, ...],
    singles: int | None = None,
    pairs: int | None = 0,
    interrupt: Callable[[], None] = by_exception,
) -> int:
    """Interrupt a function once at every line, and a second time at every line after that.

    Args:
        start: makes a fresh state, and returns the function that changes it.
        check: called after every interrupted run, with the interrupts and whether the function came to its end.
        files: parts of the paths of the files in which to interrupt.
        singles: maximum number of runs with one interrupt, when a line runs for the first or the last time, since the
            lines of loops would take most; ``None`` for all.
        pairs: maximum number of runs with a second one, for each of the first; ``None`` for all.
        interrupt: interrupts.

    Returns:
        The number of runs.
    """

    def run(*at: int) -> list[tuple[str, int]]:
        function, interrupts = start(), Interrupts(files, *at, interrupt=interrupt)
        check(interrupts, interrupts.run(function))
        assert len(interrupts.raised) == len(at), "another number of lines ran this time"
        return interrupts.places

    tried, places = 0, run()
    chosen = range(1, len(places) + 1) if singles is None else ends_of_each(places)
    for first in (chosen[i - 1] for i in spread(len(chosen), singles)):
        left = len(run(first)) - first
        count = left if pairs is None else min(left, pairs)
        # other lines after every first one, so that a few of them reach all that undo
        seconds = [first + 1 + (7 * first + i * left // count) % left for i in range(count)]
        for second in seconds:
            run(first, second)
        tried += 1 + len(seconds)
    return tried


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def modes(model: nn.Module) -> dict[str, Any]:
    """Everything beside weights that a pass of an edit changes for a while."""
    backends: Any = torch.backends
    torch.autocast_increment_nesting()
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    return {
        "training": [part.training for part in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None or bits(parameter.grad) for parameter in model.parameters()],
        "hooks": [
            {
                name: len(value)
                for name, value in vars(part).items()
                if name.endswith("hooks") and isinstance(value, dict)
            }
            for part in model.modules()
        ],
        "attributes": [sorted(vars(part)) for part in model.modules()],
        "implementations": [getattr(config, "_experts_implementation", None) for config in configs.values()],
        "functions": sorted(ALL_EXPERTS_FUNCTIONS),
        "random": bits(torch.get_rng_state()),
        "grad enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled("cpu"), torch.autocast_decrement_nesting()],
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(False) is None,
        "precision": [
            part.fp32_precision
            for part in (backends.cuda.matmul, backends.cudnn, backends.mkldnn.matmul, backends.mkldnn)
        ],
        "handler": signal.getsignal(signal.SIGINT),
    }
