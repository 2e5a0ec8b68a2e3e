"""A stream of edits of all facts of a CounterFact file: what is left of the first ones, and of everything else.

Run from the root of the repository, with the package installed, and a file of CounterFact:

    python -m benchmarks.lifelong --facts counterfact.json --seeds 0 1 2

The model is that of ``configs/counterfact.yaml``, trained once on 500 facts of the file; the others it has never seen.
Then every variant edits the file's facts in their order, batch by batch, from the same weights: with the editor of the
config and one context. A fact whose new target is in no training text, which this small model can never generate, gets
one that is, drawn by the fact's key. The second moments are those of the trained model, taken once; in one variant,
anew after every fifth batch.

After each eighth of the stream everything is measured: greedy generation of the new targets of the first, the middle
and the last hundred of the facts edited so far, and at the end of all facts and paraphrases; the neighbours that were
answered right before the first edit, without those whose prompt is edited; the perplexity of the answers to these, in
proportion to that before; norms of the edited experts; and at the end general ability: the validation statements of no
fact of the stream, and the perplexity of text of another style (:mod:`lit_moeedit.editing.further`).

Measured are the neighbours of every other fact. Neither their prompts nor the validation statements are preserved.
Preserved is otherwise as much text as the config says, of all that states none of the first 100 facts of the stream: as
in a run that does not know what it will have to edit later, most of it states the truth of a fact of the stream.

Writes ``lifelong.json``, ``lifelong.md`` and ``lifelong.png`` after each variant; variants that are in the JSON are not
run again, ``--fresh`` begins anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from benchmarks.training import (
    BY_FACT,
    Trained,
    arguments_of,
    cell,
    changed,
    corpus_options,
    header,
    label_of,
    quiet,
    row,
    trained,
    write,
)
from lit_moeedit.data import Fact, read_facts
from lit_moeedit.data.neutral import neutral_texts
from lit_moeedit.editing import EditMemory, Editor, SecondMoments, evaluate, second_moments
from lit_moeedit.editing.evaluation import Scores, score
from lit_moeedit.editing.further import FurtherMeasures, HeldOut
from lit_moeedit.metrics import bootstrap_interval
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation import OutputPenalty
from lit_moeedit.solvers.deltas import group_positions

HUNDRED, POINTS = 100, 8
DRAWN = (
    "no memory",
    "memory",
    "memory, 1,024 keys",
    "memory, 1,024 keys, strength 1",
    "memory, made anew every 500, strength 1",
)
"""Variants in the picture."""
LINES = {"one batch of all": ":", "one batch of all, strength 1": "--"}
"""Variants that are lines in the picture, and how they are drawn."""
ABILITY = ("held_out_accuracy", "other_style_perplexity")
COMMAND = (
    "`python -m benchmarks.lifelong --facts counterfact.json --seeds {}`, one thread; means over the seeds "
    f"({BY_FACT}); s: processor time of the edits; —: not measured"
)


class PerExpert(EditMemory):
    """Only the second moments of past gated keys of each expert, by their singular vectors (at most ``d_hidden``)."""

    def remember(self, *args: Any, **kwargs: Any) -> None:
        super().remember(*args, **kwargs)
        self.load_state_dict({layer: per_expert(known) for layer, known in self.state_dict().items()})


def per_expert(known: Mapping[str, Any]) -> dict[str, Any]:
    """Keep of the state of a layer the second moment of each expert, and nothing of what the experts do together."""
    vectors, experts = [], []
    for j, pairs in group_positions(known["expert"]):
        _, size, directions = torch.linalg.svd(known["key"][pairs], full_matrices=False)
        vectors.append(size[:, None] * directions)
        experts.append(torch.full((len(size),), j))
    rows = {"row": torch.arange(sum(map(len, experts))), "expert": torch.cat(experts), "key": torch.cat(vectors)}
    return rows | {"facts": [], "sketched": sorted({*known["sketched"], *known["facts"]})}


@dataclass(frozen=True)
class Variant:
    """A stream.

    Attributes:
        memory: makes its memory.
        size: size of its batches.
        facts: its number of facts; ``None`` for all.
        anew: number of batches after which second moments are taken anew; 0 for those of the trained model.
        replaced: number of batches after which all edits are taken out and made anew in one batch, as with
            ``Editor.edit(replaced=…)``, before the next batch; 0 for never.
        strength: of the editor's preservation; ``None`` for that of the config.
    """

    memory: Callable[[], EditMemory | None]
    size: int = 50
    facts: int | None = None
    anew: int = 0
    replaced: int = 0
    strength: float | None = None


def _none() -> None:
    return None


VARIANTS: dict[str, Variant] = {
    "no memory": Variant(_none),
    "memory": Variant(EditMemory),
    "memory, 1,024 keys": Variant(lambda: EditMemory(limit=1024)),
    "memory, 768 keys": Variant(lambda: EditMemory(limit=768)),
    "memory, 512 keys": Variant(lambda: EditMemory(limit=512)),
    "memory, 1,024 keys, moments anew": Variant(lambda: EditMemory(limit=1024), anew=5),
    "memory, strength 1": Variant(EditMemory, strength=1.0),
    "memory, 1,024 keys, strength 1": Variant(lambda: EditMemory(limit=1024), strength=1.0),
    "memory, made anew every 500": Variant(EditMemory, replaced=10),
    "memory, made anew every 500, strength 1": Variant(EditMemory, replaced=10, strength=1.0),
    "memory, 1,024 keys, made anew every 500, strength 1": Variant(
        lambda: EditMemory(limit=1024), replaced=10, strength=1.0
    ),
    "one batch of all": Variant(_none, sys.maxsize),
    "one batch of all, strength 1": Variant(_none, sys.maxsize, strength=1.0),
    "moments of each expert": Variant(PerExpert),
    "memory, 4,096 keys": Variant(lambda: EditMemory(limit=4096)),
    "batches of 500, no memory": Variant(_none, 500, 1000),
    "batches of 500, memory": Variant(EditMemory, 500, 1000),
    "batches of 1, no memory": Variant(_none, 1, 200),
    "batches of 1, memory": Variant(EditMemory, 1, 200),
}


class Stream:
    """The facts, the trained model, and what is measured of both before the first edit."""

    def __init__(self, own: Trained, facts: Sequence[Fact]) -> None:
        self.own, self.facts = own, facts
        self.editor = changed(own.editor, contexts=("",))
        own.data.measured = facts[::2]
        self.texts = own.data.preservation_texts()
        self.moments = self._moments(own.model)
        asked = {text for fact in facts for text in (fact.prompt, *fact.paraphrases)}
        pairs = {(n.prompt, n.target) for fact in facts[::2] for n in fact.neighbours if n.prompt not in asked}
        every = sorted(pairs)
        self.was_right = self.scores(own.model, every).exact.tolist()
        self.neighbours = [pair for pair, is_right in zip(every, self.was_right, strict=True) if is_right]
        self.confusion = float(-self.scores(own.model, self.neighbours).log_prob.mean())
        self.norms = self._norms(own.model)
        corpus, edited = own.data.corpus, own.data.corpus.facts_of(facts)
        statements = [(s.prompt, s.target) for s in corpus.validation if s.fact not in edited]
        held_out = HeldOut(statements, neutral_texts())
        self.further = FurtherMeasures(["general_ability"], own.tokenizer, held_out)
        self.ability = self._ability(own.model)

    def scores(self, model: Any, pairs: Sequence[tuple[str, str]]) -> Scores:
        """Score answers after their prompts."""
        return score(model, self.own.tokenizer, [p for p, _ in pairs], [t for _, t in pairs])

    def said(self, model: Any, facts: Sequence[Fact]) -> Tensor:
        """Tell which new targets the model generates, ``[n]``, 0 or 1."""
        return self.scores(model, [(fact.prompt, fact.target_new) for fact in facts]).exact.double()

    def run(self, variant: Variant) -> list[dict[str, Any]]:
        """Edit the stream, and measure some points of it."""
        model, editor = copy.deepcopy(self.own.model), self._editor(variant)
        facts = self.facts[: variant.facts]
        batches = [facts[i : i + variant.size] for i in range(0, len(facts), variant.size)]
        every, points, begun, spent = max(1, len(batches) // POINTS), [], list[Fact](), 0.0
        right_after: list[float] = []
        moments = self.moments
        for number, batch in enumerate(batches, 1):
            start = time.process_time()
            if variant.anew and number > 1 and number % variant.anew == 1:
                moments = self._moments(model)
            if variant.replaced and number > 1 and number % variant.replaced == 1:
                model.load_state_dict(self.own.model.state_dict())
                editor = self._editor(variant)
                editor.edit(model, self.own.tokenizer, begun, moments=moments)
            editor.edit(model, self.own.tokenizer, batch, moments=moments)
            spent += time.process_time() - start
            begun += batch
            right_after += self.said(model, batch).tolist()
            if number % every == 0 or number == len(batches):
                point = self.measure(model, begun, right_after, number == len(batches)) | {"seconds": spent}
                if editor.memory is not None:
                    point["keys"] = [editor.memory.size(layer)[1] for layer in editor.layers]
                points.append(point)
        return [*points[:-1], points[-1] | {"ability": self._ability(model)}]

    def measure(self, model: Any, facts: Sequence[Fact], right_after: Sequence[float], whole: bool) -> dict[str, Any]:
        """Measure what is left after the edits of ``facts``; of all of them if ``whole``."""
        middle, neighbours = max(0, (len(facts) - HUNDRED) // 2), self.scores(model, self.neighbours)
        parts = {
            "first": self.said(model, facts[:HUNDRED]),
            "middle": self.said(model, facts[middle : middle + HUNDRED]),
            "last": self.said(model, facts[-HUNDRED:]),
            "right after": torch.tensor(right_after).double(),
            "neighbours": neighbours.exact.double(),
        }
        if whole:
            paraphrases = [(text, fact.target_new) for fact in facts for text in fact.paraphrases]
            parts |= {"all": self.said(model, facts), "paraphrases": self.scores(model, paraphrases).exact.double()}
        found: dict[str, Any] = {name: float(own.mean()) for name, own in parts.items()}
        if whole:
            each = {name: "".join(f"{held:g}" for held in own.tolist()) for name, own in parts.items()}
            kept = iter(each["neighbours"])
            each["neighbours"] = "".join(next(kept) if was_right else "-" for was_right in self.was_right)
            found["each"] = each
        growth = {i: norms / self.norms[i] for i, norms in self._norms(model).items()}
        return {
            "edits": len(facts),
            **found,
            "perplexity": math.exp(float(-neighbours.log_prob.mean()) - self.confusion),
            "growth": [float(torch.cat(list(growth.values())).mean()), float(torch.cat(list(growth.values())).max())],
        }

    def _editor(self, variant: Variant) -> Editor:
        editor = changed(self.editor, memory=variant.memory())
        return editor if variant.strength is None else changed(editor, preserve=OutputPenalty(variant.strength))

    def _moments(self, model: Any) -> Mapping[int, SecondMoments]:
        editor = self.editor
        return second_moments(model, self.own.tokenizer, editor.check(model), self.texts, gated=editor.gated)

    def _norms(self, model: Any) -> dict[int, Tensor]:
        """Norms of the down-projections of the edited layers' experts, ``[E]`` by layer."""
        layers = expert_layers(model)
        return {index: layers[index].down_proj.detach().flatten(1).norm(dim=1) for index in self.editor.layers}

    def _ability(self, model: Any) -> dict[str, float]:
        return self.further.measure(model, [], evaluate(model, self.own.tokenizer, self.facts[:1])).metrics


