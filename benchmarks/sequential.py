"""Ten batches of 20 edits one after another, with and without a memory of past edits: and the state of all of them.

Run from the root of the repository, with the package installed:

    python -m benchmarks.sequential --seeds 0 1 2

For each seed the demo's model is trained once on the atlas; then every variant edits 200 facts, 20 at a time, from the
same weights. The facts are of 200 countries, so no two of them have the same subject. After each batch all facts edited
so far are evaluated. Three settings: the demo's preservation; no preservation at all, where edits disturb each
other most; and 16 optimizer steps between two edits, at the learning rate that the demo ends with. The second moments
are those of the trained model, taken once (with training in between anew for each edit, from fewer texts). Writes
``sequential.json``, ``sequential.md`` and ``sequential.png`` into ``benchmarks/results``.

Runs that are in the JSON are not made again; ``--fresh`` begins anew.

Three seeds take about 20 minutes on one core.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch

from benchmarks.training import (
    BY_FACT,
    arguments_of,
    command_line,
    corpus_options,
    header,
    label_of,
    mean_of,
    only,
    quiet,
    row,
    shares_by_fact,
    trained,
    write,
)
from lit_moeedit.callbacks import EditReplay, EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.cli import EditingCLI
from lit_moeedit.editing import EditMemory, Evaluation, evaluate, second_moments

WATCHING = (RoutingMonitor, EditReport, EditReplay)
BATCHES, SIZE, STEPS = 10, 20, 16
METRICS = ("efficacy", "efficacy_accuracy", "generalization", "specificity_retained")
# 200 facts in 3 contexts at 4 experts each are 2400 keys per layer, and some targets have several tokens
MEMORIES: dict[str, Callable[[], EditMemory | None]] = {
    "no memory": lambda: None,
    "memory": EditMemory,
    "memory of 1/9 of the keys": lambda: EditMemory(limit=300),
}
SETTINGS = {
    "": tuple(MEMORIES),
    "no preservation": ("no memory", "memory"),
    f"{STEPS} steps between": ("no memory", "memory"),
}
"""Further differences, and the memories that are compared there."""


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
        if done == BATCHES:
            found = only({**found, "by_fact": shares_by_fact(evaluation, self.facts)}, METRICS)
        found["oldest"], found["newest"] = (float(part.float().mean()) for part in (said[:SIZE], said[-SIZE:]))
        self.batches.append(found)

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self.look()


def run(seed: int, setting: str, memory: str, models: Path) -> list[dict[str, Any]]:
    """Measure all edits so far after each batch."""
    corpus = corpus_options(edits=BATCHES * SIZE, neighbours=1)
    weights = trained("atlas", seed, models, *corpus).model.state_dict()
    arguments = [*corpus, "--trainer.limit_val_batches=0", f"--trainer.max_epochs={BATCHES + 1}"]
    arguments.append(f"--data.init_args.samples_per_epoch={64 * STEPS}")
    # the learning rate of the demo after its edit
    rate = {"learning_rate": 4e-5, "final_learning_rate": 1, "warmup": 0}
    arguments += [f"--model.init_args.{name}={value}" for name, value in rate.items()]
    cli, editing = command_line("atlas", seed, *arguments)
    editor = editing.editor
    cli.trainer.callbacks[:] = [c for c in cli.trainer.callbacks if not isinstance(c, (KnowledgeEditing, *WATCHING))]
    cli.model.configure_model()
    cli.model.model.load_state_dict(weights)
    editor.memory = MEMORIES[memory]()
    if setting == "no preservation":
        editor.preserve, editor.ridge = None, 1.0
    observer = Observer(cli)
    if setting.endswith("between"):
        cli.datamodule.preservation_samples = 1024
        batches = KnowledgeEditing(editor, at={"every_n_epochs": 1, "batch": SIZE}, on_failure="keep")
        cli.trainer.callbacks[:0] = [batches, observer]
        cli.trainer.fit(cli.model, cli.datamodule)
    else:
        model, tokenizer = cli.model.model, cli.datamodule.tokenizer
        moments = {}
        if editor.preserve is not None:
            texts = cli.datamodule.preservation_texts()
            moments = second_moments(model, tokenizer, editor.check(model), texts, gated=editor.gated)
        for number in range(BATCHES):
            facts = observer.facts[number * SIZE : (number + 1) * SIZE]
            editor.edit(model, tokenizer, facts, moments=moments)
            observer.look()
    if editor.memory is not None:
        observer.batches[-1]["memory"] = {layer: editor.memory.size(layer) for layer in editor.layers}
    return observer.batches


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Markdown: what is left of all 200 edits at the end."""
    columns = ["variant", "efficacy", "generated", "generalization", "retained"]
    lines = header([*columns, "generated, first 20", "generated, last 20", "keys per layer"])
    for name, by_seed in results.items():
        last = [batches[-1] for batches in by_seed.values()]
        keys = [size[1] for own in last for size in own.get("memory", {}).values()]
        cells = [mean_of(last, metric) for metric in (*METRICS, "oldest", "newest")]
        name = label_of(name, by_seed, next(iter(results.values())))
        lines.append(row([name, *cells, f"{statistics.mean(keys) if keys else 0.0:.0f}"]))
    return "\n".join(lines)


def draw(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Curves over the batches, a row of axes for each setting: the mean of the seeds, and their spread."""
    shown = {
        "efficacy_accuracy": "edits said",
        "efficacy": "efficacy",
        "generalization": "generalization",
        "specificity_retained": "neighbours retained",
    }
    size = (3.6 * len(shown), 2.9 * len(SETTINGS))
    figure, grid = plt.subplots(
        len(SETTINGS), len(shown), figsize=size, sharex=True, sharey="row", layout="constrained"
    )
    at = [SIZE * (number + 1) for number in range(BATCHES)]
    for (setting, memories), axes in zip(SETTINGS.items(), grid, strict=True):
        for (metric, label), ax in zip(shown.items(), axes, strict=True):
            for memory in memories:
                by_seed = results[f"{setting}, {memory}".removeprefix(", ")]
                values = torch.tensor([[batch[metric] for batch in batches] for batches in by_seed.values()])
                color = f"C{list(MEMORIES).index(memory)}"
                ax.plot(at, values.mean(0), "--" if "of" in memory else "-", color=color, label=memory, marker=".")
                ax.fill_between(at, values.min(0).values, values.max(0).values, color=color, alpha=0.15, linewidth=0)
            ax.grid(alpha=0.3)
            ax.set_title(f"{label} ({setting or 'as the demo'})", fontsize=9)
    for ax in grid[-1]:
        ax.set(xlabel="facts edited", xticks=at[1::2])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "sequential.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not arguments.fresh else {}
    seeds = [*map(str, arguments.seeds)]
    command = f"`python -m benchmarks.sequential --seeds {' '.join(seeds)}`: means over the seeds ({BY_FACT})"
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for setting, memories in SETTINGS.items():
        for memory in memories:
            variant = f"{setting}, {memory}".removeprefix(", ")
            own = results[variant] = {seed: known[variant][seed] for seed in seeds if seed in known.get(variant, {})}
            for seed in seeds:
                own[seed] = own.get(seed) or run(int(seed), setting, memory, arguments.models)
                write("sequential", command, table(results), {**known, **results}, arguments.output)
    draw(results, arguments.output / "sequential.png")
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
