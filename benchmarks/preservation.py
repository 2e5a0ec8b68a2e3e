"""Preservations compared: null spaces, soft penalties, mixtures of both, and moments of different tokens.

Run from the root of the repository, with the package installed:

    python -m benchmarks.preservation --facts counterfact.json --wordnet /usr/share/wordnet --seeds 0 1 2

Every form edits copies of the same trained weights towards the same target vectors, at a range of its own strength.
Writes ``preservation.json``, ``preservation.md`` and ``preservation.png`` into ``benchmarks/results``; runs that are in
the JSON are not made again. ``--fresh`` begins anew.

Three seeds take about 35 minutes on one core.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.standin.measures import CANDIDATES, KNOWN, keep_known
from benchmarks.training import (
    BY_FACT,
    CONFIGS,
    SOURCES,
    STANDIN,
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
from lit_moeedit.data.encoding import encode, pad, pad_id, position_ids, token_batches
from lit_moeedit.editing import SecondMoments
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.partial_forward import inference, layer_output
from lit_moeedit.preservation import CovariancePenalty, NullSpace, OutputPenalty, Preservation

EDITS = KNOWN
DEFAULT = 0.3
"""The default strength of :class:`~lit_moeedit.preservation.OutputPenalty`, which the configs have."""
WORKING = 0.95
"""Efficacy below which a setting is left out of the picture: it preserves by not editing."""
DRAWN = ("none", "null space (MoEEdit)", "covariance", "output")
"""Forms in the picture; the others are in the table."""
AXES = ("specificity_retained", "generalization")
NAMES = ("atlas", "counterfact", STANDIN)
SHOWN = ("efficacy", "generalization", "specificity_retained", "routing", "perplexity")
Moments = dict[int, SecondMoments]


@dataclass(frozen=True)
class Point:
    """One setting: a form of preservation, the second moments it takes, and how strong it is.

    Attributes:
        form: its name; points of the same name make a curve.
        strength: ``τ`` of a null space, ``β`` of a soft penalty on plain moments, ``strength`` of one on gated ones.
        ridge: ``λ``.
        gated: whether moments are those of gated keys over all tokens.
        edited: weight of the moments at edit-like positions, the last tokens of prompts; 1 leaves the others out.
        hard: share of the moments' energy whose largest directions must not change at all (a mixture of both).
        own: how far gated moments are means over the expert's own tokens (1) and not over all tokens (0); in between
            their geometric mean.
    """

    form: str
    strength: float
    ridge: float
    gated: bool = False
    edited: float = 0.0
    hard: float = 0.0
    own: float = 0.0


def points() -> Iterator[Point]:
    """Return all settings."""
    yield Point("none", 0.0, 0.1)
    for threshold in (0.02, 0.1, 0.3, 1.0, 3.0):
        yield Point("null space (MoEEdit)", threshold, 0.1)
    for strength in (1e2, 1e3, 1e4, 1e5, 1e6):
        yield Point("covariance", strength, 1e-3)
    for strength in (3e-5, 3e-4, 3e-3, 0.03, 0.3, 1.0, 3.0):
        yield Point("output", strength, 1e-3, gated=True)
    for ridge in (1e-4, 1e-2):
        yield Point(f"output, λ = {ridge:g}", DEFAULT, ridge, gated=True)
    for strength in (0.03, 0.3, 1.0):
        yield Point("output, mean of own tokens", strength, 1e-3, gated=True, own=1.0)
    for strength in (0.03, 0.3):
        yield Point("output, between both means", strength, 1e-3, gated=True, own=0.5)
        yield Point("output, positions of edits as half", strength, 1e-3, gated=True, edited=0.5)
    yield Point("output, positions of edits", DEFAULT, 1e-3, gated=True, edited=1.0)
    yield Point("output, largest directions hard", DEFAULT, 1e-3, gated=True, hard=0.9)
    yield Point("covariance, positions of edits", 1e5, 1e-3, edited=1.0)
    yield Point("covariance, largest directions hard", 1e5, 1e-3, hard=0.9)


@torch.no_grad()
def both_moments(found: Trained, gated: bool) -> tuple[Moments, Moments]:
    """Second moments over all tokens of the preservation text, and over the last tokens of its prompts."""
    model, layers, tokenizer = found.model, found.editor.check(found.model), found.tokenizer
    everywhere, edited = ({x.index: SecondMoments.zeros(x, gated=gated) for x in layers} for _ in range(2))
    texts = found.data.preservation_texts()
    rows = [encoding.ids for encoding in encode(tokenizer, texts, [""] * len(texts))]
    selected, last = torch.empty(0), torch.empty(0)

    def observe(layer: ExpertLayer, keys: RoutedKeys) -> None:
        for sums, own in ((everywhere, torch.ones_like(keys.token, dtype=torch.bool)), (edited, last[keys.token])):
            for expert in keys.expert[own].unique().tolist():
                mine = own & (keys.expert == expert)
                sums[layer.index].add(expert, keys.key[mine], keys.gate[mine])

    with inference(model), watch_keys(layers, lambda: selected, observe):
        for batch in token_batches([len(r) for r in rows], found.editor.token_budget):
            ids, mask = pad([rows[i] for i in batch], pad_id(tokenizer))
            selected = mask.flatten().nonzero().squeeze(-1)
            # a text ends with its answer, mostly one token
            last = torch.zeros_like(mask).scatter_(1, mask.sum(1, keepdim=True) - 2, 1).flatten().bool()
            layer_output(model, layers[-1], ids, mask, position_ids(mask))
            for layer in layers:
                everywhere[layer.index].tokens += int(mask.sum())
                edited[layer.index].tokens += len(ids)
    return everywhere, edited


def moments_of(point: Point, everywhere: Moments, edited: Moments) -> Moments:
    """The moments of a setting: means, with as many tokens, so that they are taken as they are."""
    found = {}
    for index, own in everywhere.items():
        experts = torch.arange(len(own.count))
        mean = torch.lerp(own.mean(experts), edited[index].mean(experts), point.edited)
        if point.own:
            share = own.count.float() / own.tokens  # of all tokens
            mean = mean / share.clamp_min(1e-6)[:, None, None] ** point.own
        if point.hard:
            mean = stiff(mean, point.hard)
        one = torch.ones_like(own.count)
        found[index] = SecondMoments(mean, one, torch.ones_like(own.tokens), point.gated)
    return found


def stiff(moment: Tensor, share: float) -> Tensor:
    """``C_j`` whose largest directions, which hold ``share`` of its energy, weigh so much that nothing goes there."""
    values, vectors = torch.linalg.eigh(moment.double())
    energy = values.clamp_min(0).flip(1).cumsum(1).flip(1)  # of this direction and all that are larger
    hard = energy <= share * energy[:, :1]
    values = values.where(~hard, 1e4 * values[:, -1:])
    return ((vectors * values[:, None]) @ vectors.mT).float()


def edits(name: str, seed: int, models: Path, known: set[Point], arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Measure the settings of one model that have not been measured yet."""
    # the stand-in is edited at the last token of a name, and not at that of a prompt
    missing = [point for point in points() if point not in known and not (name == STANDIN and point.edited)]
    if not missing:
        return
    found = trained(name, seed, models, *arguments)
    if name == STANDIN:
        keep_known(found, EDITS)
    moments = {gated: both_moments(found, gated) for gated in (False, True)}
    shared = Once(found.editor.targets)
    for point in missing:
        preserve: Preservation | None = None
        if point.gated:
            preserve = OutputPenalty(point.strength)
        elif point.form != "none":
            preserve = (NullSpace if point.form.startswith("null space") else CovariancePenalty)(point.strength)
        editor = changed(found.editor, preserve=preserve, ridge=point.ridge, targets=shared)
        own = moments_of(point, *moments[point.gated])
        result = found.quality(lambda m, facts: editor.edit(m, found.tokenizer, facts, moments=own).seconds)  # noqa: B023
        yield {**asdict(point), **only(result, SHOWN)}


