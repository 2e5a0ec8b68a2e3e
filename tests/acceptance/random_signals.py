"""Send signals to runs at random moments and inside edits, resume them, and compare them with an undisturbed run.

Each run trains a tiny model for three epochs, edits a fact before the second and the third, and writes a checkpoint
after each. A signal goes to one of its processes: SIGKILL, SIGINT or SIGTERM, at a moment drawn with a seed. All
processes must have ended within 30 seconds, without a launcher that kills them. SIGINT and SIGTERM must be named in the
output of every rank, and the exit code must tell that the run did not finish. The run is then resumed from its last
checkpoint and must end with the weights, the optimizer's state and the edits of the undisturbed run, bit for bit, and
no left-over file::

    python -m tests.acceptance.random_signals --output benchmarks/results
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml

from lit_moeedit.callbacks import EditListener
from lit_moeedit.data.fact import Fact
from tests.acceptance.forked import run_and_exit
from tests.acceptance.hostile_runs import made, sound_files
from tests.processes import die_with_parent

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
BOUND = 30.0
"""Seconds within which all processes have to end after a signal."""
PATIENCE = 150.0
"""Seconds after which a run that got no signal is taken to hang."""
FINISHED = "`Trainer.fit` stopped: `max_epochs"
JOINED = "joined"
EDIT_STARTED, EDIT_TOOK = "edit-started", "edit-took"
EPOCHS = (1, 2)
"""Those that begin with an edit."""


class Marker(EditListener):
    """Writes files that tell when a rank has joined the run, and that an edit is being made."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / EDIT_STARTED

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.path.with_name(f"{JOINED}-{trainer.global_rank}").touch()

    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self.started = time.monotonic()
        if trainer.is_global_zero:
            self.path.write_text(str(trainer.current_epoch), encoding="utf-8")

    def on_edit_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.path.unlink()
            took = time.monotonic() - self.started
            self.path.with_name(f"{EDIT_TOOK}-{trainer.current_epoch}").write_text(str(took), encoding="utf-8")


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: what it ends with, its seconds once all ranks have joined, and those of its edits."""

    state: dict[str, Any]
    seconds: float
    edits: dict[int, float]


@dataclass(frozen=True)
class Case:
    """A signal to one process of a run."""

    ranks: int
    signal: signal.Signals
    inside_edit: bool
    rank: int
    seed: int

    @property
    def name(self) -> str:
        where = "one process" if self.ranks == 1 else f"rank {self.rank} of {self.ranks} (ZeRO-3)"
        return f"{self.signal.name} to {where}, {'inside an edit' if self.inside_edit else 'at a random moment'}"


def cases(count: int, seed: int = 0) -> list[Case]:
    """Draw cases that take all combinations in turn: signals, one process and two ranks, moments."""
    kinds = itertools.cycle(itertools.product((1, 2), SIGNALS, (False, True)))
    draw = random.Random(seed)
    return [
        Case(ranks, number, inside, draw.randrange(ranks), draw.randrange(2**32))
        for ranks, number, inside in itertools.islice(kinds, count)
    ]


class Run:
    """The processes of one run of the command, forked from this one, which has imported everything."""

    def __init__(self, folder: Path, ranks: int, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.outputs = [folder / f"output-{rank}" for rank in range(ranks)]
        self.started = time.monotonic()
        self.codes: dict[int, int] = {}
        self.processes = []
        for rank in range(ranks):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            process = os.fork()
            if not process:
                _child(folder, self.outputs[rank], environment if ranks > 1 else {}, options)
            self.processes.append(process)

    def wait(self, seconds: float) -> bool:
        """Wait until all processes have ended, or for this long; tells if they have."""
        deadline = time.monotonic() + seconds
        while len(self.codes) < len(self.processes):
            for rank, process in enumerate(self.processes):
                if rank not in self.codes:
                    ended, status = os.waitpid(process, os.WNOHANG)
                    if ended:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def wait_until_joined(self) -> float:
        """Wait until all ranks have joined the run; returns when that was."""
        files = [self.outputs[rank].with_name(f"{JOINED}-{rank}") for rank in range(len(self.processes))]
        while not all(file.exists() for file in files) and not self.wait(0):
            time.sleep(0.01)
        return time.monotonic()

    def end(self) -> None:
        """Kill what is left."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                os.kill(process, signal.SIGKILL)
        self.wait(10)

    def output(self, rank: int) -> str:
        """All that a rank wrote, without the control characters of a terminal."""
        text = self.outputs[rank].read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _child(folder: Path, output: Path, environment: dict[str, str], options: Sequence[str]) -> NoReturn:
    """Run the command as a launcher starts it."""
    die_with_parent()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # pytest has put others in their place
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    for name in ("lightning.pytorch", "lightning.fabric"):  # whose handlers hold those that were there at the import
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    # a process in the background begins with the signal ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    args = ["fit", f"--config={folder / 'run.yaml'}", *options]
    run_and_exit(folder, args, {"COLUMNS": "160", "OMP_NUM_THREADS": "1", **environment}, lambda: None)


