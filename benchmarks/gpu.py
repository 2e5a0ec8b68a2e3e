"""Proofs and measurements on one NVIDIA card in six minutes: edits as on the CPU, in the middle of `fit`, their cost.

Run from the root of the repository, with the package installed:

    python -m benchmarks.gpu

Models are random, by the configs of published ones; nothing is downloaded. What a smaller card has no room for, what
needs DeepSpeed and finds none, and what the time did not suffice for is named as left out. Parts that fail do not stop
the others; the exit code is 1 if one failed, or a check did not pass. Writes ``gpu.json`` and ``gpu.md`` into
``benchmarks/results`` after each part, and ``gpu.png`` at the end. Without a card, ``--device cpu --tiny`` runs all of
it with tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_models, gpu_report
from benchmarks.gpu_fit import STRATEGIES
from benchmarks.gpu_phases import Deadline, Subject, free
from benchmarks.gpu_report import FEW, MANY
from benchmarks.training import RESULTS, ROOT, quiet, write

GRAPHS = f"{FEW}, CUDA graphs"
SIZES = {FEW: (50, 6), MANY: (1000, 12)}
"""Facts that are edited, and how many with tiny models."""
TOKENS = {"whole": 439_000, "one layer": 50_000, "moments": 30_000}
"""Of preservation text."""
TINY_TOKENS = 2000


class Parts:
    """Everything that is run, by name.

    Args:
        device: where.
        tiny: whether with tiny models.
        deadline: when to stop.
    """

    def __init__(self, device: torch.device, tiny: bool, deadline: Deadline) -> None:
        self.device, self.tiny, self.deadline = device, tiny, deadline
        self.words = gpu_models.tokenizer()
        self.folder = tempfile.TemporaryDirectory()
        self._whole: Subject | None = None
        self._ended = False, "it was not started"

    def all(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The parts, in order; what is large goes before what a hanging process could delay."""
        return {
            "CPU against GPU": lambda: gpu_checks.compare_devices(self.device, self.words, 2 if self.tiny else 4),
            "second moments": self.moments,
            FEW: self.few,
            MANY: self.many,
            "one layer of GPT-OSS-20B": lambda: self.one_layer(gpu_models.GPT_OSS),
            "one layer of Qwen3.6-35B-A3B": lambda: self.one_layer(gpu_models.QWEN36),
            # behind the others on the card, which a failed recording may leave unusable
            GRAPHS: self.graphs,
            **{f"fit, {name}": lambda name=name: self.fit(name) for name in STRATEGIES},
        }

    def moments(self) -> dict[str, Any]:
        """Second moments against float64."""
        case = gpu_models.case_of(gpu_models.QWEN3, self.tiny)
        return gpu_checks.compare_moments(self.device, self.words, case, self._tokens("moments"))

    def few(self) -> dict[str, Any]:
        """A whole edit."""
        subject = self._subject()
        return subject.found | subject.edit(self._count(FEW))

    def many(self) -> dict[str, Any]:
        """An edit of many facts with second moments of less text."""
        subject = self._subject()
        return subject.found | subject.edit(self._count(MANY), subject.some_moments(), count_targets=False)

    def graphs(self) -> dict[str, Any]:
        """Targets whose steps are recorded: proofs as before, and an edit."""
        if self.device.type != "cuda":
            raise gpu_models.LeftOutError("a CPU records no CUDA graphs")
        proved = gpu_checks.compare_devices(self.device, self.words, 4, gpu_checks.recording_editor)
        self.drop()
        subject = self._subject()
        found = subject.edit(self._count(FEW), subject.some_moments(), count_targets=False, cuda_graphs=True)
        return subject.found | found | {"checks": proved["checks"] + found["checks"]}

    def one_layer(self, case: gpu_models.Case) -> dict[str, Any]:
        """An edit of one layer of another model, with another one above it."""
        self.drop()
        case = gpu_models.case_of(case, self.tiny)
        subject = Subject(case, self.device, self.words, self._tokens("one layer"), self.deadline)
        return subject.found | subject.edit(self._count(FEW))

    def fit(self, name: str) -> dict[str, Any]:
        """A run of `fit`, in a process that ends with the deadline.

        On a card each has a process of its own, so that the next one finds all of its memory free.
        """
        self.drop()
        file = Path(self.folder.name) / f"{name}.json"
        if not file.exists():
            wanted = [name] if self.device.type == "cuda" else list(STRATEGIES)[list(STRATEGIES).index(name) :]
            command = [sys.executable, "-m", "benchmarks.gpu_fit", "--device", str(self.device)]
            command += ["--output", self.folder.name, "--strategies", *wanted, *(["--tiny"] if self.tiny else [])]
            try:
                seconds = max(1.0, self.deadline.left())
                done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False)
                last = (done.stderr.splitlines() or [""])[-1]
                self._ended = False, f"its process ended with exit code {done.returncode}: {last}"
            except subprocess.TimeoutExpired:
                self._ended = True, "the time was over before it was done"
        # of the process that had this run to make, maybe as one of several
        late, said = self._ended
        if not file.exists():
            raise gpu_models.LeftOutError(said) if late else RuntimeError(said)
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.pop("unfinished", False):
            if not late:
                raise RuntimeError(said)
            found["resume left out"] = said
        if "left out" in found:
            raise gpu_models.LeftOutError(found["left out"])
        if "failed" in found:
            raise RuntimeError(found["failed"])
        return found

    def drop(self) -> None:
        """Make room on the card."""
        self._whole = None
        free()

    def _subject(self) -> Subject:
        if self._whole is None:
            case = gpu_models.case_of(gpu_models.QWEN3, self.tiny)
            self._whole = Subject(case, self.device, self.words, self._tokens("whole"), self.deadline)
        return self._whole

    def _tokens(self, name: str) -> int:
        return TINY_TOKENS if self.tiny else TOKENS[name]

    def _count(self, name: str) -> int:
        return SIZES[name][self.tiny]


