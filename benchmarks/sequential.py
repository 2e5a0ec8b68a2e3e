"""Ten batches of 20 edits one after another, with and without a memory of past edits: what is left of all of them.

Run from the root of the repository, with the package installed:

    python benchmarks/sequential.py --seeds 0 1 2

For each seed the demo's model is trained once on the atlas; then every variant edits 200 facts, 20 at a time, from the
same weights. The facts are of 200 countries, so no two of them have the same subject. After each batch all facts edited
so far are evaluated. Three settings: the demo's covariance penalty; no preservation at all, where edits disturb each
other most; and 16 optimizer steps between two edits, at the learning rate that the demo ends with. The second moments
are those of the trained model, taken once (with training in between anew for each edit, from fewer texts). Writes
``sequential.json``, ``sequential.md`` and ``sequential.png`` into ``benchmarks/results``.

With ``--work`` weights and finished runs are kept in a folder, and a benchmark that was broken off goes on from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.cli import EditingCLI
from lit_moeedit.data import FactsDataModule
from lit_moeedit.editing import EditMemory, Editor, Evaluation, evaluate, second_moments
from lit_moeedit.module import LitMoE

ROOT = Path(__file__).resolve().parents[1]
BATCHES, SIZE, STEPS = 10, 20, 16
METRICS = ("efficacy", "efficacy_accuracy", "generalization", "specificity_retained")
# 200 facts in 3 contexts at 4 experts each are 2400 keys per layer
MEMORIES: dict[str, Callable[[], EditMemory | None]] = {
    "no memory": lambda: None,
    "memory": EditMemory,
    "memory of 1/8 of the keys": lambda: EditMemory(limit=300),
}
SETTINGS = {
    "": tuple(MEMORIES),
    "no preservation": ("no memory", "memory"),
    f"{STEPS} steps between": ("no memory", "memory"),
}
"""What else is different, and the memories that are compared there."""


def demo(seed: int, arguments: list[str]) -> tuple[EditingCLI, Editor]:
    """Model, data and trainer of the demo's config with 200 facts to edit, and the config's editor."""
    seeds = ["--seed_everything", "--data.init_args.seed", "--data.init_args.corpus.init_args.seed"]
    cli = EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=[
            *("--config", str(ROOT / "configs/atlas.yaml")),
            *(f"{name}={seed}" for name in seeds),
            f"--data.init_args.corpus.init_args.edits={BATCHES * SIZE}",
            "--data.init_args.corpus.init_args.neighbours=1",
            *("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"),
            *arguments,
        ],
        run=False,
    )
    callbacks = cli.trainer.callbacks
    editor = next(callback.editor for callback in callbacks if isinstance(callback, KnowledgeEditing))
    ours = (KnowledgeEditing, RoutingMonitor, EditReport)
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, ours)]
    return cli, editor


def train(seed: int, path: Path) -> None:
    """Train the demo's model for the four epochs before its edit."""
    # the demo's cosine ends there, after two thirds of its six epochs
    epochs = ["--trainer.max_epochs=4", "--model.init_args.cosine_until=1", "--model.init_args.warmup=0.075"]
    cli, _ = demo(seed, epochs)
    cli.trainer.fit(cli.model, cli.datamodule)
    save_file({name: tensor.contiguous() for name, tensor in cli.model.model.state_dict().items()}, path)


class Observer(EditListener):
    """Evaluates all facts edited so far after each edit."""

    def __init__(self, cli: EditingCLI) -> None:
        self.cli = cli
        self.batches: list[dict[str, Any]] = []
        cli.datamodule.setup("fit")
        self.facts = cli.datamodule.edit_facts()
        self.baseline: dict[str, list[bool]] | None = None
        self.baseline = self.evaluate(BATCHES).neighbours_exact

    def evaluate(self, batches: int) -> Evaluation:
        model, tokenizer = self.cli.model.model, self.cli.datamodule.tokenizer
        return evaluate(model, tokenizer, self.facts[: batches * SIZE], self.baseline)

    def look(self) -> None:
        done = len(self.batches) + 1
        evaluation = self.evaluate(done)
        said, metrics = evaluation.edits_exact, evaluation.metrics
        found = {name: metrics[name] for name in METRICS}
        found["oldest"], found["newest"] = (float(part.float().mean()) for part in (said[:SIZE], said[-SIZE:]))
        self.batches.append(found)

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self.look()


