"""A rank that fails alone, within a collective operation or outside of any, leaves no other rank waiting for it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lit_moeedit.sharding import watch
from lit_moeedit.sharding.ranks import RankError, RankOutOfMemoryError, Ranks, RankTerminated, is_out_of_memory
from lit_moeedit.sharding.told_to_end import DeferredSignal
from tests.processes import Outcome, run_ranks, start_ranks

BOUND = 30.0
REASON = "rank 1 failed: MemoryError: no room"


def hurried(folder: str | None = None) -> Ranks:
    """Ranks whose watch has less patience, which is long against what a check takes all the same."""
    watch.INTERVAL, watch.GRACE, watch.LEAVE = 0.05, 1.0, 3.0
    if folder is not None:
        watch.log.addHandler(logging.FileHandler(f"{folder}/{os.environ['RANK']}.log"))
    return Ranks.current()


def logged(folder: Path, rank: int) -> str:
    return (folder / f"{rank}.log").read_text(encoding="utf-8")


def gather() -> None:
    """What the others do in a forward that is a collective operation."""
    dist.all_reduce(torch.ones(3))


def fail_in_a_forward(folder: str, error: BaseException) -> None:
    ranks = hurried(folder)
    with ranks.together():
        if ranks.rank == 1:
            raise error
        gather()


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt("stop")], ids=["error", "interrupt"])
def test_a_rank_that_fails_within_a_forward_leaves_nobody_waiting(error: BaseException, tmp_path: Path) -> None:
    first, second = start_ranks(fail_in_a_forward, 2, str(tmp_path), error, seconds=BOUND)
    reason = f"rank 1 failed: {type(error).__name__}: {error}"
    assert first.error is not None and f"RankError: {reason}" in first.error
    assert second.error is not None and type(error).__name__ in second.error and "RankError" not in second.error
    assert reason in logged(tmp_path, 0) and not logged(tmp_path, 1)


def out_of_memory_in_a_forward() -> str:
    """Smaller batches are of no use when the other rank is not there to make them."""
    ranks = hurried()
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise torch.OutOfMemoryError("no room")
            gather()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    with ranks.together():
        gather()
    return "went on"


@pytest.mark.slow
def test_one_rank_out_of_memory_within_a_forward_ends_both() -> None:
    for outcome in start_ranks(out_of_memory_in_a_forward, 2, seconds=BOUND):
        assert outcome.error is not None and "RankError: rank 1 failed: OutOfMemoryError: no room" in outcome.error


def slow() -> list[Any]:
    """The other rank works for longer than any limit, and comes to the check."""
    ranks, found = hurried(), []
    for error in (torch.OutOfMemoryError("no room"), ValueError("bad")):
        try:
            with ranks.together():
                if ranks.rank == 1:
                    raise error
                end = time.monotonic() + 3 * watch.GRACE
                while time.monotonic() < end:
                    time.sleep(0.3 * watch.GRACE)
        except BaseException as caught:
            found.append(type(caught))
        found.append(ranks.any(ranks.rank == 0))
    return found


def test_a_slow_rank_is_waited_for_when_another_has_failed() -> None:
    first, second = run_ranks(slow, 2, seconds=BOUND)
    assert first == [RankOutOfMemoryError, True, RankError, True]
    assert second == [torch.OutOfMemoryError, True, ValueError, True]


def slow_without_a_failure() -> bool:
    ranks = hurried()
    with ranks.together():
        if ranks.rank == 1:
            time.sleep(1.5 * watch.LEAVE)
        gather()
    return ranks.any(False)


@pytest.mark.slow
def test_no_rank_is_ended_while_none_has_failed() -> None:
    assert run_ranks(slow_without_a_failure, 2, seconds=BOUND) == [False, False]


def leave_and_stay(folder: str) -> None:
    """The rank that failed lives on, so that nothing wakes the other one."""
    ranks = hurried(folder)
    with ranks.watching():
        if ranks.rank == 0:
            gather()
        ranks.leave(MemoryError("no room"))
    time.sleep(2 * watch.LEAVE)


def test_a_rank_that_nothing_wakes_is_ended(tmp_path: Path) -> None:
    first, second = start_ranks(leave_and_stay, 2, str(tmp_path), seconds=BOUND)
    assert first == Outcome(1) and second.exitcode == 0
    said = logged(tmp_path, 0)
    assert f"{REASON}; this rank cannot go on without it" in said
    assert f"{REASON}; this rank has waited for it for 3 s and is ended" in said


WATCHED_TO_THE_END = """
import time
import torch.distributed as dist
from lit_moeedit.sharding import watch

watch.INTERVAL = 0.0  # so that the threads are in the store at almost any moment
dist.init_process_group("gloo")
assert all(watch.Watch.of(dist.new_group()) for _ in range(8))
time.sleep(0.2)
dist.barrier()
"""


def test_a_process_that_is_watched_ends_without_an_abort() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", WATCHED_TO_THE_END], env=common | {"RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [rank.wait(BOUND) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def told_to_end() -> Any:
    """One rank gets the signal, and all of them end at the next check with its exit code."""
    ranks = hurried()
    signal.signal(signal.SIGTERM, DeferredSignal(lambda: SystemExit(143)))
    if ranks.rank == 1:
        signal.raise_signal(signal.SIGTERM)
    for step in range(3):
        gather()
        try:
            ranks.check_errors()
        except SystemExit as ended:
            return step, type(ended), ended.code
    return None


def test_a_signal_to_one_rank_ends_all_at_the_next_check() -> None:
    assert run_ranks(told_to_end, 2, seconds=BOUND) == [(0, RankTerminated, 143), (0, SystemExit, 143)]


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("twice", [False, True])
def test_a_deferred_signal_is_raised_once_at_the_next_check(twice: bool) -> None:
    ranks, seen = Ranks(), []
    handler = DeferredSignal(lambda: KeyboardInterrupt("later"), lambda number, _: seen.append(number), twice)
    signal.signal(signal.SIGINT, handler)
    signal.raise_signal(signal.SIGINT)
    if twice:
        with pytest.raises(KeyboardInterrupt, match="later"):
            signal.raise_signal(signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="later"):
        ranks.check_errors()
    assert not ranks.any(False) and seen == [signal.SIGINT] * 2


@pytest.mark.usefixtures("handlers")
def test_an_error_of_its_own_comes_first() -> None:
    signal.signal(signal.SIGTERM, DeferredSignal(lambda: SystemExit(143)))
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(ValueError, match="mine"):
        Ranks().check_errors(ValueError("mine"))
    with pytest.raises(SystemExit):
        Ranks().check_errors()
