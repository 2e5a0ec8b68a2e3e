"""A rank that was launched does not outlive its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_moeedit.launched import LAUNCHER

BOUND = 30.0

LAUNCH = """
import os, subprocess, sys, time
from lit_moeedit.launched import end_with_launcher
end_with_launcher()
if os.environ.get("LOCAL_RANK", "0") == "0":
    subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | {"LOCAL_RANK": "1"})
else:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_launched_rank_ends_when_its_launcher_is_killed() -> None:
    command = [sys.executable, "-c", LAUNCH]
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", LAUNCHER)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        launcher.kill()
    deadline = time.monotonic() + BOUND
    try:
        while _runs(rank) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(rank)
    finally:
        if _runs(rank):
            os.kill(rank, signal.SIGKILL)


def _runs(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
