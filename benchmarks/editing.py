"""All editors on the same trained weights: quality, seconds by phase, and growth with the number of edits.

Run from the root of the repository, with the package installed:

    python -m benchmarks.editing --parts atlas --seeds 0 1 2
    python -m benchmarks.editing --parts counterfact growth --facts counterfact.json

Each seed's model is trained once and kept; every editor then edits a fresh copy of it. Parts add their results to
``editing.json`` in ``benchmarks/results``; ``editing.md`` and ``editing.png`` are made from all of it. Results of other
weights than those that are edited now are kept under ``earlier``, and have tables of their own. With ``--share``
editors of a model share target vectors and second moments, which changes no edit, but leaves no seconds to compare.
Without ``--facts`` the parts that need a CounterFact file are left out.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from transformers import PreTrainedModel

from benchmarks import reference
from benchmarks.baselines import in_context, train_adapters
from benchmarks.training import (
    BY_FACT,
    QUALITY,
    STANDIN,
    Once,
    Trained,
    arguments_of,
    changed,
    corpus_options,
    digest,
    finish,
    header,
    label_of,
    mean_of,
    quiet,
    row,
    trained,
    weights_file,
)
from lit_moeedit.data import Fact, read_facts
from lit_moeedit.editing import PHASES, Editor, FineTuning
from lit_moeedit.models.experts import check_editable
from lit_moeedit.preservation import CovariancePenalty, NullSpace, OutputPenalty
from lit_moeedit.solvers import BlockCoordinateDescent, PerExpertRidge, Tucker

EDITS = {"atlas": 50, "counterfact": 100}
REFERENCE = "one fact at a time"
IN_CONTEXT = "new fact in the prompt"
ADAPTERS = {"LoRA": 5e-3, "LoRA, 0.002": 2e-3}
"""Learning rates of LoRA by name."""
HARD = {"atlas": (1.0, 0.1), "counterfact": (1.0, 0.1), STANDIN: (1.0, 0.1)}
"""Threshold and ridge of the null space, which the configs do not have; the papers' are for models of other scales."""


def editors(base: Editor, name: str) -> dict[str, Editor]:
    """Every editor, with the config's targets and layers; those of papers edit a row for each prompt alone."""
    threshold, ridge = HARD[name]
    hard: dict[str, Any] = {"preserve": NullSpace(threshold), "ridge": ridge}
    soft: dict[str, Any] = {"preserve": OutputPenalty(0.3)}
    paper: dict[str, Any] = {"target_tokens": "first"}
    released: dict[str, Any] = {
        "preserve": NullSpace(threshold, unused=False),
        "ridge": ridge,
        "contexts": ("",),
        "neutral": "",
        "targets": changed(base.targets, loss_tokens="first", kl=0.0),
        "residual_of": "each_layer",
        "residual_share": "root_of_layers_left",
    }
    found = {
        "Woodbury, output": changed(base, **soft),
        "Woodbury, output, two further prompts": changed(base, **soft, phrasings=2),
        # a search that ends at a higher loss finds shorter vectors
        "Woodbury, output, three further prompts, stop 0.15": changed(
            base, **soft, phrasings=3, targets=changed(base.targets, stop=0.15)
        ),
        "Woodbury, covariance": changed(base, preserve=CovariancePenalty(1e4)),
        "Woodbury, null space": changed(base, **hard),
        "BCD, null space (MoEEdit)": changed(base, solver=BlockCoordinateDescent(passes=4), **hard, **paper),
        "BCD, null space (MoEEdit as released)": changed(
            base, solver=BlockCoordinateDescent(passes=4), **released, **paper
        ),
        "Tucker at each layer, output": changed(base, solver=Tucker(energy=0.99, carry=False), **soft),
        # whole modes: at the target layer it is Woodbury's solution
        "Woodbury carried down, output": changed(base, solver=Tucker(energy=1.0), **soft),
        "Tucker carried down, output": changed(base, solver=Tucker(energy=0.99), **soft),
        "Woodbury at the target layer alone, output": changed(base, layers=base.layers[-1:], **soft),
        "Tucker, null space (MoTE)": changed(base, solver=Tucker(energy=0.99), **hard, **paper),
    }
    shared: dict[str, Any] = {"layers": base.layers, "contexts": base.contexts, "steps": 60, "stop": base.targets.stop}
    return found | {
        # its memory of earlier batches is empty in a single batch
        "AlphaEdit per expert": changed(base, solver=PerExpertRidge(), **hard, **paper),
        "MEMIT per expert": changed(base, preserve=CovariancePenalty(1e4), solver=PerExpertRidge(), **paper),
        "FT": FineTuning(learning_rate=1e-3, **shared),
        **{f"FT-L, {e:g}": FineTuning(learning_rate=1e-3, norm_constraint=e, **shared) for e in (0.02, 0.05)},
    }


