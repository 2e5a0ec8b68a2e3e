"""All editors on the same trained weights: quality, seconds by phase, and growth with the number of edits.

Run from the root of the repository, with the package installed:

    python benchmarks/editing.py --cache CACHE --parts atlas --seeds 0 1 2
    python benchmarks/editing.py --cache CACHE --parts counterfact growth --facts counterfact.json

Each seed's model is trained once and kept in ``CACHE``; every editor then edits a fresh copy of it. Parts add their
results to ``editing.json`` in ``benchmarks/results``; ``editing.md`` and ``editing.png`` are made from all of it.
Without ``--facts`` the parts that need a CounterFact file are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import reference
from matplotlib import pyplot as plt
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.cli import EditingCLI
from lit_moeedit.data import Fact, FactsDataModule, read_facts
from lit_moeedit.editing import PHASES, Editor, FineTuning, evaluate
from lit_moeedit.editing.routing import trace_routing
from lit_moeedit.metrics import RoutingSimilarity
from lit_moeedit.module import LitMoE
from lit_moeedit.solvers import BlockCoordinateDescent, PerExpertRidge, Tucker

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"atlas": "configs/atlas.yaml", "counterfact": "configs/counterfact.yaml"}
EDITS = {"atlas": 50, "counterfact": 100}
REFERENCE = "one fact at a time"
QUALITY = ("efficacy", "generalization", "specificity", "specificity_retained", "utility", "routing")
HARD = {"atlas": (1.0, 0.1), "counterfact": (1.0, 0.1)}
"""Threshold and ridge of the null space, which the configs do not have; the papers' are for models of other scales."""


class StopAt(L.Callback):
    """Ends the training where the edit would be."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


@dataclass
class Trained:
    """A model just before its edit, and what the run would edit it with."""

    model: PreTrainedModel
    data: FactsDataModule
    editor: Editor
    seconds: float


def trained(name: str, seed: int, cache: Path, facts: Path | None) -> Trained:
    """Train the config's model up to its edit, or take it from the cache."""
    corpus = "--data.init_args.corpus.init_args"
    arguments = ["--config", str(ROOT / CONFIGS[name]), "--seed_everything", str(seed)]
    arguments += ["--data.init_args.seed", str(seed), f"{corpus}.edits", str(EDITS[name])]
    arguments += [f"{corpus}.path", str(facts)] if name == "counterfact" else [f"{corpus}.seed", str(seed)]
    arguments += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    cli = EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=arguments,
        run=False,
    )
    module, data = cli.model, cli.datamodule
    editing = next(callback for callback in cli.trainer.callbacks if isinstance(callback, KnowledgeEditing))
    file = cache / f"{name}-{seed}.safetensors"
    if file.exists():
        data.setup("fit")
        module.configure_model()
        module.model.load_state_dict(load_file(file))
        seconds = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["seconds"]
    else:
        cli.trainer.callbacks[:] = [StopAt(editing.schedule.number)]
        start = time.perf_counter()
        cli.trainer.fit(module, data)
        seconds = time.perf_counter() - start
        cache.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in module.model.state_dict().items()}, file)
    return Trained(module.model.eval(), data, editing.editor, seconds)


def changed(editor: Editor, **settings: Any) -> Editor:
    """The editor with other settings."""
    other = copy.copy(editor)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


def editors(base: Editor, name: str) -> dict[str, Editor]:
    """Every editor, with the config's targets and layers."""
    threshold, ridge = HARD[name]
    hard = {"preserve": "nullspace", "threshold": threshold, "ridge": ridge}
    found = {
        "Woodbury, covariance": base,
        "Woodbury, null space": changed(base, **hard),
        "BCD, null space (MoEEdit)": changed(base, solver=BlockCoordinateDescent(passes=4), **hard),
        "Tucker, covariance": changed(base, solver=Tucker()),
        "Tucker, null space (MoTE)": changed(base, solver=Tucker(), **hard),
    }
    shared: dict[str, Any] = {"layers": base.layers, "contexts": base.contexts, "steps": 60, "stop": base.targets.stop}
    return found | {
        "MEMIT per expert": changed(base, solver=PerExpertRidge()),
        "FT": FineTuning(learning_rate=1e-3, **shared),
        "FT-L": FineTuning(learning_rate=1e-3, norm_constraint=5e-3, **shared),
    }


