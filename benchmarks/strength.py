"""Strength of the preservation, layers, and further prompts: fixed settings, and what an editor chooses by itself.

Run from the root of the repository, with the package installed:

    python -m benchmarks.strength --facts counterfact.json

Six models: two that have seen little (256 steps on 30 countries), that of the demo, and three of CounterFact.
Every setting edits copies of the same weights; those with the same target layer and ``stop`` share target vectors.
Half of the paraphrases and neighbours of each fact are measured. With ``tune: true`` an editor chooses its settings by
the other half (see :func:`lit_moeedit.editing.locating.tune`). Of CounterFact, where each fact has one of each, every
other fact is measured.

Writes ``strength.json``, ``strength.md`` and ``strength.png`` into ``benchmarks/results``; what is in the JSON is not
measured again. ``--fresh`` begins anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import pyplot as plt

from benchmarks.training import WEAK, Once, Trained, arguments_of, changed, finish, header, quiet, row, trained
from lit_moeedit.data import Fact
from lit_moeedit.editing import Editor, Place, evaluate
from lit_moeedit.preservation import CovariancePenalty, NullSpace, OutputPenalty, Preservation

CASES = ((WEAK, 0), (WEAK, 1), ("atlas", 0), *(("counterfact", seed) for seed in range(3)))
SHOWN = ("efficacy_accuracy", "generalization", "specificity_retained", "routing", "perplexity")
DRAWN = ("specificity_retained", "generalization")
DEFAULT, STOP = 0.3, 0.05
"""The default strength, and the loss at which the configs' search for target vectors stops."""
TUNED = "tune: true"
"""Name of the editor that chooses by itself."""


@dataclass(frozen=True)
class Setting:
    """Settings of an edit.

    Attributes:
        series: what settings of a curve have in common.
        strength: of the output penalty; ``β`` or ``τ`` of the other preservations.
        layers: the config's, or the highest of them alone.
        phrasings: number of further prompts of each fact.
        kind: the preservation.
        tune: the editor chooses by trials of its own, with the halves of the facts that are not measured.
        stop: loss at which the search for target vectors stops.
    """

    series: str
    strength: float
    layers: Literal["given", "target layer"] = "given"
    phrasings: int = 0
    kind: Literal["output", "covariance", "null space"] = "output"
    tune: bool = False
    stop: float = STOP

    @property
    def preservation(self) -> Preservation:
        if self.kind == "output":
            return OutputPenalty(self.strength)
        return (CovariancePenalty if self.kind == "covariance" else NullSpace)(self.strength)


def settings() -> Iterator[Setting]:
    """All settings; the default first."""
    for strength in (DEFAULT, 1.0, 0.03, 0.003, 3e-4, 3e-5):
        yield Setting("all layers", strength)
    for strength in (DEFAULT, 0.003, 3e-4, 3e-5):
        yield Setting("target layer alone", strength, "target layer")
    for strength in (DEFAULT, 1.0):
        yield Setting("further prompts", strength, phrasings=8)
    yield Setting("two further prompts", DEFAULT, phrasings=2)
    for stop in (0.15, 0.3, 0.5):
        yield Setting("two further prompts", DEFAULT, phrasings=2, stop=stop)
    for stop in (0.15, 0.5):
        yield Setting("all layers, by stop", DEFAULT, stop=stop)
    yield Setting("covariance", 1e3, kind="covariance")
    yield Setting("null space, target layer alone", 0.02, "target layer", kind="null space")
    yield Setting(TUNED, DEFAULT, tune=True)


