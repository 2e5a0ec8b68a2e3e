"""How often code waits for a GPU, how many operations it starts, and what memory its tensors take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

aten = torch.ops.aten
WAITING = (
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.unique_consecutive,
    aten._unique2,
    aten.unique_dim,
    aten.masked_select,
)
"""Operations that wait for the device; tensors that become lists do so, too."""


class Operations(TorchDispatchMode):
    """Counts what is dispatched.

    Attributes:
        started: operations that start something on a GPU: views do not.
        waited: those that wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started, self.waited = Counter[str](), Counter[str]()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet in WAITING:
            self.waited[str(packet)] += 1
        if not func.is_view:
            self.started[str(packet)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Operations]:
    """Count what is done in this block."""
    operations, tolist = Operations(), Tensor.tolist

    def counting(self: Tensor) -> Any:
        operations.waited["tolist"] += 1
        return tolist(self)

    with pytest.MonkeyPatch.context() as patch, operations:
        patch.setattr(Tensor, "tolist", counting)
        yield operations


def peak_memory(profile: Any) -> int:
    """The largest number of bytes held at a time by tensors that were made during a ``torch.profiler.profile``.

    Counted where they are allocated: the process's resident memory depends on what the allocator kept from before.
    """
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