def run_reference(base: Editor, name: str) -> Callable[..., dict[str, float]]:
    """The one-fact-at-a-time edit with the same settings as the null-space editors."""
    threshold, ridge = HARD[name]
    names = ("steps", "learning_rate", "clamp", "weight_decay", "kl", "stop")
    settings = reference.Settings(
        layers=base.layers,
        token=base.token,
        contexts=base.contexts,
        neutral=base.neutral,
        threshold=threshold,
        ridge=ridge,
        **{name: getattr(base.targets, name) for name in names},
    )
    return lambda model, tokenizer, facts, texts: reference.edit(model, tokenizer, facts, texts, settings).seconds


def measured(found: Trained, facts: list[Fact], edit: Callable[..., dict[str, float]]) -> dict[str, Any]:
    """Quality and seconds of one editor on a fresh copy of the model."""
    model, tokenizer, texts = copy.deepcopy(found.model), found.data.tokenizer, found.data.preservation_texts()
    assert tokenizer is not None
    probe = found.data.probe_texts()[:256]
    before, routing = evaluate(model, tokenizer, facts), trace_routing(model, tokenizer, probe)
    seconds = edit(model, tokenizer, facts, texts)
    metrics = evaluate(model, tokenizer, facts, before.neighbours_exact).metrics
    similarity = RoutingSimilarity(list(routing.experts))
    similarity.update(routing.experts, trace_routing(model, tokenizer, probe).experts)
    overlap = {key: float(value) for key, value in similarity.compute().items()}
    above = [
        v for key, v in overlap.items() if key != "mean" and int(key.removeprefix("layer_")) > found.editor.layers[0]
    ]
    return {**metrics, "routing": statistics.mean(above), "recalled_before": before.metrics["truth_recalled"],
            "seconds": seconds}  # fmt: skip


def by_editor(editor: Editor) -> Callable[..., dict[str, float]]:
    return lambda *arguments: editor.edit(*arguments).seconds