def run(seed: int, setting: str, memory: str, weights: Path) -> list[dict[str, Any]]:
    """What is left of all edits after each batch."""
    arguments = [f"--trainer.max_epochs={BATCHES + 1}", f"--data.init_args.samples_per_epoch={64 * STEPS}"]
    # the learning rate of the demo after its edit
    rate = {"learning_rate": 4e-5, "final_learning_rate": 1, "warmup": 0}
    arguments += [f"--model.init_args.{name}={value}" for name, value in rate.items()]
    cli, editor = demo(seed, arguments)
    cli.model.configure_model()
    cli.model.model.load_state_dict(load_file(weights))
    editor.memory = MEMORIES[memory]()
    if setting == "no preservation":
        editor.preserve, editor.ridge = "none", 1.0
    observer = Observer(cli)
    if setting.endswith("between"):
        cli.datamodule.preservation_samples = 1024
        editing = KnowledgeEditing(editor, at={"every_n_epochs": 1, "batch": SIZE})
        cli.trainer.callbacks[:0] = [editing, observer]
        cli.trainer.fit(cli.model, cli.datamodule)
    else:
        model, tokenizer = cli.model.model, cli.datamodule.tokenizer
        moments = {}
        if editor.preserve != "none":
            moments = second_moments(model, tokenizer, editor.check(model), cli.datamodule.preservation_texts())
        for number in range(BATCHES):
            facts = observer.facts[number * SIZE : (number + 1) * SIZE]
            editor.edit(model, tokenizer, facts, moments=moments)
            observer.look()
    if editor.memory is not None:
        observer.batches[-1]["memory"] = {layer: editor.memory.size(layer) for layer in editor.layers}
    return observer.batches


def table(results: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """Markdown: what is left of all 200 edits at the end."""
    header = ["variant", "seed", "efficacy", "accuracy", "generalization", "retained"]
    header += ["accuracy, first 20", "accuracy, last 20", "keys per layer"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, by_seed in results.items():
        rows: dict[str, list[float]] = {}
        for seed, batches in by_seed.items():
            last = batches[-1]
            keys = [size[1] for size in last.get("memory", {}).values()]
            rows[str(seed)] = [last[metric] for metric in (*METRICS, "oldest", "newest")]
            rows[str(seed)] += [statistics.mean(keys) if keys else 0.0]
        rows["mean"] = [statistics.mean(values) for values in zip(*rows.values(), strict=True)]
        for seed, values in rows.items():
            cells = [*(f"{value:.3f}" for value in values[:-1]), f"{values[-1]:.0f}"]
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, dict[int, list[dict[str, Any]]]], path: Path) -> None:
    """Curves over the batches, a row of axes for each setting: the mean of the seeds, and their spread."""
    shown = {
        "efficacy_accuracy": "edits said",
        "efficacy": "efficacy",
        "generalization": "generalization",
        "specificity_retained": "neighbours retained",
    }
    size = (3.6 * len(shown), 2.9 * len(SETTINGS))
    figure, axes = plt.subplots(
        len(SETTINGS), len(shown), figsize=size, sharex=True, sharey="row", layout="constrained"
    )
    at = [SIZE * (number + 1) for number in range(BATCHES)]
    for (setting, memories), row in zip(SETTINGS.items(), axes, strict=True):
        for (metric, label), ax in zip(shown.items(), row, strict=True):
            for memory in memories:
                by_seed = results[f"{setting}, {memory}".removeprefix(", ")]
                values = torch.tensor([[batch[metric] for batch in batches] for batches in by_seed.values()])
                color = f"C{list(MEMORIES).index(memory)}"
                ax.plot(at, values.mean(0), "--" if "of" in memory else "-", color=color, label=memory, marker=".")
                ax.fill_between(at, values.min(0).values, values.max(0).values, color=color, alpha=0.15, linewidth=0)
            ax.grid(alpha=0.3)
            ax.set_title(f"{label} ({setting or 'covariance'})", fontsize=9)
    for ax in axes[-1]:
        ax.set(xlabel="facts edited", xticks=at[1::2])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for weights and finished runs (default: none is kept)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    logging.getLogger("lightning").setLevel(logging.ERROR)
    # LightningCLI takes what it finds there for its own
    sys.argv = sys.argv[:1]
    variants = {
        f"{setting}, {memory}".removeprefix(", "): (setting, memory)
        for setting, memories in SETTINGS.items()
        for memory in memories
    }
    results: dict[str, dict[int, list[dict[str, Any]]]] = {variant: {} for variant in variants}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) if arguments.work is None else arguments.work
        work.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            weights = work / f"{seed}.safetensors"
            if not weights.exists():
                train(seed, weights)
            for variant, (setting, memory) in variants.items():
                kept = work / f"{seed} {variant.replace('/', ' ')}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(run(seed, setting, memory, weights)), encoding="utf-8")
                results[variant][seed] = json.loads(kept.read_text(encoding="utf-8"))
    text = table(results)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "sequential.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    command = f"python benchmarks/sequential.py --seeds {' '.join(map(str, arguments.seeds))}"
    (arguments.output / "sequential.md").write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")
    draw(results, arguments.output / "sequential.png")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