def adapter_training(base: Editor, name: str = "LoRA") -> FineTuning:
    """Return the settings of training adapters, by a name of :data:`ADAPTERS`, with the config's contexts."""
    return FineTuning(base.layers, 60, ADAPTERS[name], stop=base.targets.stop, contexts=base.contexts)


KINDER = (
    "The reference, one fact at a time, is kinder than the code released with MoEEdit: its targets are the mean over "
    "all tokens of the new answer, the residual is that of the target layer, layers take one over the layers left of "
    "it, and padding has no part in second moments. The row “as released” has the first three as released."
)

Edit = Callable[[PreTrainedModel, Sequence[Fact]], dict[str, float]]


class Shared:
    """Target vectors and second moments of one model and its facts, which several editors use."""

    def __init__(self, found: Trained, texts: Sequence[str]) -> None:
        self.found, self.texts, self.once = found, texts, Once(found.editor.targets)
        self.moments: dict[bool, Any] = {}

    def edit(self, editor: Editor, model: PreTrainedModel, facts: Sequence[Fact]) -> dict[str, float]:
        """Edit as the editor would by itself; there are no seconds."""
        tokenizer, base = self.found.tokenizer, self.found.editor
        if editor.gated not in self.moments:
            layers = check_editable(model, base.layers)
            self.moments[editor.gated] = editor.moments(model, tokenizer, layers, self.texts)
        moments = {index: self.moments[editor.gated][index] for index in editor.layers}
        # other settings of the search have vectors of their own
        is_shared = editor.targets is base.targets and editor.target_tokens == base.target_tokens
        own = changed(editor, targets=self.once) if is_shared else editor
        own.edit(model, tokenizer, facts, moments=moments)
        return {}


def runs(found: Trained, name: str, share: bool = False) -> dict[str, Edit]:
    """Every editor, and the one that edits one fact at a time, by what they are called."""
    texts = found.data.preservation_texts()
    shared = Shared(found, texts)

    def by(editor: Editor) -> Edit:
        if share and isinstance(editor, Editor):
            return lambda model, facts: shared.edit(editor, model, facts)
        return lambda model, facts: editor.edit(model, found.tokenizer, facts, texts).seconds

    threshold, ridge = HARD[name]
    published = changed(
        found.editor, solver=BlockCoordinateDescent(passes=4), preserve=NullSpace(threshold), ridge=ridge
    )
    every = {label: by(editor) for label, editor in editors(found.editor, name).items()}

    def by_adapters(steps: FineTuning) -> Edit:
        return lambda model, facts: train_adapters(model, found.tokenizer, facts, steps)

    every |= {label: by_adapters(adapter_training(found.editor, label)) for label in ADAPTERS}
    return every | {
        REFERENCE: lambda model, facts: reference.edit(model, found.tokenizer, facts, texts, published).seconds
    }


def corpus(name: str, facts: Path | None) -> list[str]:
    """Return the options of the command line that choose the facts to edit."""
    return corpus_options(edits=EDITS[name]) + ([] if name == "atlas" else corpus_options(path=facts))


