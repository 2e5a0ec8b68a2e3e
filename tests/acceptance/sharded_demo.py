"""The demo's edit from the same trained weights: in one process, under FSDP2 and under expert parallelism in two.

The demo is trained once in one process up to its edit (or taken from ``--models``). Each run then makes the edit with
the config's own callback when `fit` starts, and takes a training step at learning rate 0. The table has all metrics of
``summary.json`` before and after the edit::

    python -m tests.acceptance.sharded_demo --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sharded import from_the_edit
from benchmarks.training import MODELS, ROOT, header, quiet, row, trained

RUNS: dict[str, list[str]] = {
    "one process": [],
    "FSDP2, two processes": ["--config=recipe:atlas_fsdp"],
    "expert parallelism with FSDP2, two processes": [
        "--config=recipe:atlas_fsdp",
        "--model.init_args.expert_parallel_size=2",
    ],
}
"""Further arguments of each run."""
BOUND = 5e-4
"""Largest difference from one process: half of the third decimal."""


def run(config: Path, folder: Path, seed: int, further: list[str]) -> dict[str, Any]:
    """Edit in a run of the command; returns its summary."""
    options = {
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "data.init_args.corpus.init_args.seed": seed,
        "trainer.default_root_dir": folder,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 1,
        "model.init_args.learning_rate": 0.0,
    }
    command = [sys.executable, "-m", "lit_moeedit", "fit", f"--config={config}", *further]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of a summary that are compared; one that the demo has no facts for is ``None`` there."""
    found = {f"{name}, {moment}": summary[moment][name] for moment in ("before", "after") for name in summary[moment]}
    routing = summary["routing"]
    found |= {f"routing {name}": routing[name] for name in ("similarity", "kl")}
    found |= {f"routing similarity, layer {layer}": value for layer, value in routing["per_layer"].items()}
    found |= {f"perplexity, {moment}": summary["perplexity"][moment] for moment in ("before", "after")}
    return {name: value for name, value in found.items() if value is not None}


def table(results: dict[str, dict[str, float]]) -> tuple[list[str], float]:
    """Markdown of all numbers, and the largest difference from the first run."""
    first, *others = results.values()
    if any(found.keys() != first.keys() for found in others):
        raise ValueError(f"the runs have other metrics: {[sorted(found.keys() ^ first.keys()) for found in others]}")
    lines = header(["", *results])
    for name in first:
        lines.append(row([name, *(f"{found[name]:.3f}" for found in results.values())]))
    largest = max(abs(found[name] - value) for found in others for name, value in first.items())
    return lines, largest


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that keeps trained weights")
    parser.add_argument("--output", type=Path, help="folder for sharded_demo.md")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = trained("atlas", arguments.seed, arguments.models)
        found.model.save_pretrained(folder / "weights")
        found.tokenizer.save_pretrained(folder / "weights")
        config = from_the_edit(folder / "weights", folder)
        summaries = {
            name: run(config, folder / str(number), arguments.seed, further)
            for number, (name, further) in enumerate(RUNS.items())
        }
    edits = {name: summary["edits"] for name, summary in summaries.items()}
    lines, largest = table({name: numbers(summary) for name, summary in summaries.items()})
    text = "\n".join([*lines, "", f"Largest difference from one process: {largest:.1e}", ""])
    sys.stdout.write(text)
    if arguments.output:
        title = f"`python -m tests.acceptance.sharded_demo --seed {arguments.seed}`, {min(edits.values())} edits\n\n"
        (arguments.output / "sharded_demo.md").write_text(title + text, encoding="utf-8")
    if len(set(edits.values())) > 1 or largest > BOUND:
        raise SystemExit(f"the runs differ: {edits}, by up to {largest:.1e}")


if __name__ == "__main__":
    main()
