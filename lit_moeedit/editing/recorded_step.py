"""A step of an optimisation as a CUDA graph: some ten thousand kernels that are started as one."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lit_moeedit.sharding.ranks import is_out_of_memory

log = logging.getLogger(__name__)

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function of one tensor that gives two, with the same shapes and the same way through the code at every call."""
WARM_UPS = 2
"""Calls before the recording, in which libraries set themselves up."""
TOLERANCE = 1e-2
"""By how much a replay may differ from the step itself, as a share of its largest element: sums in another order."""


class RecordedStep:
    """A step recorded once, and replayed with other numbers.

    What the step reads besides its argument is read where it was when it was recorded, and must stay alive.

    Args:
        step: what to record. It must not wait for the device.
        example: the argument of a call; its device is a GPU.

    Raises:
        RuntimeError: if the step cannot be recorded, or a replay gives something else than the step.
    """

    def __init__(self, step: Step, example: Tensor) -> None:
        self._argument = example.clone()
        with torch.cuda.device(example.device):
            beside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            beside.wait_stream(current)
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):
                    expected = [result.clone() for result in step(self._argument)]
            current.wait_stream(beside)
            self._graph = torch.cuda.CUDAGraph()
            # other threads, of a data loader say, may call the driver meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = step(self._argument)
        for one, other in zip(self(example), expected, strict=True):
            if not bool((one - other).abs().amax() <= TOLERANCE * other.abs().amax()):
                raise RuntimeError("a replay gives something else than the step that was recorded")

    def __call__(self, argument: Tensor) -> tuple[Tensor, Tensor]:
        """The step's results; they are overwritten by the next call."""
        self._argument.copy_(argument)
        self._graph.replay()
        return self._results


def record(step: Step, example: Tensor) -> Step | None:
    """Record a step; ``None``, with a line in the log, if it cannot be.

    Raises:
        RuntimeError: if memory ran out.
    """
    try:
        return RecordedStep(step, example)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.warning("steps are not recorded as a CUDA graph: %s", str(error).split("\n")[0])
        return None
