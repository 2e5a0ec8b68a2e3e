"""Strength of the preservation, layers, and further prompts: fixed settings, and what an editor chooses by itself.

Run from the root of the repository, with the package installed:

    python -m benchmarks.strength --facts counterfact.json

Models that have seen little (256 steps on 30 countries), those of the demo, the demo's facts in a Mixtral, and those of
CounterFact.
Every setting edits copies of the same weights; those of our own editor with the same target layer and ``stop`` share
target vectors.
Half of the paraphrases and neighbours of each fact are measured. With ``tune: true`` an editor chooses its settings by
the other half, with ``tune: neighbours`` such that as many neighbours are retained (see
:func:`lit_moeedit.editing.locating.tune`). Of CounterFact, where each fact has one of each, every other fact is
measured.

Writes ``strength.json``, ``strength.md`` and ``strength.png`` into ``benchmarks/results``; what is in the JSON is not
measured again. ``--fresh`` begins anew.

Three seeds take about 30 minutes on one core.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib import pyplot as plt

from benchmarks.editing import HARD, editors
from benchmarks.training import (
    BY_FACT,
    WEAK,
    Once,
    Trained,
    arguments_of,
    changed,
    corpus_options,
    finish,
    header,
    label_of,
    mean_of,
    only,
    quiet,
    row,
    title_of,
    trained,
    whiskers,
)
from lit_moeedit.data import Fact
from lit_moeedit.editing import Editor, Place
from lit_moeedit.editing.place import Tune
from lit_moeedit.preservation import CovariancePenalty, NullSpace, OutputPenalty, Preservation

MODELS = (WEAK, "atlas", "atlas, Mixtral", "counterfact")
SHOWN = ("efficacy_accuracy", "generalization", "specificity_retained", "routing", "perplexity")
DRAWN = ("specificity_retained", "generalization")
DEFAULT, STOP = 0.3, 0.05
"""The default strength, and the loss at which the configs' search for target vectors stops."""
TUNED: dict[Tune, str] = {True: "tune: true", "neighbours": "tune: neighbours"}
"""Names of the editors that choose by themselves."""


OTHERS = {"MoEEdit": "BCD, null space (MoEEdit)", "MoEEdit as released": "BCD, null space (MoEEdit as released)"}
"""Other editors, by the kind of a setting; they are the same on all models."""


@dataclass(frozen=True)
class Setting:
    """Settings of an edit.

    Attributes:
        series: what settings of a curve have in common.
        strength: of the output penalty; ``β`` or ``τ`` of the other preservations, also those of other editors.
        layers: the config's, or the highest of them alone.
        phrasings: number of further prompts of each fact.
        kind: the preservation, or another editor of :func:`benchmarks.editing.editors`.
        tune: the editor chooses by trials of its own, with the halves of the facts that are not measured, and how.
        stop: loss at which the search for target vectors stops.
    """

    series: str
    strength: float
    layers: Literal["given", "target layer"] = "given"
    phrasings: int = 0
    kind: Literal["output", "covariance", "null space", "MoEEdit", "MoEEdit as released"] = "output"
    tune: Tune = False
    stop: float = STOP

    @property
    def preservation(self) -> Preservation:
        if self.kind == "output":
            return OutputPenalty(self.strength)
        return (CovariancePenalty if self.kind == "covariance" else NullSpace)(self.strength)

    def editor(self, base: Editor, targets: Any) -> Editor:
        """The editor of a config with these settings, and with a search for target vectors."""
        if self.kind in OTHERS:
            return editors(base, "atlas")[OTHERS[self.kind]]
        return changed(base, targets=targets, preserve=self.preservation, phrasings=self.phrasings, tune=self.tune)


GIVEN = Setting("all layers", DEFAULT)
"""The default."""
AUTO = [Setting(name, DEFAULT, tune=tune) for tune, name in TUNED.items()]
"""The editors that choose by themselves."""


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
    for strength in (DEFAULT, 0.003):
        yield Setting("three further prompts", strength, phrasings=3, stop=0.15)
    yield Setting("two further prompts, weak", 0.003, phrasings=2, stop=0.3)
    yield Setting("further prompts, by stop", DEFAULT, phrasings=8, stop=0.3)
    yield Setting("MoEEdit", HARD["atlas"][0], kind="MoEEdit")
    yield Setting("MoEEdit as released", HARD["atlas"][0], kind="MoEEdit as released")
    yield from AUTO


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
    texts, shared = case.data.preservation_texts(), dict[float, ByTop]()
    moments: dict[tuple[bool, tuple[int, ...]], Any] = {}
    for setting in settings():
        if setting in known:
            continue
        # an editor that chooses has searches of its own
        alone = changed(case.editor.targets, stop=setting.stop)
        targets = alone if setting.tune else shared.setdefault(setting.stop, ByTop(alone))
        editor = setting.editor(case.editor, targets)
        if setting.layers == "target layer":
            editor = editor.at(Place(editor.layers[-1:], None))
        if (place := (editor.gated, editor.layers)) not in moments:
            moments[place] = editor.moments(case.model, case.tokenizer, editor.check(case.model), texts)

        def edit(model: Any, facts: Any) -> dict[str, float]:
            result = editor.edit(model, case.tokenizer, trial, texts, moments=moments[place], measured=measured)  # noqa: B023
            return result.seconds

        result = case.quality(edit, measured)
        yield {
            **vars(setting),
            "weights": case.weights,
            **only(result, SHOWN),
            "found": list(editor.layers),
            "chosen": str(editor.place) if setting.tune else None,
            "seconds": result["seconds"],
        }


def setting_of(result: dict[str, Any]) -> Setting:
    return Setting(**{name: result[name] for name in Setting.__dataclass_fields__ if name in result})


