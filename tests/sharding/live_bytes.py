"""Counting what a piece of code keeps in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations have made, from there until they die.

    The resident memory of a small process is libraries and what the allocator keeps.

    Attributes:
        alive: bytes now.
        peak: most bytes since the last :meth:`rise` began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._drop, key)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)

    def _drop(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    @contextmanager
    def rise(self, found: list[int]) -> Iterator[None]:
        """A block whose peak above its beginning is appended to ``found``."""
        start = self.peak = self.alive
        yield
        found.append(self.peak - start)
