"""A step of an optimisation as a CUDA graph: some ten thousand kernels in one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lit_moeedit.sharding.ranks import is_out_of_memory

log = logging.getLogger(__name__)

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function of one tensor that returns two, with the same shapes and the same control flow at every call."""
WARM_UPS = 2
"""Number of calls before the recording, in which libraries initialise themselves."""
TOLERANCE = 1e-2
"""Maximum difference of a replay from the step itself, relative to the largest element: sums in another order."""


def record(step: Step, example: Tensor) -> Step | None:
    """Record a step; return ``None``, and log a warning, if it cannot be recorded.

    Raises:
        RuntimeError: if memory runs out.
    """
    try:
        return _recorded(step, example)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.warning("steps are not recorded as a CUDA graph: %s", str(error).split("\n")[0])
        return None


def _recorded(step: Step, example: Tensor) -> Step:
    """Record a step once, to be replayed with other arguments.

    A replay reads all other inputs of the step from the memory in which they were recorded, so they must stay alive.
    The next replay overwrites its results.

    Args:
        step: the step to record. It must not wait for the device.
        example: an argument of the step, on a GPU.

    Raises:
        RuntimeError: if the step cannot be recorded, or a replay differs from the step.
    """
    recorded = example.clone()
    with torch.cuda.device(example.device):
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                expected = [result.clone() for result in step(recorded)]
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those of a data loader, may call the driver meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step(recorded)

    def replay(argument: Tensor) -> tuple[Tensor, Tensor]:
        recorded.copy_(argument)
        graph.replay()
        return results

    for one, other in zip(replay(example), expected, strict=True):
        if not bool((one - other).abs().amax() <= TOLERANCE * other.abs().amax()):
            raise RuntimeError("a replay differs from the step that was recorded")
    return replay
