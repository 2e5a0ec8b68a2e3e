"""The watch that ends ranks which wait for one that has failed alone.

A rank that fails within a collective operation of the model, such as DeepSpeed's gathering of weights, leaves the
others in it. No further collective operation can tell them. A store can: the rank that fails writes its reason there,
and a thread of every other rank reads it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import ClassVar
from weakref import WeakKeyDictionary, finalize

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

log = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two looks into the store."""
GRACE = 5.0
"""Seconds without any Python executed after which a rank is taken to wait for a rank that has failed."""
LEAVE = 10.0
"""The same, after which a rank is ended, if the failed rank's end has not woken it."""
ANSWER = 3.0
"""Seconds that a rank waits before it ends, for the others to read its reason: the store may end with it."""


class Watch:
    """A thread that looks for errors of other ranks and ends this process if it waits for one of them forever.

    There are two kinds of errors. One that is :meth:`posted <post>` is about to be told in a collective operation: the
    ranks that come to it go on, and :meth:`settle` it. If a rank does not come, because it stands still elsewhere, or
    the failed rank has left (:meth:`abandon`), it is over: :attr:`reason` is set on every rank, nothing collective
    must be begun any more, and a rank that still stands still is ended with exit code 1.

    A rank that is slow is left alone: standing still means that the main thread executes no Python for some seconds, in
    a block of :meth:`watching`, and after another rank has failed.

    Args:
        store: the ranks' common store, with keys that nobody else uses.
        rank: this rank.
        size: number of ranks.

    Attributes:
        reason: the first failure, once it is over.
    """

    _made: ClassVar[WeakKeyDictionary[dist.ProcessGroup, Watch]] = WeakKeyDictionary()

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.reason: str | None = None
        # a client of its own: others hold theirs locked while they wait in it
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._settled = self._depth = self._run_number = 0
        self._lock = threading.Lock()
        self._waiting = False
        self._pulse = Pulse()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lit_moeedit-watch", daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> Watch | None:
        """Return the watch of the processes of a group, and make it if there is none yet.

        Nothing collective, so it can be made before anything that is. It is stopped when the group is dropped.

        Args:
            group: the processes. ``None`` for all of them.

        Returns:
            ``None`` for one process, and where the processes have no common store.
        """
        group = dist.group.WORLD if group is None and dist.is_available() else group
        if group is None or group.size() == 1:
            return None
        if group not in cls._made:
            store = dist.distributed_c10d._get_default_store()
            members = str(dist.get_process_group_ranks(group))
            name = f"lit_moeedit/{sha256(members.encode()).hexdigest()}"
            try:
                # a launcher's store outlives groups of the same processes
                number = (store.add(name, 1) - 1) // group.size()
                made = cls(PrefixStore(f"{name}/{number}", store), group.rank(), group.size())
            except (NotImplementedError, RuntimeError):  # a store of another kind
                log.debug("", exc_info=True)
                return None
            cls._made[group] = made
            finalize(group, made.stop)  # called at the end of the process, too
        return cls._made[group]

    @property
    def is_own(self) -> bool:
        """Tell if the first failure is that of this rank."""
        return self.reason is not None and self.reason.startswith(f"rank {self.rank} ")

    # -- of the rank itself -------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Allow this process to be ended within this block."""
        counts = threading.current_thread() is threading.main_thread()  # of others it is not known if they stand still
        self._depth += counts
        try:
            yield
        finally:
            self._depth -= counts

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that this rank is where errors are told: the others may take their time."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def post(self, error: BaseException) -> None:
        """Tell the others' threads of an error that this rank is about to tell in a collective operation."""
        self._write(f"{self._run_number}/failed/{self._settled}", self._describe(error))

    def settle(self) -> None:
        """Forget the error posted last, on all ranks: all of them know it."""
        self._settled += 1

    def abandon(self, error: BaseException) -> None:
        """Tell the others that this rank comes to no collective operation any more, and wait until they know."""
        self._write(f"{self._run_number}/over", self._describe(error))
        others = [f"{self._run_number}/answer/{rank}" for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + ANSWER
        while time.monotonic() < deadline and not self._check(others):
            time.sleep(INTERVAL / 5)

    def leave(self, error: BaseException | None) -> None:
        """End a run that has failed on this rank; a script may go on with another one when all have failed.

        Args:
            error: what the others are told; ``None`` if they know.
        """
        if error is not None:
            self.abandon(error)
        with self._lock:
            self._run_number += 1
            self._settled, self.reason = 0, None

    def stop(self) -> None:
        """End the thread, and wait for it: one that comes back from the store while Python ends aborts the process."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(ANSWER)

    def _describe(self, error: BaseException) -> str:
        return f"rank {self.rank} failed: {type(error).__name__}: {error}"

    # -- the store ----------------------------------------------------------------------------------------------------

    def _write(self, key: str, text: str) -> None:
        """Write a text unless there is one already; the store ends with the process that holds it."""
        try:
            self._store.compare_set(key, "", text)
        except RuntimeError:
            log.debug("", exc_info=True)

    def _check(self, keys: list[str]) -> bool:
        try:
            return bool(self._store.check(keys))
        except RuntimeError:
            log.debug("", exc_info=True)
            return True

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode(errors="replace") if self._store.check([key]) else None

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            number = self._run_number
            try:
                over = self._read(f"{number}/over")
                failed = over or self._read(f"{number}/failed/{self._settled}")
            except RuntimeError:
                # the process that holds the store has ended: without a failure, if none was seen before
                log.debug("", exc_info=True)
                if self.reason is None:
                    return
                over = failed = self.reason
            with self._lock:
                if number != self._run_number:
                    continue
                if over is not None and self.reason is None:
                    self._learn(over)
                if failed is None or not self._depth:
                    self._pulse.forget()
                    continue
                seconds = self._pulse.seconds_since()
                if over is not None and seconds >= LEAVE:
                    self._end(over)
                elif over is None and seconds >= GRACE and not self._waiting:
                    self._write(f"{number}/over", failed)

    def _learn(self, reason: str) -> None:
        self.reason = reason
        if not self.is_own:
            log.error("%s; this rank cannot go on without it", reason)
        self._write(f"{self._run_number}/answer/{self.rank}", "known")

    def _end(self, reason: str) -> None:
        log.critical("%s; this rank has waited for it for %.0f s and is ended", reason, LEAVE)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # the thread that waits cannot be woken
        os._exit(1)


class Pulse:
    """The time for which the main thread has executed no Python.

    The interpreter is asked to make a call between two instructions of the main thread, whatever they are.
    """

    def __init__(self) -> None:
        self._beaten = True
        self._since: float | None = None
        # kept, because the interpreter holds no reference
        self._call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._beat)

    def _beat(self, _: object) -> int:
        self._beaten = True
        return 0

    def seconds_since(self) -> float:
        """Return the seconds since the main thread was last seen to execute Python, counted from the first call on."""
        now = time.monotonic()
        if self._beaten or self._since is None:
            self._since = now
        if self._beaten:
            self._beaten = False
            ctypes.pythonapi.Py_AddPendingCall(self._call, None)
        return now - self._since

    def forget(self) -> None:
        """Begin to count anew with the next call of :meth:`seconds_since`."""
        self._since = None
