"""Real processes for tests of what happens between ranks: bounded in time, and never left behind.

Ranks are forked from a process that has imported this package and all that it uses, and done nothing else
(:mod:`tests.preloaded`). Every rank is a new process with a state of its own, and imports cost once per test process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 150.0
ROOT = Path(__file__).resolve().parents[1]
FORKING = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
"""What the process that ranks are forked from has to know before it imports anything."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: its exit code (negative for a signal), what it returned, or the traceback it died of."""

    exitcode: int | None
    value: Any = None
    error: str | None = None


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however that ends."""
    ctypes.CDLL("libc.so.6", use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _enter(
    rank: int, port: int, group: bool, folder: str, environment: dict[str, str], function: Callable[..., Any], args: Any
) -> None:
    die_with_parent()
    os.environ.clear()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    outcome: dict[str, Any] = {}
    try:
        if group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        outcome["value"] = function(*args)
    except BaseException:
        outcome["error"] = traceback.format_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    beside = Path(folder) / f"{rank}.part"
    torch.save(outcome, beside)
    beside.replace(Path(folder) / str(rank))
    # no teardown: a rank that waits for one that has failed would wait for long
    os._exit(1 if "error" in outcome else 0)


def start_ranks(
    function: Callable[..., Any], size: int, *args: Any, group: bool = True, seconds: float = SECONDS
) -> list[Outcome]:
    """Run ``function(*args)`` in ``size`` new processes and return how each ended; none outlives this call.

    Args:
        function: of a test module; its return value has to be picklable.
        size: number of processes; each knows its rank from the environment.
        args: for the function, the same in all processes.
        group: whether to make the default process group (gloo); otherwise the function does.
        seconds: processes that live longer are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **sizes, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    # Lightning leaves the seed of an earlier run of this process there
    environment.pop("PL_GLOBAL_SEED", None)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_enter, args=(rank, port, group, folder, environment, function, args), daemon=True)
            for rank in range(size)
        ]
        try:
            with mock.patch.dict(os.environ, FORKING):  # the first start reads it
                for process in processes:
                    process.start()
            deadline = time.monotonic() + seconds
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
            for rank in late:
                processes[rank].kill()
                processes[rank].join()
        outcomes = []
        for rank, process in enumerate(processes):
            path = Path(folder) / str(rank)
            found = torch.load(path, weights_only=False) if path.exists() else {}
            if rank in late:
                found = {"error": f"rank {rank} was still running after {seconds:.0f} s"}
            outcomes.append(Outcome(process.exitcode, found.get("value"), found.get("error")))
    return outcomes


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, group: bool = True, seconds: float = SECONDS
) -> list[Any]:
    """The return values of ``function(*args)`` in ``size`` processes; an assertion error if one of them failed."""
    outcomes = start_ranks(function, size, *args, group=group, seconds=seconds)
    errors = [f"rank {rank} failed:\n{outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    assert not errors, "\n".join(errors)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exitcode == 0, f"rank {rank} ended with exit code {outcome.exitcode}"
    return [outcome.value for outcome in outcomes]


def run_each(calls: dict[str, tuple[Any, ...]], size: int) -> dict[str, list[Any]]:
    """Run several functions one after the other in the same processes.

    Args:
        calls: by name a function and its arguments.
        size: number of processes.

    Returns:
        by name, the results by rank; a function that failed, and those after it, are not in it.
    """
    found = run_ranks(_each, size, calls)
    return {name: [results[name] for results in found] for name in calls if all(name in results for results in found)}


def _each(calls: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    results = {}
    for name, (function, *args) in calls.items():
        try:
            results[name] = function(*args)
        except Exception:
            sys.stderr.write(f"{name} failed on rank {os.environ['RANK']}:\n{traceback.format_exc()}\n")
            break
    return results


def run_code(code: str) -> None:
    """Run Python code in a process that has imported nothing yet; an assertion error with its stderr if it failed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
