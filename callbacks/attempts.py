"""Measurements that may fail without costing the run anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lit_moeedit.sharding.ranks import Ranks


@contextmanager
def attempt(on_failure: Callable[[BaseException], None]) -> Iterator[None]:
    """Make a measurement on all ranks or on none; a failure costs nothing else. Every rank calls this.

    An interrupt is no failed measurement, whichever rank it came to: it is raised.

    Args:
        on_failure: called on every rank with its error, which names the rank that failed.
    """
    ranks, is_done = Ranks.current(), False
    try:
        with ranks.together():
            yield
        is_done = True
    except BaseException as error:
        # once done, it is an interrupt of this rank alone: the others have gone on
        if is_done or ranks.any(not isinstance(error, Exception)):
            raise
        on_failure(error)
