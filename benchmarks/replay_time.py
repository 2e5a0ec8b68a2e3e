"""Time of a training step with statements of edited facts, over that of a step without: both in the same run.

Run from the root of the repository, with the package installed:

    OMP_NUM_THREADS=1 python -m benchmarks.replay_time --facts counterfact.json

The models are those of :mod:`benchmarks.survival`, trained on after their edit at 3 times the learning rate. The
callback is at work in every other block of as many steps as lie between two of its measurements, which are counted;
so whatever else the machine does meets steps with and without it alike. Intervals are over pairs of neighbouring
blocks. Writes ``replay_time.json`` and ``replay_time.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from benchmarks.survival_cases import Condition
from benchmarks.survival_report import NAMES
from benchmarks.survival_run import BATCH, processor, run
from benchmarks.training import arguments_of, header, quiet, row, write
from lit_moeedit.callbacks import EditReplay
from lit_moeedit.callbacks.needs import MEASURE_EVERY
from lit_moeedit.metrics import bootstrap_interval

EPOCHS = 2
"""Epochs of 256 steps."""


class EveryOtherBlock(EditReplay):
    """Replay that does nothing in every other block of steps, and the processor time of all blocks."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: list[float] = []
        self.statements = 0
        self.start = 0.0

    @property
    def block(self) -> int:
        return self.steps // MEASURE_EVERY

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.steps = 0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.block == len(self.seconds):
            self.seconds.append(0.0)
        self.start = time.process_time()
        if self.block % 2:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.statements += self._drawn

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.block % 2:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.seconds[-1] += time.process_time() - self.start
        self.steps += 1


def measure(name: str, seed: int, share: float, models: Path, facts_file: Path | None) -> dict[str, Any]:
    """Train an edited model on, and take the time of its steps."""
    made: list[EveryOtherBlock] = []

    def callbacks() -> list[L.Callback]:
        made.append(EveryOtherBlock(share=share))
        return [*made]

    every_other = Condition(callbacks=callbacks)
    options = [f"--trainer.max_epochs={EPOCHS}"]
    options += [f"--data.init_args.corpus.init_args.path={facts_file}"] if name == "counterfact" else []
    (found,) = run(
        name, seed, "3x", "replay in every other block", models, facts_file, *options, protection=every_other
    )
    (replay,) = made
    pairs = len(replay.seconds) // 2
    without, stated = replay.seconds[0 : 2 * pairs : 2], replay.seconds[1 : 2 * pairs : 2]
    return {
        "model": name, "edits": found["edits"], "seed": seed, "share": share, "processor": processor(),
        "statements": replay.statements / (pairs * MEASURE_EVERY * BATCH), "without": without, "with": stated,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown."""
    lines = header(
        ("model", "edits", "seed", "share", "statements for each row", "steps", "ms of a step without", "ratio")
    )
    for found in results:
        without, stated = (torch.tensor(found[side], dtype=torch.float64) for side in ("without", "with"))
        low, high = bootstrap_interval(stated, without).tolist()
        steps = 2 * MEASURE_EVERY * len(without)
        mean = 1e3 * statistics.mean(found["without"]) / MEASURE_EVERY
        ratio = f"{float(stated.sum() / without.sum()):.3f} ({low:.3f} to {high:.3f})"
        shares = f"{found['share']:.0%}", f"{found['statements']:.1%}"
        lines.append(row((found["model"], found["edits"], found["seed"], *shares, steps, f"{mean:.0f}", ratio)))
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it its model and text are left out")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05])
    arguments = parser.parse_args()
    quiet()
    results = [
        measure(name, seed, share, arguments.models, arguments.facts)
        for name in (NAMES if arguments.facts else NAMES[:1])
        for seed in arguments.seeds
        for share in arguments.shares
    ]
    text, threads = table(results), torch.get_num_threads()
    command = f"`python -m benchmarks.replay_time --facts counterfact.json`, {threads} thread(s); processor time"
    write("replay_time", command, text, results, arguments.output)
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
