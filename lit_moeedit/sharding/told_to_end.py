"""Signals that are raised where all ranks can fail together, not in the middle of a collective operation."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class DeferredSignal:
    """A signal handler that keeps an exception until the next :meth:`take`.

    :meth:`~lit_moeedit.sharding.ranks.Ranks.check_errors` takes it, so that a signal to one rank ends an edit on all of
    them.

    Args:
        make: makes the exception.
        then: called at every signal, with the handler's arguments.
        twice: whether a second signal, which comes before the first one was taken, raises at once.
    """

    def __init__(self, make: Callable[[], BaseException], then: Handler | None = None, twice: bool = False) -> None:
        self._make, self._then, self._twice = make, then, twice
        self.received = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Keep the signal, as a handler of the module ``signal``."""
        again, self.received = self.received, True
        if self._then is not None:
            self._then(number, frame)
        if again and self._twice:
            raise self._make()

    @classmethod
    def take(cls) -> BaseException | None:
        """Return the exception of a signal that has come to such a handler, once; ``None`` if none has.

        Example:
            >>> DeferredSignal.take() is None
            True
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if isinstance(handler, cls) and handler.received:
                handler.received = False
                return handler._make()
        return None