def machine(device: torch.device) -> dict[str, Any]:
    """The card, the driver and the packages."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "lightning", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        found["driver"] = driver()
    else:
        found |= {"card": None, "threads": torch.get_num_threads()}
    return found


def driver() -> str | None:
    """Version of the card's driver, if its own tool reports it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.strip().splitlines()[0] if said.strip() else None


def run(name: str, part: Callable[[], dict[str, Any]], deadline: Deadline) -> dict[str, Any]:
    """The outcome of a part: its findings, the reason why it was left out, or its error; and the seconds it took."""
    if deadline.left() < 0:
        return {"status": "left out", "reason": "the time was over"}
    start = time.perf_counter()
    try:
        found: dict[str, Any] = {"status": "done", "found": part()}
    except gpu_models.LeftOutError as reason:
        found = {"status": "left out", "reason": str(reason)}
    except Exception as error:  # one part must not lose the others
        sys.stderr.write(f"{name} failed:\n{traceback.format_exc()}")
        found = {"status": "failed", "reason": traceback.format_exception_only(error)[-1].strip().splitlines()[0]}
    return found | {"took": time.perf_counter() - start}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, as a CPU needs them")
    parser.add_argument("--seconds", type=float, default=360.0, help="parts that would begin later are left out")
    parser.add_argument("--parts", nargs="+", help="only those whose name contains one of these")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no card here; --device cpu --tiny runs all of it with tiny models")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the models have the sizes of published ones")
    quiet()
    device, deadline = torch.device(options.device), Deadline(options.seconds)
    if device.type == "cpu":
        # DeepSpeed reads it when something imports it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    parts = Parts(device, options.tiny, deadline)
    results: dict[str, Any] = {"tiny": options.tiny, "device": options.device, "machine": machine(device), "parts": {}}
    command = "`python -m benchmarks.gpu" + (" --device cpu" if options.device == "cpu" else "")
    command += " --tiny" if options.tiny else ""
    command += f" --seconds {options.seconds:g}" if options.seconds != parser.get_default("seconds") else ""
    # without all parts this is no report of the card
    command += f" --parts {' '.join(options.parts)}`" if options.parts else "`"
    for name, part in parts.all().items():
        if options.parts and not any(some in name for some in options.parts):
            results["parts"][name] = {"status": "left out", "reason": "not asked for"}
            continue
        results["parts"][name] = run(name, part, deadline)
        # a later part may end this process
        write("gpu", command, gpu_report.report(results), results, options.output)
    gpu_report.draw(results, options.output / "gpu.png")
    parts.drop()
    parts.folder.cleanup()
    sys.stdout.write(gpu_report.report(results))
    return int(not gpu_report.sound(results))


if __name__ == "__main__":
    sys.exit(main())