class Bench:
    """The sound files, and undisturbed runs to compare with."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.sound = place / "sound"
        self.sound.mkdir()
        self._config = sound_files(self.sound)
        self._whole: dict[int, Whole] = {}

    def folder(self, name: str, ranks: int) -> Path:
        """Make the folder of a run."""
        folder = self.place / name
        folder.mkdir()
        config = json.loads(json.dumps(self._config))
        trainer = config["trainer"]
        trainer |= {"default_root_dir": str(folder / "run"), "max_epochs": 3, "enable_checkpointing": True}
        trainer["callbacks"][0]["init_args"] |= {
            "at": {"every_n_epochs": 1, "batch": 1},
            "on_failure": "keep",
        }
        trainer["callbacks"] += [
            made("tests.acceptance.random_signals.Marker", folder=str(folder)),
            made("lightning.pytorch.callbacks.ModelCheckpoint", dirpath=str(folder / "kept"), save_last=True),
        ]
        config["data"]["init_args"] |= {"batch_size": 4, "samples_per_epoch": 16}
        config["data"]["init_args"]["corpus"]["init_args"]["edits"] = 3
        if ranks > 1:
            trainer |= {"devices": ranks, "use_distributed_sampler": False}
            strategy = {"stage": 3, "param_persistence_threshold": 0}
            trainer["strategy"] = made("lit_moeedit.sharding.cpu_strategy.DeepSpeedCPUStrategy", **strategy)
        (folder / "run.yaml").write_text(yaml.safe_dump(config), "utf-8")
        return folder

    def whole(self, ranks: int) -> Whole:
        """Return what there is to know of an undisturbed run."""
        if ranks not in self._whole:
            folder = self.folder(f"whole-{ranks}", ranks)
            run = Run(folder, ranks)
            joined = run.wait_until_joined()
            if not run.wait(PATIENCE) or any(run.codes.values()):
                run.end()
                raise RuntimeError(f"the undisturbed run failed: {run.output(0)}")
            seconds = time.monotonic() - joined
            edits = {epoch: float((folder / f"{EDIT_TOOK}-{epoch}").read_text("utf-8")) for epoch in EPOCHS}
            self._whole[ranks] = Whole(state(folder / "kept" / "last.ckpt"), seconds, edits)
        return self._whole[ranks]

    def try_out(self, case: Case, full: bool = False) -> Result:
        """Run a case, resume it, and find what must not be."""
        whole = self.whole(case.ranks)
        draw = random.Random(case.seed)
        folder = self.folder("work", case.ranks)
        try:
            run = Run(folder, case.ranks)
            is_inside = _wait_for_moment(run, folder, case, draw, whole)
            moment = time.monotonic() - run.started
            hit = case.rank not in run.codes
            if hit:
                os.kill(run.processes[case.rank], case.signal)
            sent = time.monotonic()
            ended = run.wait(BOUND)
            took = time.monotonic() - sent
            run.end()
            if full:
                for rank in range(case.ranks):
                    sys.stdout.write(f"---- rank {rank}\n{run.output(rank)}\n")
            faults = list(_faults(case, run, hit)) if ended else [f"still running after {BOUND:.0f} s"]
            faults += self._resume(folder, case, whole.state, full)
            codes = ", ".join(str(run.codes[rank]) for rank in range(case.ranks))
            return Result(case, moment, is_inside, codes, took, faults)
        finally:
            shutil.rmtree(folder)

    def _resume(self, folder: Path, case: Case, whole: dict[str, Any], full: bool) -> Iterator[str]:
        (folder / EDIT_STARTED).unlink(missing_ok=True)
        run = Run(folder, case.ranks, "--ckpt_path=last")
        if not run.wait(PATIENCE):
            yield "the resumed run hangs"
        elif any(run.codes.values()):
            yield f"the resumed run failed: {run.output(0).strip().splitlines()[-1]}"
        elif differences := list(differing(whole, state(folder / "kept" / "last.ckpt"))):
            yield f"the resumed run differs: {differences[:3]}"
        run.end()
        if full:
            sys.stdout.write(f"---- resumed\n{run.output(0)}\n")
        left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".")]
        if left:
            yield f"left {', '.join(left)}"


@dataclass(frozen=True)
class Result:
    """How a case ended."""

    case: Case
    moment: float
    is_inside: bool
    codes: str
    seconds: float
    faults: list[str]

    @property
    def row(self) -> str:
        where = "an edit" if self.is_inside else "-"
        told = "; ".join(self.faults) or "none"
        return f"| {self.case.name} | {self.moment:.2f} | {where} | {self.codes} | {self.seconds:.1f} | {told} |"


def _wait_for_moment(run: Run, folder: Path, case: Case, draw: random.Random, whole: Whole) -> bool:
    """Wait for the moment of a case; tells if an edit is being made then."""
    marker = folder / EDIT_STARTED
    if case.inside_edit:
        epoch = draw.choice(EPOCHS)
        while not run.wait(0) and not (marker.exists() and marker.read_text("utf-8") == str(epoch)):
            time.sleep(0.001)
        run.wait(draw.uniform(0, whole.edits[epoch]))
    else:
        if case.ranks > 1:
            run.wait_until_joined()  # before, it is the launcher that ends ranks whose peer has died
        run.wait(draw.uniform(0, whole.seconds))
    return marker.exists()


def _faults(case: Case, run: Run, hit: bool) -> Iterator[str]:
    if not hit or FINISHED in run.output(0):
        return
    code = run.codes[case.rank]
    expected = {128 + case.signal, -case.signal}
    if code not in expected:
        last = run.output(case.rank).strip().rpartition("\n")[2]
        yield f"exit code {code} of the process that got the signal, whose last words are: {last}"
    silent = [rank for rank in range(case.ranks) if rank != case.rank and not run.codes[rank]]
    if silent:
        yield f"exit code 0 of rank {silent[0]}"
    if case.signal == signal.SIGKILL or code < 0:
        return
    names = {signal.SIGINT: "KeyboardInterrupt", signal.SIGTERM: "SIGTERM"}
    for rank in range(case.ranks):
        if rank != case.rank and names[case.signal] not in run.output(rank):
            yield f"rank {rank} does not name the reason"


def state(path: Path) -> dict[str, Any]:
    """Everything of a checkpoint that two runs must have in common, by file or key."""
    if path.is_dir():
        files = {str(file.relative_to(path)): file for file in path.rglob("*.pt")}
        found = {name: torch.load(file, weights_only=False) for name, file in files.items()}
    else:
        found = {"": torch.load(path, weights_only=False)}
    for contents in found.values():
        # paths, and how long things took
        callbacks = contents.get("callbacks", {})
        contents["callbacks"] = {key: value for key, value in callbacks.items() if key.startswith("KnowledgeEditing")}
        for key in ("loops", "datamodule_hyper_parameters", "ds_config", "hyper_parameters"):
            contents.pop(key, None)
    return found


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the places where two structures are not the same, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{path}/{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield path
        for index, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from differing(left, right, f"{path}/{index}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield path
    elif type(one) is not type(other) or (isinstance(one, int | float | str | bool | None) and one != other):
        yield path


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for random_signals.md")
    parser.add_argument("--count", type=int, default=60, help="number of signals")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--only", default="", help="a pattern; run the cases whose names it is found in")
    parser.add_argument("--full", action="store_true", help="show all that the runs wrote")
    arguments = parser.parse_args()
    table = [
        "| signal | after s | within | exit codes | all ended after s | faults |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    faulty = 0
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        for case in cases(arguments.count, arguments.seed):
            if not re.search(arguments.only, case.name):
                continue
            result = bench.try_out(case, arguments.full)
            table.append(result.row)
            sys.stdout.write(result.row + "\n")
            sys.stdout.flush()
            faulty += bool(result.faults)
    if arguments.output:
        title = (
            f"{len(table) - 2} signals to runs at random moments (seed {arguments.seed}) and inside edits, {faulty} of "
            "them with faults: `python -m tests.acceptance.random_signals`\n\n"
            "Every run was resumed, and compared with an undisturbed run bit for bit.\n\n"
        )
        (arguments.output / "random_signals.md").write_text(title + "\n".join(table) + "\n", encoding="utf-8")
    if faulty:
        raise SystemExit(f"{faulty} signals with faults")


if __name__ == "__main__":
    main()
