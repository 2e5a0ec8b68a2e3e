"""All broken and hostile input that there is a table of: see ``hostile_runs.py`` and ``hostile_facts.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.hostile_facts import FILES, check_files, measure_memory

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def test_no_run_shows_a_traceback_runs_code_hangs_or_leaves_half_files() -> None:
    # runs are forked there, from a process of one thread
    command = [sys.executable, "-m", "tests.acceptance.hostile_runs"]
    # several threads wait for each other in turns where other tests have the cores, and a run seems to hang
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def test_every_facts_file_is_read_or_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # put back afterwards
    found = check_files()
    assert len(found) >= len(FILES) - 1
    for one in found:
        assert one["exit"] in (0, 1) and one["said"][0], one
        assert not any("Traceback" in line for line in one["said"]), one
    assert sum(one["exit"] for one in found) > len(found) / 2


def test_memory_for_reading_does_not_grow_with_the_file() -> None:
    # a row is held at a time: a line of 64 MiB is refused before it is read, rows of 1 kB take what buffers take
    for one in measure_memory(2**25):
        assert one["memory MiB"] < 16, one
