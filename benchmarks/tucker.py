"""Tucker (MoTE) against Woodbury: edits of the same weights of the demo's model, and the spectra of its experts.

Run from the root of the repository, with the package installed:

    python -m benchmarks.tucker --seeds 0 1 2

For each seed the demo's model is trained up to its edit, or read from ``--models`` if it was trained before. Then every
variant edits it, is measured, and is undone. Writes ``tucker.json`` and ``tucker.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from safetensors.torch import load_model, save_model

from benchmarks.atlas import ROOT, demo
from lit_moeedit.data import FactsDataModule
from lit_moeedit.editing import Editor, evaluate, second_moments
from lit_moeedit.editing.routing import trace_routing
from lit_moeedit.metrics import RoutingSimilarity
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.solvers import Tucker, TuckerFactors, Woodbury

PRESERVE = {
    "covariance": {"strength": 1e4, "ridge": 1e-3},
    "nullspace": {"threshold": 1.0, "ridge": 0.1},
    "none": {"ridge": 1.0},
}
"""As in the other benchmark of the demo."""
METRICS = ("efficacy", "generalization", "specificity", "utility", "specificity_retained")
ENERGIES = (0.9, 0.95, 0.99)


def variants(energies: Sequence[float]) -> dict[str, Woodbury | Tucker]:
    """The solvers by name."""
    found: dict[str, Woodbury | Tucker] = {"Woodbury": Woodbury()}
    for carry in (True, False):
        for whiten in (True, False):
            for energy in energies:
                name = f"Tucker {energy}, {'whitened' if whiten else 'plain'}, {'carried' if carry else 'each layer'}"
                found[name] = Tucker(energy=energy, whiten=whiten, carry=carry)
    return found


class Until(L.Callback):
    """Ends the training before an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


def trained(seed: int, models: Path) -> tuple[Any, FactsDataModule, Editor]:
    """The demo's model just before its edit, its data, and the editor of the config."""
    path = models / f"{seed}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        cli, editing = demo(seed, Path(folder))
        if path.exists():
            cli.model.configure_model()
            load_model(cli.model, path)
            cli.datamodule.setup("fit")
        else:
            cli.trainer.callbacks[:] = [Until(editing.schedule.number)]
            cli.trainer.fit(cli.model, cli.datamodule)
            models.mkdir(parents=True, exist_ok=True)
            save_model(cli.model, str(path))
    return cli.model.model, cli.datamodule, editing.editor


class Once:
    """Target vectors that all variants share."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.found = optimizer, None

    def optimize(self, *args: Any, **kwargs: Any) -> Any:
        if self.found is None:
            self.found = self.optimizer.optimize(*args, **kwargs)
        return self.found


def edits(seed: int, models: Path) -> tuple[dict[str, Any], list[str]]:
    """What each variant did, by preservation and solver; and rows of a table of spectra."""
    model, data, editor = trained(seed, models)
    tokenizer, facts, probe = data.tokenizer, data.edit_facts(), data.probe_texts()[:256]
    layers = editor.check(model)
    moments = second_moments(model, tokenizer, layers, data.preservation_texts())
    before, start = evaluate(model, tokenizer, facts), trace_routing(model, tokenizer, probe)
    editor.targets = Once(editor.targets)
    results: dict[str, Any] = {}
    for preserve, settings in PRESERVE.items():
        editor.preserve = preserve
        for name, value in settings.items():
            setattr(editor, name, value)
        for name, solver in variants(ENERGIES if preserve == "covariance" else ENERGIES[1:2]).items():
            editor.solver = solver
            found: dict[str, float] = {}

            def measure(found: dict[str, float] = found) -> bool:
                metrics = evaluate(model, tokenizer, facts, before.neighbours_exact).metrics
                similarity = RoutingSimilarity(list(expert_layers(model)))
                similarity.update(start.experts, trace_routing(model, tokenizer, probe).experts)
                found |= {metric: metrics[metric] for metric in METRICS}
                found["routing"] = float(similarity.compute()["mean"])
                return False

            seconds = editor.edit(model, tokenizer, facts, moments=moments, guard=measure).seconds
            results[f"{preserve}, {name}"] = found | {"seconds": seconds["features"] + seconds["solve"]}
    rows = []
    for layer in layers:
        second_moment = moments[layer.index].total.sum(0) / moments[layer.index].count.sum()
        for name, metric in (("plain", None), ("whitened", second_moment)):
            ranks = [TuckerFactors.hosvd(layer.down_proj.detach(), metric, energy=energy).ranks for energy in ENERGIES]
            cells = " | ".join(" ".join(map(str, r)) for r in ranks)
            rows.append(f"| {seed} | {layer.index} | {name} | {cells} |")
    return results, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", type=Path, default=ROOT / "runs/atlas_models", help="where trained models are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results, spectra = {}, []
    for seed in arguments.seeds:
        results[seed], rows = edits(seed, arguments.models)
        spectra += rows
    columns = (*METRICS, "routing", "seconds")
    lines = ["| variant | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for name in results[arguments.seeds[0]]:
        means = [statistics.mean(results[seed][name][column] for seed in arguments.seeds) for column in columns]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    experts, d_model, d_hidden = 16, 128, 192
    lines += ["", f"Directions (of {experts} experts, {d_model} outputs, {d_hidden} inputs) that hold a share:", ""]
    lines += ["| seed | layer | weights | " + " | ".join(map(str, ENERGIES)) + " |", "|" + " --- |" * 6, *spectra]
    text = "\n".join(lines) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "tucker.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    command = f"`python -m benchmarks.tucker --seeds {' '.join(map(str, arguments.seeds))}`"
    (arguments.output / "tucker.md").write_text(f"{command}, the means over the seeds\n\n{text}", encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
