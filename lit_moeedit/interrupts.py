"""Temporary changes that are undone whatever breaks off the code that makes them, also a second Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from typing_extensions import override

_ATTEMPTS = 3
"""Number of times that an interrupted exit is tried: one more than the interrupts that can hit between two attempts."""


class Undo(ExitStack):
    """A context that undoes changes at its end, the last one first, and starts again if it is interrupted meanwhile.

    Python may raise ``KeyboardInterrupt`` between any two lines. So :meth:`by` comes *before* the change: its function
    may be called though nothing has changed yet, and may be called twice. An interrupt while changes are undone is
    raised when all of them are.

    Only undoing waits. Code inside the block can be interrupted as usual.

    Enter it by :func:`held`, because the ``with`` statement itself can be interrupted before it calls ``__exit__``.

    Example:
        >>> modes = {"training": True}
        >>> with held(Undo()) as undo:
        ...     undo.by(modes.update, training=True)
        ...     modes["training"] = False
        >>> modes
        {'training': True}
    """

    def __init__(self) -> None:
        super().__init__()
        self._undos: list[Callable[[], object]] = []

    @override
    def __enter__(self) -> Self:
        # a stack calls all of its callbacks, whatever the ones before have raised
        for _ in range(_ATTEMPTS):
            self.push(self._leave)
        return self

    def by(self, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Have a function called that undoes the change that comes next."""
        self._undos.append(partial(function, *args, **kwargs))

    def undo(self, down_to: int = 0) -> None:
        """Undo the changes now, but for the first ``down_to`` of them.

        Raises:
            KeyboardInterrupt: after all changes have been undone, if there was an interrupt meanwhile.
            Exception: likewise, if a change could not be undone.
        """
        error: BaseException | None = None
        while len(self._undos) > down_to:
            try:
                while len(self._undos) > down_to:
                    try:
                        self._undos[-1]()
                    except Exception as caught:  # the other changes must be undone all the same
                        error = caught
                    self._undos.pop()
            except KeyboardInterrupt as caught:
                error = caught
        if error is not None:
            raise error

    def _leave(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


U = TypeVar("U", bound=Undo)


@contextmanager
def held(undo: U) -> Iterator[U]:
    """Enter an :class:`Undo` such that it is left, even if an interrupt hits the code that leaves it.

    Args:
        undo: changes to undo at the end of the block.
    """
    # an interrupt between the end of a block and its __exit__ is met by the block around it. One in the caller's
    # ``with`` statement drops this generator, which closes it
    with undo, undo, undo:
        yield undo


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have Ctrl-C wait until the end of the block, for decisions that several processes must take alike.

    The block must be short, because nobody can stop it. In other threads than the main one, which gets no signals,
    this does nothing.
    """
    came: list[int] = []
    with held(Undo()) as undo:
        handler = signal.getsignal(signal.SIGINT)
        # a handler that was not set by Python cannot be set again
        if handler is not None and threading.current_thread() is threading.main_thread():
            undo.by(signal.signal, signal.SIGINT, handler)
            signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
        yield
    if came:
        signal.raise_signal(signal.SIGINT)
