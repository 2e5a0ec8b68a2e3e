"""The demo in one process and under ZeRO stage 3 in two: the same metrics, and the loss curves in one picture.

Run from the root of the repository, with the package and its extra ``deepspeed`` installed:

    python -m benchmarks.sharded --seed 1

Writes ``sharded.json``, ``sharded.md`` and ``sharded.png`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"one process": "atlas.yaml", "ZeRO-3, two processes": "atlas_zero3.yaml"}
METRICS = ("efficacy", "efficacy_accuracy", "generalization", "specificity_retained")


def run(config: str, seed: int, folder: Path) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Summary and training losses by step of one run."""
    command = [sys.executable, "-m", "lit_moeedit.cli", "fit", "--config", str(ROOT / "configs" / config)]
    command += [f"--seed_everything={seed}", f"--data.init_args.seed={seed}"]
    command += [f"--data.init_args.corpus.init_args.seed={seed}", f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.enable_progress_bar=false"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    with (folder / "logs/metrics.csv").open(encoding="utf-8", newline="") as file:
        losses = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row.get("train/loss")]
    return json.loads((folder / "summary.json").read_text(encoding="utf-8")), losses


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    results, figure = {}, plt.figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="training loss (nats, with label smoothing)")
    with tempfile.TemporaryDirectory() as temporary:
        for style, (name, config) in zip(("-", "--"), CONFIGS.items(), strict=True):
            summary, losses = run(config, arguments.seed, Path(temporary) / config)
            results[name] = {**numbers(summary), "losses": losses}
            axes.plot(*zip(*losses, strict=True), style, label=name)
    axes.legend()
    lines = ["| | " + " | ".join(CONFIGS) + " |", "|" + " --- |" * (len(CONFIGS) + 1)]
    for row in results["one process"]:
        if row != "losses":
            lines.append(f"| {row} | " + " | ".join(f"{result[row]:.3f}" for result in results.values()) + " |")
    text = "\n".join(lines) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "sharded.png", dpi=120)
    (arguments.output / "sharded.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    command = f"`python -m benchmarks.sharded --seed {arguments.seed}`"
    (arguments.output / "sharded.md").write_text(f"{command}\n\n{text}", encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
