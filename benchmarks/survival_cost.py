"""What it costs in training loss to keep edits: those that training would leave alone, and those that it would undo.

Run from the root of the repository, with the package installed:

    OMP_NUM_THREADS=1 python -m benchmarks.survival_cost --facts counterfact.json

The CounterFact model of :mod:`benchmarks.survival` is trained on at 10 times the learning rate. Its edits are split by
whether they are still generated at the end of a run without protection. Each half, and all of them, are then edited and
trained on without protection and with replay, which states all of its facts, needed or not. The loss is that of the
rows of the data, over all steps of the continuation. Its interval (95 %) is over the differences of single steps, which
have the same rows: how much other steps would change it on the same models. It takes the differences for independent,
and is too narrow if those of neighbouring steps are alike. The means over seeds also have the range of the seeds.
Writes ``survival_cost.json`` and ``survival_cost.md`` into ``benchmarks/results``.
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
Z = 1.96
"""Standard errors in half of a 95 % interval."""


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
    """Format the results as Markdown: those of each seed, and the means over seeds of each part of the edits."""
    lines = header(("model", "seed", "edits", "number", "left without protection", "with replay", "loss", "by replay"))
    lines += [
        line(found["seed"], [found]) for found in sorted(results, key=lambda found: (found["seed"], found["edits"]))
    ]
    for name in dict.fromkeys(found["edits"] for found in results):
        own = [found for found in results if found["edits"] == name]
        if len(own) > 1:
            lines.append(line(", ".join(str(found["seed"]) for found in own), own))
    return "\n".join(lines)


def line(seed: object, own: list[dict[str, Any]]) -> str:
    """Format the mean of results of the same part of the edits, in percent of the loss without protection."""
    costs = [100 * found["cost"] / found["loss"] for found in own]
    variance = sum((100 * found["error"] / found["loss"]) ** 2 for found in own) / len(own) ** 2
    mean, half = statistics.mean(costs), Z * variance**0.5
    number = sum(found["count"] for found in own)
    left = (f"{sum(found[name] for found in own) / number:.2f}" for name in ("left", "left_with_replay"))
    loss = statistics.mean(found["loss"] for found in own)
    spread = f" [{min(costs):+.2f} to {max(costs):+.2f}]" if len(own) > 1 else ""
    cost = f"{mean:+.2f} % ({mean - half:+.2f} to {mean + half:+.2f}){spread}"
    return row((own[0]["model"], seed, own[0]["edits"], number, *left, f"{loss:.4f}", cost))


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