def known_facts(path: Path, own: Trained) -> list[Fact]:
    """Read facts; one whose new target the model has never seen gets another one, drawn by the fact's key."""
    targets, found = sorted({statement.target for statement in own.data.corpus.train}), []
    for fact in read_facts(path, strict=False):
        if fact.target_new not in targets:
            others = [target for target in targets if target != fact.target_true]
            fact = replace(fact, target_new=random.Random(fact.key).choice(others))
        found.append(fact)
    return found


def _shown(ends: Sequence[Mapping[str, Any]], part: str) -> str:
    """Format the mean of a part over seeds, its interval over facts (or neighbours), and its range over seeds."""
    found = [end for end in ends if part in end]
    if not found:
        return "—"
    each = torch.tensor([["01-".index(held) for held in end["each"][part]] for end in found], dtype=torch.float64)
    counts = each < 2
    low, high = bootstrap_interval((each * counts).sum(0), counts.double().sum(0)).tolist()
    means = [end[part] for end in found]
    return cell(statistics.mean(means), (low, high), (min(means), max(means)) if len(means) > 1 else None)


def _number(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):,.{digits}f}" if known else "—"


def ends(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The last point of each variant, by every seed that has it."""
    by_seed = {seed: own["variants"] for seed, own in results.items()}
    found = {name: {seed: own[name][-1] for seed, own in by_seed.items() if name in own} for name in VARIANTS}
    return {name: points for name, points in found.items() if points}


def table(results: Mapping[str, Any]) -> str:
    """Markdown: the end of each stream."""
    columns = ["variant", "seeds", "edits", "first 100", "middle 100", "last 100", "all", "right after their edit"]
    columns += ["paraphrases", "neighbours kept", "perplexity", "norms (mean, max)"]
    columns += ["validation statements said", "perplexity of other text", "keys per layer", "s"]
    before = [own["before"] for own in results.values()]
    ability = [_number([own["ability"].get(name) for own in before]) for name in ABILITY]
    known = _number([own["neighbours"] for own in before], 0)
    lines = [
        *header(columns),
        row(["before", len(before), 0, *["—"] * 6, f"1 of {known}", "1", "1", *ability, "—", "—"]),
    ]
    for name, points in ends(results).items():
        found = [*points.values()]
        parts = ("first", "middle", "last", "all", "right after", "paraphrases", "neighbours")
        shown = [_shown(found, part) for part in parts]
        keys = _number([statistics.mean(end["keys"]) if "keys" in end else None for end in found], 0)
        ability = [_number([end.get("ability", {}).get(own) for end in found]) for own in ABILITY]
        growth = ", ".join(_number([end["growth"][i] for end in found], 2) for i in range(2))
        cells = [
            label_of(name, points, results),
            len(found),
            f"{found[0]['edits']:,}",
            *shown,
            _number([end.get("perplexity") for end in found]),
        ]
        lines.append(row([*cells, growth, *ability, keys, _number([end["seconds"] for end in found], 0)]))
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Curves over the stream, and one batch of all facts as a line.

    Bands show the range of the seeds.
    """
    shown = {"first": "first 100 generated", "middle": "middle 100 generated", "neighbours": "neighbours kept"}
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(15, 3.6), layout="constrained")
    own = [seed["variants"] for seed in results.values()]
    variants = {name: [seed[name] for seed in own if name in seed] for name in VARIANTS if any(name in s for s in own)}
    # a mean of other seeds is another curve
    variants = {name: by_seed for name, by_seed in variants.items() if len(by_seed) == len(own)}
    curves = {name: variants[name] for name in DRAWN if name in variants}
    for number, (name, by_seed) in enumerate(curves.items()):
        at = [point["edits"] for point in by_seed[0]]
        for ax, part in zip(axes, [*shown, "perplexity"], strict=True):
            values = torch.tensor([[point[part] for point in points] for points in by_seed])
            ax.plot(at, values.mean(0), color=f"C{number}", marker=".", label=name)
            ax.fill_between(at, values.amin(0), values.amax(0), color=f"C{number}", alpha=0.15, linewidth=0)
    for name in [name for name in LINES if name in variants]:
        last = [points[-1] for points in variants[name]]
        for ax, part in zip(axes, [*shown, "perplexity"], strict=True):
            ax.axhline(statistics.mean(end[part] for end in last), color="black", linestyle=LINES[name], label=name)
    for ax, title in zip(axes, [*shown.values(), "perplexity, relative"], strict=True):
        ax.set(title=title, xlabel="facts edited")
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(labels) // 2))
    figure.suptitle(f"mean of seeds {', '.join(results)}, and their range")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--facts", type=Path, required=True, help="a file of CounterFact")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    file = arguments.output / "lifelong.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not arguments.fresh else {}
    # earlier versions preserved the neighbours that they measured
    results = {seed: own for seed, own in results.items() if "texts" in own}
    for seed in map(str, arguments.seeds):
        own = trained("counterfact", int(seed), arguments.models, *corpus_options(path=arguments.facts))
        stream = Stream(own, known_facts(arguments.facts, own))
        texts = hashlib.sha256("\n".join(stream.texts).encode()).hexdigest()[:12]
        known = results.get(seed, {})
        if (known.get("weights"), known.get("texts")) != (own.weights, texts):
            known = {"variants": {}, "weights": own.weights, "texts": texts}
        known["before"] = {"ability": stream.ability, "neighbours": len(stream.neighbours)}
        results[seed] = known
        for name in arguments.variants:
            if name in known["variants"]:
                continue
            known["variants"][name] = stream.run(VARIANTS[name])
            # in their order, whatever the order in which they were run
            known["variants"] = {name: known["variants"][name] for name in VARIANTS if name in known["variants"]}
            write("lifelong", COMMAND.format(" ".join(results)), table(results), results, arguments.output)
            draw(results, arguments.output / "lifelong.png")
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
