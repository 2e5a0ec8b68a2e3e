"""What it costs in training loss to keep edits: those that training would leave alone, and those that it would undo.

Run from the root of the repository, with the package installed:

    OMP_NUM_THREADS=1 python -m benchmarks.survival_cost --facts counterfact.json

The CounterFact model of :mod:`benchmarks.survival` is trained on at 10 times the learning rate. Its edits are split by
whether they are still generated at the end of a run without protection. Each half, and all of them, are then edited and
trained on without protection and with replay, which states all of its facts, needed or not. The loss is that of the
rows of the data, over all steps of the continuation; errors are standard errors over the differences of single steps,
which have the same rows. Writes ``survival_cost.json`` and ``survival_cost.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from benchmarks.survival_cases import Condition
from benchmarks.survival_run import Watch, run
from benchmarks.training import arguments_of, header, quiet, row, write
from lit_moeedit.callbacks import EditReplay, KnowledgeEditing

NAME, CONTINUATION, SHARE = "counterfact", "10x", 0.05


class End(L.Callback):
    """The edits, those of them that are generated when training ends, and the loss of each step."""

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        editing = next(callback for callback in callbacks if isinstance(callback, KnowledgeEditing))
        self.edits = {fact.key for fact in editing.applied_facts}
        self.left = set(editing.generated(pl_module, editing.applied_facts))
        self.losses = list(next(callback for callback in callbacks if isinstance(callback, Watch)).losses)


def train_on(seed: int, models: Path, facts_file: Path, is_stated: bool, only: Collection[str] | None = None) -> End:
    """Edit and train on, with replay or without protection."""
    end = End()

    def callbacks() -> list[L.Callback]:
        return [*([EditReplay(share=SHARE, by_need=False)] if is_stated else []), end]

    path = f"--data.init_args.corpus.init_args.path={facts_file}"
    protection = Condition(callbacks=callbacks)
    run(
        NAME,
        seed,
        CONTINUATION,
        "replay" if is_stated else "nothing",
        models,
        facts_file,
        path,
        protection=protection,
        only=only,
    )
    return end


def measure(seed: int, models: Path, facts_file: Path) -> list[dict[str, Any]]:
    """Split the edits of one model, and train on with all, and with each part."""
    whole = train_on(seed, models, facts_file, False)
    parts = {"all": None, "left alone by training": whole.left, "undone by training": whole.edits - whole.left}
    results = []
    for name, only in parts.items():
        if only is not None and not only:
            continue
        without = whole if only is None else train_on(seed, models, facts_file, False, only)
        stated = train_on(seed, models, facts_file, True, only)
        differences = [a - b for a, b in zip(stated.losses, without.losses, strict=True)]
        results.append({
            "model": NAME, "seed": seed, "edits": name, "count": len(without.edits),
            "left": len(without.left), "left_with_replay": len(stated.left),
            "loss": statistics.mean(without.losses), "cost": statistics.mean(differences),
            "error": statistics.stdev(differences) / len(differences) ** 0.5,
        })  # fmt: skip
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown."""
    lines = header(("model", "seed", "edits", "number", "left without protection", "with replay", "loss", "by replay"))
    for found in results:
        cost, error = (
            f"{100 * found[name] / found['loss']:{sign}.2f}" for name, sign in (("cost", "+"), ("error", ""))
        )
        left = (f"{found[name] / found['count']:.2f}" for name in ("left", "left_with_replay"))
        case = (found["model"], found["seed"], found["edits"], found["count"])
        lines.append(row((*case, *left, f"{found['loss']:.4f}", f"{cost} ± {error} %")))
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--facts", type=Path, required=True, help="a CounterFact file")
    arguments = parser.parse_args()
    quiet()
    results: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        results += measure(seed, arguments.models, arguments.facts)
        text = table(results)
        command = f"`python -m benchmarks.survival_cost --facts counterfact.json`, {torch.get_num_threads()} thread(s)"
        write("survival_cost", command, text, results, arguments.output)
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
