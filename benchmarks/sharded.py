"""The demo in one process and under ZeRO stage 3 in two: the same metrics, and the loss curves in one picture.

Run from the root of the repository, with the package and its extra ``deepspeed`` installed:

    python -m benchmarks.sharded --seed 1

Two comparisons. *From nothing*: the whole demo, from fresh weights to the end. Training amplifies the order in which
sums are rounded, so one process is run with one and with two threads too: what these two differ by is no matter of
sharding. *From the same weights*: the demo from its edit on, with the edit at the start of the run. Writes
``sharded.json``, ``sharded.md`` and ``sharded.png`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from benchmarks.training import MODELS, RESULTS, ROOT, finish, header, quiet, row, trained

METRICS = ("efficacy", "efficacy_accuracy", "generalization", "specificity_retained")
RUNS: dict[str, tuple[list[str], int]] = {
    "one process, two threads": ([], 2),
    "one process, one thread": ([], 1),
    "ZeRO-3, two processes": (["atlas_zero3.yaml"], 1),
}
"""Configs that overlay the demo's, and the threads of each process."""
TITLES = ("From nothing", "From the same weights")
Curve = list[tuple[int, float]]


def run(configs: list[Path], seed: int, folder: Path, threads: int) -> tuple[dict[str, Any], Curve]:
    """Summary and training losses by step of one run."""
    command = [sys.executable, "-m", "lit_moeedit", "fit", *(f"--config={config}" for config in configs)]
    command += [f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    command += [f"--data.init_args.corpus.init_args.seed={seed}", f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.enable_progress_bar=false"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    with (folder / "logs/metrics.csv").open(encoding="utf-8", newline="") as file:
        losses = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row.get("train/loss")]
    return json.loads((folder / "summary.json").read_text(encoding="utf-8")), losses


def from_the_edit(weights: Path, folder: Path) -> Path:
    """A config that begins with the edit of weights that are there, and trains on as the demo does behind its edit."""
    config = yaml.safe_load((ROOT / "configs/atlas.yaml").read_text(encoding="utf-8"))
    editing = config["edit"]
    config["trainer"]["max_epochs"] -= editing["at"]["epoch"]
    editing["at"] = "fit_start"
    module = config["model"]["init_args"]
    rate = module["learning_rate"] * module["final_learning_rate"]
    module |= {"learning_rate": rate, "final_learning_rate": 1.0, "warmup": 0.0, "cosine_until": 1.0}
    module |= {"config": None, "pretrained": str(weights)}
    path = folder / "from_the_edit.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The numbers that are compared."""
    found = {
        f"{name}, {label}": summary[moment][name]
        for moment, label in (("after", "after the edit"), ("after_training", "at the end"))
        for name in METRICS
    }
    perplexity = summary["perplexity"]
    found["routing similarity"] = summary["routing"]["similarity"]
    return found | {f"perplexity, {moment.replace('_', ' ')}": value for moment, value in perplexity.items()}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: every number of every run."""
    lines = []
    for title, runs in results.items():
        lines += [f"{title}:", "", *header(["", *runs])]
        for name in next(iter(runs.values()))["numbers"]:
            lines.append(row([name, *(f"{found['numbers'][name]:.3f}" for found in runs.values())]))
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Training losses, the runs over each other."""
    figure, grid = plt.subplots(1, len(results), figsize=(7 * len(results), 4.5), layout="constrained", squeeze=False)
    for axes, (title, runs) in zip(grid[0], results.items(), strict=True):
        for style, (name, found) in zip(("-", ":", "--"), runs.items(), strict=False):
            axes.plot(*zip(*found["losses"], strict=True), style, label=name)
        axes.set(title=title, xlabel="optimizer step", ylabel="training loss (nats, with label smoothing)")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES), help="the others are kept")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="the others are kept")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that keeps trained weights")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "sharded.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results: dict[str, dict[str, dict[str, Any]]] = {title: known.get(title, {}) for title in TITLES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = trained("atlas", arguments.seed, arguments.models)
        found.model.save_pretrained(folder / "weights")
        found.tokenizer.save_pretrained(folder / "weights")
        bases = {
            "From nothing": ROOT / "configs/atlas.yaml",
            "From the same weights": from_the_edit(folder / "weights", folder),
        }
        for title, name in itertools.product(arguments.parts, arguments.runs):
            runs, (overlays, threads) = results[title], RUNS[name]
            configs = [bases[title], *(ROOT / "configs" / overlay for overlay in overlays)]
            summary, losses = run(configs, arguments.seed, folder / title / name, threads)
            runs[name] = {"numbers": numbers(summary), "losses": losses}
    results = {title: {name: runs[name] for name in RUNS if name in runs} for title, runs in results.items() if runs}
    missing = [f"{title}: {name}" for title in TITLES for name in RUNS if name not in results.get(title, {})]
    command = f"`python -m benchmarks.sharded --seed {arguments.seed}`"
    command += f"; not run: {'; '.join(missing)}" if missing else ""
    finish("sharded", command, table(results), picture, results, arguments.output)


if __name__ == "__main__":
    main()