def by_setting(by_seed: dict[str, list[dict[str, Any]]]) -> dict[Point, dict[str, dict[str, Any]]]:
    """Gather the results of each setting by seed."""
    rows: dict[Point, dict[str, dict[str, Any]]] = {}
    for seed, results in by_seed.items():
        for result in results:
            rows.setdefault(_point(result), {})[seed] = result
    return rows


def _point(result: dict[str, Any]) -> Point:
    return Point(**{name: value for name, value in result.items() if name in Point.__dataclass_fields__})


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Format the results as Markdown: means over seeds, with intervals."""
    lines = []
    for name in results:
        lines += [f"{name}: {EDITS} edits, mean of seeds {', '.join(results[name])} ({BY_FACT})", ""]
        lines += header(["form", "τ, β or strength", "λ", *map(title_of, SHOWN)])
        for point, found in by_setting(results[name]).items():
            cells = [label_of(point.form, found, results[name]), f"{point.strength:g}", f"{point.ridge:g}"]
            lines.append(row([*cells, *(mean_of([*found.values()], metric) for metric in SHOWN)]))
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Draw generalization over the neighbours that an edit keeps, a curve for each form.

    The default is ringed, and has its 95 % intervals over the facts.
    """
    figure, grid = plt.subplots(1, len(results), figsize=(4.4 * len(results), 4.4), layout="constrained", squeeze=False)
    for axes, name in zip(grid[0], results, strict=True):
        settings = by_setting(results[name])
        means = {
            point: {metric: statistics.mean(result[metric] for result in own.values()) for metric in SHOWN}
            for point, own in settings.items()
        }
        found = sorted(means.items(), key=lambda item: item[0].strength)
        for form, marker in zip(DRAWN, "Xso^", strict=True):
            curve = [(point, part) for point, part in found if point.form == form and part["efficacy"] >= WORKING]
            x, y = ([part[key] for _, part in curve] for key in AXES)
            axes.plot(x, y, marker + "-", label=form, markersize=5)
            ringed = [i for i, (point, _) in enumerate(curve) if form == "output" and point.strength == DEFAULT]
            label = "the default" if ringed else None
            axes.plot([x[i] for i in ringed], [y[i] for i in ringed], "o", color="k", ms=12, mfc="none", label=label)
            for i in ringed:
                whiskers(axes, [*settings[curve[i][0]].values()], *AXES, "black")
        axes.set(title=name, xlabel="neighbours retained")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("generalization")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    reached = f"settings that reach {WORKING:.0%} of {EDITS} edits"
    figure.suptitle(f"Further right and up is better: {reached} (lines: 95 % intervals of the default)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it that model is left out")
    parser.add_argument("--wordnet", type=Path, help="folder with WordNet's data.noun; likewise for the stand-in")
    parser.add_argument("--names", nargs="+", choices=[*CONFIGS, STANDIN], default=NAMES)
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "preservation.json"
    known = file.exists() and not arguments.fresh
    results = json.loads(file.read_text(encoding="utf-8")) if known else {}
    sources = {"counterfact": arguments.facts, STANDIN: arguments.wordnet}
    for name in arguments.names:
        if name in SOURCES and sources[name] is None:
            sys.stderr.write(f"{name} needs --{'wordnet' if name == STANDIN else 'facts'}, left out\n")
            continue
        corpus = corpus_options(edits=CANDIDATES if name == STANDIN else EDITS)
        corpus += corpus_options(**{SOURCES[name]: sources[name]}) if name in SOURCES else []
        for seed in arguments.seeds:
            rows = results.setdefault(name, {}).setdefault(str(seed), [])
            for new in edits(name, seed, arguments.models, {_point(result) for result in rows}, corpus):
                rows.append(new)
                file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    seeds = " ".join(map(str, arguments.seeds))
    command = (
        f"`python -m benchmarks.preservation --facts counterfact.json --wordnet /usr/share/wordnet --seeds {seeds}`, "
        "1 thread"
    )
    finish("preservation", command, table(results), picture, results, arguments.output)


if __name__ == "__main__":
    main()
