"""The demo over several seeds and kinds of preservation, as a table.

Run from the root of the repository, with the package installed:

    python -m benchmarks.atlas --seeds 0 1 2

For each seed the model is trained once. The default run edits and trains on; every other variant resumes from the
checkpoint just before the edit, so all variants of a seed edit the same weights. Writes ``atlas.json`` and ``atlas.md``
into ``benchmarks/results``.

A seed takes about 8 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.training import BY_FACT, RESULTS, cell, command_line, header, quiet, row, write
from lit_moeedit.callbacks import EditReplay, KnowledgeEditing
from lit_moeedit.preservation import CovariancePenalty, NullSpace

WITHOUT_REPLAY = "output, no replay"
COLUMNS = (
    ("after", "efficacy"),
    ("after", "generalization"),
    ("after", "specificity_retained"),
    ("after_training", "efficacy"),
    ("after_training", "efficacy_accuracy"),
    ("after_training", "generalization"),
    ("after_training", "specificity_retained"),
)


def variant(editing: KnowledgeEditing, name: str) -> None:
    """Change the config's editing into a variant of it."""
    editor = editing.editor
    if name == "nullspace":
        editor.preserve, editor.ridge = NullSpace(1.0), 0.1
    elif name == "none":
        editor.preserve, editor.ridge = None, 1.0
    elif name == "covariance":
        editor.preserve = CovariancePenalty(1e4)
    elif name not in ("output", WITHOUT_REPLAY):
        raise ValueError(f"no variant {name!r}")


VARIANTS = ("output", WITHOUT_REPLAY, "covariance", "nullspace", "none")


def run(seed: int, name: str, folder: Path, first: Path | None = None) -> dict[str, Any]:
    """Summary of one run of the demo's config; it starts from the checkpoint before the edit in ``first``, if given."""
    cli, editing = command_line(
        "atlas", seed, f"--trainer.default_root_dir={folder}", "--trainer.enable_checkpointing=true"
    )
    callbacks = cli.trainer.callbacks
    variant(editing, name)
    # checkpoints are named by the epoch that they end
    checkpoint = None if first is None else first / f"{editing.schedule.number - 1}.ckpt"
    dropped = (ModelCheckpoint, EditReplay) if name == WITHOUT_REPLAY else (ModelCheckpoint,)
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, dropped)]
    callbacks.append(
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True, auto_insert_metric_name=False)
    )
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def values_of(summary: dict[str, Any]) -> list[float]:
    """The numbers of one run, in the order of the table's columns."""
    routing, perplexity = summary["routing"], summary["perplexity"]
    above = [value for i, value in routing["per_layer"].items() if int(i) > routing["first_edited_layer"]]
    values = [summary[moment][metric] for moment, metric in COLUMNS]
    values += [statistics.mean(above), min(above)]
    return [*values, *(perplexity[moment] / perplexity["before"] for moment in ("after", "after_training"))]


def bounds_of(summary: dict[str, Any]) -> list[tuple[float, float] | None]:
    """The intervals of one run; ``None`` of what is no mean over facts."""
    return [*(summary["intervals"][moment].get(metric) for moment, metric in COLUMNS), *[None] * 4]


HEADER = (
    "variant", "seed", "efficacy", "generalization", "retained", "efficacy, end", "generated, end",
    "generalization, end", "retained, end", "routing above", "routing, lowest layer", "perplexity ×",
    "perplexity ×, end",
)  # fmt: skip


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: one row per run with its intervals, and the mean of each variant with its range."""
    lines = header(HEADER)
    for name, by_seed in results.items():
        runs = [values_of(summary) for summary in by_seed.values()]
        for seed, own in by_seed.items():
            lines.append(row([name, seed, *map(cell, values_of(own), bounds_of(own))]))
        means = [cell(statistics.mean(own), spread=(min(own), max(own))) for own in zip(*runs, strict=True)]
        lines.append(row([name, "mean", *means]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in ("output", *arguments.variants)}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in arguments.seeds:
            first = Path(temporary) / f"{seed}"
            results["output"][str(seed)] = run(seed, "output", first)
            for name in arguments.variants:
                if name != "output":
                    results[name][str(seed)] = run(seed, name, Path(temporary) / f"{seed}-{name}", first)
    text = table(results)
    seeds = " ".join(map(str, arguments.seeds))
    command = f"`python -m benchmarks.atlas --seeds {seeds}`: {BY_FACT}"
    write("atlas", command, text, results, arguments.output)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