def by_setting(results: dict[str, list[dict[str, Any]]], name: str) -> dict[Setting, dict[str, dict[str, Any]]]:
    """Gather the results of each setting on a model, by seed."""
    found: dict[Setting, dict[str, dict[str, Any]]] = {}
    for case, rows in results.items():
        model, _, seed = case.rpartition(", seed ")
        for result in rows if model == name else []:
            found.setdefault(setting_of(result), {})[seed] = result
    return found


def title(name: str) -> str:
    return {
        "atlas": "the demo's model",
        "atlas, Mixtral": "the demo's facts in a Mixtral",
        WEAK: "a model of 30 countries",
    }.get(name, name)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: all models together, then each of them."""
    by_model = {name: found for name in MODELS if (found := by_setting(results, name))}
    seeds = {name: [*max(found.values(), key=len)] for name, found in by_model.items()}
    count = sum(map(len, seeds.values()))
    lines = [
        f"Means over the {count} models, the highest first; the harmonic mean is that of the first three metrics",
        "",
    ]
    lines += header(["setting", "strength", "layers", "stop", *map(title_of, SHOWN), "harmonic mean"])
    rows = []
    for setting in settings():
        found = [result for own in by_model.values() for result in own.get(setting, {}).values()]
        if len(found) == count:
            means = [statistics.mean(result[metric] for result in found) for metric in SHOWN]
            rows.append((score(found), [*_named(setting), *(f"{mean:.3f}" for mean in means), f"{score(found):.3f}"]))
    lines += [row(cells) for _, cells in sorted(rows, key=lambda one: -one[0])]
    for name, own in by_model.items():
        lines += ["", f"{title(name)}: mean over seeds {', '.join(seeds[name])} ({BY_FACT})", ""]
        lines += header(["setting", "strength", "layers", "stop", *map(title_of, SHOWN), "harmonic mean"])
        for setting, by_seed in own.items():
            label, *cells = _named(setting)
            cells += [mean_of([*by_seed.values()], metric) for metric in SHOWN]
            cells.append(f"{score([*by_seed.values()]):.3f}")
            lines.append(row([label_of(label, by_seed, seeds[name]), *cells]))
        for setting in AUTO:
            chosen = [f"{one['chosen']} (seed {seed})" for seed, one in own.get(setting, {}).items()]
            lines += ["", f"Chosen by `{setting.series}`: {'; '.join(chosen)}."] if chosen else []
    return "\n".join(lines) + "\n"


def score(results: Sequence[dict[str, Any]]) -> float:
    """Return the mean over models of the harmonic mean of efficacy, generalization, and neighbours retained."""
    return statistics.mean(statistics.harmonic_mean([one[metric] for metric in SHOWN[:3]]) for one in results)


def _named(setting: Setting) -> list[str]:
    if setting.tune:
        return [f"**{setting.series}**", "", "", ""]
    name = setting.series + (" (the default)" if setting == GIVEN else "")
    return [name, f"{setting.strength:g}", setting.layers, f"{setting.stop:g}"]


STYLES = {
    "all layers": ("C0", "o", "-"),
    "target layer alone": ("C1", "s", "-"),
    "further prompts": ("C2", "^", "-"),
    "two further prompts": ("C4", "v", "-"),
    "covariance": ("C7", "x", "none"),
}
"""Colour, marker and line of each series that is drawn."""


def picture(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Generalization against neighbours retained, means over seeds.

    The default has a ring, what is tuned a star or a plus; these three have their 95 % intervals over the facts.
    """
    names = [name for name in MODELS if by_setting(results, name)]
    size = (4.4 * len(names), 4.6)
    figure, grid = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        found = by_setting(results, name)
        means = {
            setting: [statistics.mean(result[metric] for result in own.values()) for metric in DRAWN]
            for setting, own in found.items()
        }
        for series, (color, marker, line) in STYLES.items():
            own = sorted((s for s in means if s.series == series), key=lambda s: (s.strength, s.stop))
            x, y = ([means[setting][axis] for setting in own] for axis in (0, 1))
            axes.plot(x, y, color=color, marker=marker, ls=line, label=series, alpha=0.8)
        marked = [(GIVEN, "o", "the default"), *zip(AUTO, "*P", TUNED.values(), strict=True)]
        for setting, marker, label in marked:
            if setting in means:
                axes.plot(*means[setting], marker, ms=16, mfc="none", mec="black", label=label)
                whiskers(axes, [*found[setting].values()], *DRAWN, "gray" if setting.tune else "black")
        axes.set(title=title(name), xlabel="neighbours retained")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("generalization")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "Further right and up is better (lines: 95 % intervals of the default, and in gray of what is tuned)"
    )
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
    cases = [(name, seed) for name in MODELS for seed in arguments.seeds]
    for name, seed in cases:
        options = corpus_options(path=arguments.facts) if name == "counterfact" else []
        if name == "counterfact" and arguments.facts is None:
            continue
        rows = results.setdefault(f"{name}, seed {seed}", [])
        if all(setting in map(setting_of, rows) for setting in order):
            continue
        case = trained(name, seed, arguments.models, *options)
        rows[:] = [result for result in rows if result["weights"] == case.weights]
        for new in edits(case, [setting_of(result) for result in rows]):
            rows.append(new)
            rows.sort(key=lambda result: order.index(setting_of(result)))
            file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    seeds = " ".join(map(str, arguments.seeds))
    command = (
        f"`python -m benchmarks.strength --facts counterfact.json --seeds {seeds}`, {torch.get_num_threads()} thread(s)"
    )
    finish("strength", command, table(results), picture, results, arguments.output)


if __name__ == "__main__":
    main()
