"""Processes that torchrun starts edit a folder together: one result, written and printed once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest

from lit_moeedit.edits import read_edits, verify
from lit_moeedit.edits.folders import load_model
from lit_moeedit.edits.stored import StoredModel
from lit_moeedit.reports import FactRow, read_rows
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.standalone import edit, processes
from tests.processes import ROOT, run_ranks, start_ranks

pytestmark = pytest.mark.slow

SECONDS = 120.0
PLACE = ("--layers", "[0,1]", "--token", "last")


@dataclass(frozen=True)
class Ended:
    """How torchrun ended."""

    exitcode: int
    out: str
    err: str


def torchrun(*arguments: object) -> Ended:
    """Run ``lit-moeedit edit`` in two processes; none of them outlives this call."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    process = subprocess.Popen(
        [*command, "lit_moeedit", "edit", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            ranks = children(process.pid)
            process.kill()
            for rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            process.communicate()
    return Ended(process.returncode, out, err)


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    return [
        int(number) for path in Path(f"/proc/{process}/task").glob("*/children") for number in path.read_text().split()
    ]


def test_two_processes_write_and_print_once(base: Path, facts_file: Path, tmp_path: Path) -> None:
    ended = torchrun(base, facts_file, tmp_path / "out", *PLACE, "--min-efficacy", "0.25")
    assert ended.exitcode == 0, ended.err
    assert "Traceback" not in ended.err
    assert ended.out.count("p(new)") == ended.out.count("no text to preserve") == 1
    assert ended.out.count(": edit-0001") == 1
    rows = read_rows(tmp_path / "out" / "edits.jsonl")
    assert any(row.measured["after"].holds for row in rows)
    edited = load_model(tmp_path / "out")
    assert {presence.status for presence in verify(edited, read_edits(tmp_path / "out"))} == {"applied"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "facts.jsonl", "out"]


def test_too_few_facts(base: Path, facts_file: Path, tmp_path: Path) -> None:
    facts_file.write_text('{"subject": "Rome", "prompt": "Rome lies in", "target_new": "Latin Spain Peru four Latin"}')
    # one row does not steer five tokens
    ended = torchrun(base, facts_file, tmp_path / "out", "--layers", "[0,1]", "--token", "subject_last")
    assert ended.exitcode != 0
    assert ended.out.count("p(new)") == ended.out.count("nothing is changed") == 1
    # the first rank prints and fails last; torchrun may still find the other one at its very end, and ends that
    assert "(exitcode: 3) local_rank: 0" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "facts.jsonl"]


def edited_rows(base: Path, facts: Path, output: Path, texts: Sequence[str]) -> Sequence[FactRow]:
    """Edit in one of several processes, and return what it knows."""
    return edit(base, facts, output, layers=[0, 1], token="last", preservation=texts, min_efficacy=0.25).rows


def test_ranks_know_the_same(base: Path, facts_file: Path, texts: Sequence[str], tmp_path: Path) -> None:
    first, second = run_ranks(edited_rows, 2, base, facts_file, tmp_path / "out", texts, group=False)
    assert first == second == tuple(read_rows(tmp_path / "out" / "edits.jsonl"))


def full_on_the_first(base: Path, facts: Path, output: Path, texts: Sequence[str]) -> str:
    """Edit in one of several processes, where the first cannot write, and return how that ends."""
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(StoredModel, "copy", full), pytest.raises((OSError, RankError)) as raised:
        edited_rows(base, facts, output, texts)
    return f"{raised.type.__name__}: {raised.value}"


def test_a_disk_that_is_full(base: Path, facts_file: Path, texts: Sequence[str], tmp_path: Path) -> None:
    first, second = run_ranks(full_on_the_first, 2, base, facts_file, tmp_path / "out", texts, group=False)
    assert first == "OSError: [Errno 28] No space left on device"
    assert second.startswith("RankError: rank 0 failed: OSError")
    assert [own.name for own in read_edits(tmp_path / "out.unfinished")] == ["edit-0001"]


def slow_first(seconds: float) -> None:
    """Keep the second process waiting for the first one."""
    with (
        mock.patch.object(processes, "PATIENCE", timedelta(seconds=seconds)),
        processes.launched_ranks(),
        Ranks.current().together(),
    ):
        time.sleep(6 * (int(os.environ["RANK"]) == 0))


def test_a_first_rank_that_writes_for_long_is_waited_for() -> None:
    assert timedelta(days=1) <= processes.PATIENCE
    assert all(outcome.exitcode == 0 for outcome in start_ranks(slow_first, 2, 60.0, group=False))
    assert any(outcome.exitcode != 0 for outcome in start_ranks(slow_first, 2, 2.0, group=False))