def halves(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """The facts with the paraphrases and neighbours of trials, and with those that are measured."""
    parts: tuple[list[Fact], list[Fact]] = [], []
    for number, fact in enumerate(facts):
        for part, own in enumerate(parts):
            # of a single paraphrase every other fact has its own in this half
            start = (part + number) % 2
            kept = fact.paraphrases[start::2], fact.neighbours[start::2]
            own.append(replace(fact, paraphrases=kept[0], neighbours=kept[1]))
    return parts


class ByTop:
    """Target vectors that settings share: of the first search with the same edits at the same layer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.found = optimizer, dict[tuple[int, int], Once]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def optimize(self, model: Any, layer: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        case = layer.index, hash(tuple(tuple(r.encoding.ids) for r in rows))
        return self.found.setdefault(case, Once(self.optimizer)).optimize(model, layer, rows, *args, **kwargs)


def edits(case: Trained, known: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    """Measure the settings of one model that are not known yet."""
    trial, measured = halves(case.data.edit_facts())
    before = evaluate(case.model, case.tokenizer, trial)
    texts, shared = case.preservation_texts(), dict[float, ByTop]()
    moments: dict[tuple[bool, tuple[int, ...]], Any] = {}
    for setting in settings():
        if setting in known:
            continue
        targets = shared.setdefault(setting.stop, ByTop(changed(case.editor.targets, stop=setting.stop)))
        editor: Editor = changed(
            case.editor,
            targets=targets,
            preserve=setting.preservation,
            phrasings=setting.phrasings,
            tune=setting.tune,
        )
        if setting.layers == "target layer":
            editor = editor.at(Place(editor.layers[-1:], None))
        if (place := (editor.gated, editor.layers)) not in moments:
            moments[place] = editor.moments(case.model, case.tokenizer, editor.check(case.model), texts)
        seen: dict[str, float] = {}

        def edit(model: Any, facts: Any) -> dict[str, float]:
            result = editor.edit(model, case.tokenizer, trial, texts, moments=moments[place], measured=measured)  # noqa: B023
            seen.update(evaluate(model, case.tokenizer, trial, before.neighbours_exact).metrics)  # noqa: B023
            return result.seconds

        result = case.quality(edit, measured)
        yield {
            **vars(setting),
            **{metric: result[metric] for metric in SHOWN},
            "trial": {metric: seen[metric] for metric in SHOWN[:3]},
            "found": list(editor.layers),
            "chosen": str(editor.place) if setting.tune else None,
            "seconds": result["seconds"],
        }


def setting_of(result: dict[str, Any]) -> Setting:
    return Setting(**{name: result[name] for name in Setting.__dataclass_fields__ if name in result})


def tuned(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The result of the editor that chooses by itself, if there is one."""
    return next((result for result in found if result["series"] == TUNED), None)


def title(case: str) -> str:
    return case.replace("atlas, seed", "the demo's model, seed")


def is_default(result: dict[str, Any]) -> bool:
    return setting_of(result) == Setting("all layers", DEFAULT)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown."""
    lines = []
    for case, found in results.items():
        lines += [title(case), ""]
        names = ("generalization", "retained")
        lines += header(
            ["setting", "strength", "layers", "stop", *(shown.replace("_", " ") for shown in SHOWN)]
            + [f"{name} (trial)" for name in names]
        )
        for result in found:
            name = result["series"] + (" (the default)" if is_default(result) else "")
            cells = [f"{result['strength']:g}", ", ".join(map(str, result["found"])), f"{setting_of(result).stop:g}"]
            if result is tuned(found):
                name, cells = f"**{name}**: {result['chosen']}", ["", "", ""]
            measured = [f"{result[metric]:.3f}" for metric in SHOWN]
            seen = [f"{result['trial'][metric]:.3f}" for metric in SHOWN[1:3]]
            lines.append(row([name, *cells, *measured, *seen]))
        lines.append("")
    return "\n".join(lines)


STYLES = {
    "all layers": ("C0", "o", "-"),
    "target layer alone": ("C1", "s", "-"),
    "further prompts": ("C2", "^", "-"),
    "two further prompts": ("C4", "v", "-"),
    "covariance": ("C7", "x", "none"),
}
"""Colour, marker and line of each series that is drawn."""


def picture(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Generalization against neighbours retained; the default has a ring, what the trial chooses a star."""
    rows, columns = -(-len(results) // 3), min(3, len(results))
    size = (4.2 * columns, 4.0 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for unused in grid.flat[len(results) :]:
        unused.set_axis_off()
    for axes, (case, found) in zip(grid.flat, results.items(), strict=False):
        for series, (color, marker, line) in STYLES.items():
            own = [result for result in found if result["series"] == series]
            own.sort(key=lambda result: (result["strength"], setting_of(result).stop))
            x, y = ([result[metric] for result in own] for metric in DRAWN)
            axes.plot(x, y, color=color, marker=marker, ls=line, label=series, alpha=0.8)
        default = next(result for result in found if is_default(result))
        axes.plot(*(default[metric] for metric in DRAWN), "o", ms=14, mfc="none", mec="black", label="the default")
        if best := tuned(found):
            axes.plot(*(best[metric] for metric in DRAWN), "*", ms=18, mfc="none", mec="black", label=TUNED)
        axes.set(title=title(case), xlabel="neighbours retained", ylabel="generalization")
        axes.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Further right and up is better")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it that model is left out")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "strength.json"
    order = list(settings())
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not arguments.fresh else {}
    cases = [f"{name}, seed {seed}" for name, seed in CASES]
    results = {case: results[case] for case in cases if case in results}
    for name, seed in CASES:
        options = [f"--data.init_args.corpus.init_args.path={arguments.facts}"] if name == "counterfact" else []
        if name == "counterfact" and arguments.facts is None:
            continue
        rows = results.setdefault(f"{name}, seed {seed}", [])
        known = [setting_of(result) for result in rows]
        if all(setting in known for setting in order):
            continue
        for new in edits(trained(name, seed, arguments.models, *options), known):
            rows.append(new)
            rows.sort(key=lambda result: order.index(setting_of(result)))
            file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    command = f"`python -m benchmarks.strength --facts counterfact.json`, {torch.get_num_threads()} thread(s)"
    finish("strength", command, table(results), picture, results, arguments.output)


if __name__ == "__main__":
    main()