def compare(
    name: str, seed: int, models: Path, facts: Path | None, only: list[str] | None, share: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the editors, each with its results."""
    found = trained(name, seed, models, *corpus(name, facts))
    chosen, every = found.data.edit_facts(), runs(found, name, share)
    if not share:
        next(iter(every.values()))(copy.deepcopy(found.model), chosen[:2])  # what is slow only the first time
    # seconds are compared within one run only
    run = {"run": f"{time.time():.0f}", "threads": torch.get_num_threads(), "training": found.seconds}
    run |= {"weights": found.weights, "load": round(os.getloadavg()[0], 1)}
    if not only or IN_CONTEXT in only:
        yield IN_CONTEXT, {**in_context(found), **run}
    for label, edit in every.items():
        if not only or label in only:
            yield label, {**found.quality(edit), **run}


def growth(models: Path, facts: Path) -> dict[str, Any]:
    """Seconds by phase for 50, 200 and 800 edits of the same file, on the CounterFact model of the first seed."""
    found = trained("counterfact", 0, models, *corpus("counterfact", facts))
    edit = next(iter(runs(found, "counterfact").values()))
    return {
        str(count): edit(copy.deepcopy(found.model), read_facts(facts, strict=False, limit=count))
        for count in (50, 200, 800)
    }


def set_apart(results: dict[str, Any], digests: dict[tuple[str, str], str]) -> None:
    """Move results of weights other than these, by part and seed, and of unknown weights, under ``earlier``."""
    for part in EDITS:
        for seed, found in results.get(part, {}).items():
            for label, run in [*found.items()]:
                if "weights" not in run or run["weights"] != digests.get((part, seed), run["weights"]):
                    results.setdefault("earlier", {}).setdefault(part, {}).setdefault(seed, {})[label] = found.pop(
                        label
                    )
        results[part] = {seed: found for seed, found in results.get(part, {}).items() if found}


def tables(results: dict[str, Any]) -> str:
    """Markdown of everything that was measured."""
    lines = [KINDER, "", *of_parts(results)]
    if "growth" in results:
        lines += ["Seconds of the default editor by phase, and each phase's share:", ""]
        lines += header(["edits", *PHASES, "in all"])
        for count, seconds in results["growth"].items():
            shares = [f"{seconds[phase]:.2f} ({seconds[phase] / seconds['edit']:.0%})" for phase in PHASES]
            lines.append(row([count, *shares, f"{seconds['edit']:.2f}"]))
        lines.append("")
    if "earlier" in results:
        lines += ["Of other weights, trained before on another machine:", "", *of_parts(results["earlier"])]
    return "\n".join(lines)


def of_parts(results: dict[str, Any]) -> list[str]:
    """Lines of the tables of quality and seconds."""
    lines: list[str] = []
    for name in EDITS:
        if not results.get(name):
            continue
        labels = list(dict.fromkeys(label for found in results[name].values() for label in found))
        threads = {str(run["threads"]) for found in results[name].values() for run in found.values()}
        measured = f"mean over seeds {', '.join(results[name])} ({BY_FACT}), threads: {', '.join(sorted(threads))}"
        loads = [run["load"] for found in results[name].values() for run in found.values() if "load" in run]
        if loads and max(loads) > 2:
            measured += f". Seconds, where they are, are rough: the load of the machine was up to {max(loads):.0f}"
        if any(not run["seconds"] for found in results[name].values() for run in found.values()):
            measured += ". Rows without seconds are of `--share`, or nothing is edited"
        lines += [f"{EDITS[name]} edits, {name}: {measured}", ""]
        lines += header(["editor", *QUALITY, *PHASES, "seconds", "× the reference"])
        for label in labels:
            by_seed = {seed: found[label] for seed, found in results[name].items() if label in found}
            own, cells = [*by_seed.values()], [label_of(label, by_seed, results[name])]
            cells += [mean_of(own, metric) for metric in QUALITY]
            if not all(run["seconds"] for run in own):
                lines.append(row([*cells, *("–" for _ in (*PHASES, "seconds", "ratio"))]))
                continue
            cells += [f"{statistics.mean(r['seconds'].get(p, 0.0) for r in own):.2f}" for p in (*PHASES, "edit")]
            pairs = [(f[REFERENCE], f[label]) for f in results[name].values() if label in f and REFERENCE in f]
            ratios = [a["seconds"]["edit"] / b["seconds"]["edit"] for a, b in pairs if a["run"] == b["run"]]
            cells.append(f"{statistics.mean(ratios):.1f}" if ratios else "–")
            lines.append(row(cells))
        trainings = [next(iter(found.values())) for found in results[name].values()]
        told = ", ".join(f"{run['recalled_before']:.3f} after {run['training']:.0f} s" for run in trainings)
        lines += ["", f"Truths recalled before the edit, by seed: {told}.", ""]
    return lines


DRAWN = {"efficacy": "o", "generalization": "s", "specificity_retained": "^", "routing": "x"}
"""Metrics in the picture, and their markers."""


def picture(results: dict[str, Any], path: Path) -> None:
    """Draw what each editor reaches on each model, with the range over seeds, and the seconds that an edit takes."""
    names = [name for name in EDITS if results.get(name)]
    labels = list(dict.fromkeys(label for name in names for found in results[name].values() for label in found))
    size = (5.0 * (len(names) + 1), 0.34 * len(labels) + 1.4)
    figure, grid = plt.subplots(1, len(names) + 1, figsize=size, layout="constrained", sharey=True)
    for axes, name in zip(grid, names, strict=False):
        for metric, marker in DRAWN.items():
            runs = [[f[label][metric] for f in results[name].values() if label in f] for label in labels]
            known = [(y, [value for value in own if value is not None]) for y, own in enumerate(runs)]
            known = [(y, own) for y, own in known if own]
            color = f"C{list(DRAWN).index(metric)}"
            axes.hlines([y for y, _ in known], [min(own) for _, own in known], [max(own) for _, own in known], color)
            means = [statistics.mean(own) for _, own in known]
            label = metric.replace("_", " ")
            axes.plot(means, [y for y, _ in known], marker, color=color, markersize=5, label=label)
        axes.set(title=f"{name}, {EDITS[name]} edits: further right is better", xlim=(0, 1.03))
    for number, name in enumerate(names):
        found, color = results[name].values(), f"C{len(DRAWN) + number}"
        seconds = [[f[label]["seconds"]["edit"] for f in found if f.get(label, {}).get("seconds")] for label in labels]
        places = [y for y, own in enumerate(seconds) if own]
        grid[-1].plot([statistics.mean(seconds[y]) for y in places], places, "D", color=color, ms=5, label=name)
    grid[-1].set(title="seconds of an edit: further left is better", xscale="log")
    grid[0].set_yticks(range(len(labels)), labels, fontsize="small")
    grid[0].invert_yaxis()
    for axes in grid:
        axes.grid(alpha=0.3)
    grid[0].legend(loc="center left", fontsize="small")
    grid[-1].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--facts", type=Path, help="a CounterFact file")
    parser.add_argument(
        "--parts", nargs="+", choices=("atlas", "counterfact", "growth"), default=["atlas", "counterfact", "growth"]
    )
    parser.add_argument("--share", action="store_true", help="share target vectors and second moments, without seconds")
    parser.add_argument("--only", nargs="+", help="these editors only; the others keep their results")
    arguments = parser.parse_args()
    quiet()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "editing.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    files = {(p, str(s)): weights_file(p, s, arguments.models) for p in EDITS for s in arguments.seeds}
    set_apart(results, {case: digest(weights) for case, weights in files.items() if weights.exists()})
    for part in arguments.parts:
        if part != "atlas" and arguments.facts is None:
            sys.stderr.write(f"{part} needs --facts, left out\n")
        elif part == "growth":
            results["growth"] = growth(arguments.models, arguments.facts)
        else:
            for seed in arguments.seeds:
                for label, new in compare(
                    part, seed, arguments.models, arguments.facts, arguments.only, arguments.share
                ):
                    results.setdefault(part, {}).setdefault(str(seed), {})[label] = new
                    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    command = "`python -m benchmarks.editing --facts counterfact.json`, part by part"
    finish("editing", command, tables(results), picture, results, arguments.output)


if __name__ == "__main__":
    main()