def compare(
    name: str, seed: int, cache: Path, facts: Path | None, only: list[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the editors, each with its results."""
    found = trained(name, seed, cache, facts)
    chosen = found.data.edit_facts()
    runs = {label: by_editor(editor) for label, editor in editors(found.editor, name).items()}
    runs[REFERENCE] = run_reference(found.editor, name)
    for label, run in runs.items():
        if not only or label in only:
            yield label, {**measured(found, chosen, run), "training": found.seconds}


def growth(cache: Path, facts: Path) -> dict[str, Any]:
    """Seconds by phase for 50, 200 and 800 edits of the same file, on the CounterFact model of the first seed."""
    found = trained("counterfact", 0, cache, facts)
    results: dict[str, Any] = {}
    for count in (50, 200, 800):
        chosen = read_facts(facts, strict=False, limit=count)
        texts = found.data.preservation_texts()
        result = found.editor.edit(copy.deepcopy(found.model), found.data.tokenizer, chosen, texts)
        results[str(count)] = result.seconds
    return results


def tables(results: dict[str, Any]) -> str:
    """Markdown of everything that was measured."""
    lines: list[str] = []
    for name in CONFIGS:
        if name not in results:
            continue
        labels = list(dict.fromkeys(label for found in results[name].values() for label in found))
        header = [*QUALITY, *PHASES, "seconds", "× the reference"]
        lines += [f"{EDITS[name]} edits, {name}: mean over seeds {', '.join(results[name])} (lowest to highest)", ""]
        lines += ["| editor | " + " | ".join(header) + " |", "|" + " --- |" * (len(header) + 1)]
        for label in labels:
            runs = [found[label] for found in results[name].values() if label in found]
            cells = []
            for metric in QUALITY:
                values = [run[metric] for run in runs]
                cells.append(f"{statistics.mean(values):.3f} ({min(values):.2f}–{max(values):.2f})")
            cells += [f"{statistics.mean(run['seconds'].get(phase, 0.0) for run in runs):.2f}" for phase in PHASES]
            cells.append(f"{statistics.mean(run['seconds']['edit'] for run in runs):.2f}")
            both = [found for found in results[name].values() if label in found and REFERENCE in found]
            ratios = [found[REFERENCE]["seconds"]["edit"] / found[label]["seconds"]["edit"] for found in both]
            cells.append(f"{statistics.mean(ratios):.1f}" if ratios else "")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        trainings = [next(iter(found.values())) for found in results[name].values()]
        told = ", ".join(f"{run['recalled_before']:.3f} after {run['training']:.0f} s" for run in trainings)
        lines += ["", f"Truths recalled before the edit, by seed: {told}.", ""]
    if "growth" in results:
        lines += ["Seconds of the default editor by phase, and each phase's share:", ""]
        lines += ["| edits | " + " | ".join(PHASES) + " | in all |", "|" + " --- |" * (len(PHASES) + 2)]
        for count, seconds in results["growth"].items():
            shares = [f"{seconds[phase]:.2f} ({seconds[phase] / seconds['edit']:.0%})" for phase in PHASES]
            lines.append(f"| {count} | " + " | ".join(shares) + f" | {seconds['edit']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Quality by editor above, seconds by phase below, and the growth."""
    names = [name for name in CONFIGS if name in results]
    columns = max(len(names), 1)
    rows = 2 + ("growth" in results)
    figure, grid = plt.subplots(rows, columns, figsize=(7 * columns, 4 * rows), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        labels = list(dict.fromkeys(label for found in results[name].values() for label in found))
        upper, lower = grid[0][column], grid[1][column]
        shown = ("efficacy", "generalization", "specificity_retained", "routing")
        for i, metric in enumerate(shown):
            runs = [[f[label][metric] for f in results[name].values() if label in f] for label in labels]
            places = [place + (i - 1.5) * 0.2 for place in range(len(labels))]
            means = [statistics.mean(values) for values in runs]
            spread = [[m - min(v) for m, v in zip(means, runs, strict=True)],
                      [max(v) - m for m, v in zip(means, runs, strict=True)]]  # fmt: skip
            upper.bar(places, means, 0.2, yerr=spread, error_kw={"lw": 0.8}, label=metric.replace("_", " "))
        upper.set(title=f"{name}, {EDITS[name]} edits", ylabel="share", ylim=(0, 1.02))
        upper.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        upper.legend(loc="lower left", fontsize="small")
        totals = [[f[label]["seconds"]["edit"] for f in results[name].values() if label in f] for label in labels]
        bottom = [0.0] * len(labels)
        for phase in PHASES:
            seconds = [
                [f[label]["seconds"].get(phase, 0.0) for f in results[name].values() if label in f] for label in labels
            ]
            shares = [sum(part) / sum(whole) for part, whole in zip(seconds, totals, strict=True)]
            lower.bar(range(len(labels)), shares, bottom=bottom, label=phase)
            bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
        for place, values in enumerate(totals):
            lower.annotate(f"{statistics.mean(values):.1f} s", (place, 1.02), ha="center", fontsize="small")
        lower.set(ylabel="share of the seconds", ylim=(0, 1.1))
        lower.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        lower.legend(loc="lower left", fontsize="small")
    if "growth" in results:
        axes = grid[2][0]
        counts = [int(count) for count in results["growth"]]
        for phase in (*PHASES, "edit"):
            axes.plot(counts, [s[phase] for s in results["growth"].values()], "o-", label=phase)
        axes.set(xscale="log", yscale="log", xlabel="edits", ylabel="seconds", title="growth of the default editor")
        axes.set_xticks(counts, map(str, counts), minor=False)
        axes.legend(fontsize="small")
        for unused in grid[2][1:]:
            unused.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for trained weights")
    parser.add_argument("--facts", type=Path, help="a CounterFact file")
    parser.add_argument(
        "--parts", nargs="+", choices=("atlas", "counterfact", "growth"), default=["atlas", "counterfact", "growth"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="these editors only; the others keep their results")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lit_moeedit").setLevel(logging.ERROR)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "editing.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for part in arguments.parts:
        if part != "atlas" and arguments.facts is None:
            sys.stderr.write(f"{part} needs --facts, left out\n")
        elif part == "growth":
            results["growth"] = growth(arguments.cache, arguments.facts)
        else:
            for seed in arguments.seeds:
                for label, new in compare(part, seed, arguments.cache, arguments.facts, arguments.only):
                    results.setdefault(part, {}).setdefault(str(seed), {})[label] = new
                    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    text = tables(results)
    command = "`python benchmarks/editing.py --cache CACHE --facts counterfact.json`, part by part"
    (arguments.output / "editing.md").write_text(f"{command}\n\n{text}", encoding="utf-8")
    picture(results, arguments.output / "editing.png")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
