"""All further measures of edits by several editors: what follows from a fact, and what the model writes and can do.

Run from the root of the repository, with the package installed:

    python -m benchmarks.measures --facts counterfact.json

One model learns the atlas with facts that chain (``chains: true``): rivers of capitals, codes of countries, and what
follows of three in four countries. 30 capitals are edited. Probes ask for the river of the new capital (`multi hop`),
for the capital by the country's code (`portability`), and for the country of the new capital (`reversed`). The table
of questions before any edit tells what the model answers right of what it has read, and of what follows from it alone:
no editor can be asked for more. The other model is that of CounterFact, with 50 edits. Its file has no such probes.

Every editor edits a copy of the same weights; the new fact in the prompt changes none. Writes ``measures.json`` and
``measures.md``. What is in the JSON of the same weights is not measured again; ``--fresh`` begins anew.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.baselines import stated, train_adapters
from benchmarks.editing import ADAPTERS, IN_CONTEXT, editors
from benchmarks.training import (
    BY_FACT,
    Trained,
    arguments_of,
    corpus_options,
    header,
    label_of,
    mean_of,
    quiet,
    row,
    shares_by_fact,
    title_of,
    trained,
    write,
)
from lit_moeedit.data import Atlas, Fact, neutral_texts
from lit_moeedit.editing import FineTuning, evaluate
from lit_moeedit.editing.evaluation import score
from lit_moeedit.editing.further import MEASURES, FurtherMeasures, HeldOut
from lit_moeedit.editing.job import EditResult

CHAINS = "atlas, chains"
EDITS = {CHAINS: 30, "counterfact": 50}
EDITORS = (
    "Woodbury, output",
    "Woodbury, output, three further prompts, stop 0.15",
    "Woodbury, null space",
    "BCD, null space (MoEEdit)",
    "BCD, null space (MoEEdit as released)",
    "Tucker, null space (MoTE)",
    "MEMIT per expert",
    "FT",
    "FT-L, 0.05",
)
KINDS = ("multi_hop", "portability", "reversed")
EXACT = ("efficacy", "generalization", "specificity_retained", "generation_exact", "generation_contained")
TABLES = {
    "What is said": (*EXACT, *KINDS),
    "Probabilities and texts": ("probability_gap", "log_probability_gap", "fluency", "copy_accuracy",
                                "held_out_accuracy", "other_style_perplexity"),
    "Weights and routing": ("weight_growth_mean", "weight_growth_max", "null_space_rank_mean", "null_space_rank_min",
                            "template_routing_similarity"),
}  # fmt: skip
UNEDITED = "no edit"
Apply = Callable[[PreTrainedModel, Sequence[Fact]], EditResult | None]


def applied(found: Trained) -> dict[str, Apply]:
    """Every editor by what it is called; adapters have no result of an edit."""
    texts, base = found.data.preservation_texts(), found.editor

    def by(editor: Any) -> Apply:
        return lambda model, facts: editor.edit(model, found.tokenizer, facts, texts)

    every = editors(base, "counterfact")
    settings = FineTuning(base.layers, 60, ADAPTERS, stop=base.targets.stop, contexts=base.contexts)

    def adapt(model: PreTrainedModel, facts: Sequence[Fact]) -> None:
        train_adapters(model, found.tokenizer, facts, settings)

    return {**{name: by(every[name]) for name in EDITORS}, "LoRA": adapt}


def edits(found: Trained, known: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the editors of one model that are not known yet; yields names and results."""
    tokenizer, facts, layers = found.tokenizer, found.data.edit_facts(), found.editor.layers
    held_out = HeldOut(found.data.held_out_statements(), neutral_texts())
    further = FurtherMeasures(MEASURES, tokenizer, held_out)
    start = time.perf_counter()
    evaluation = evaluate(found.model, tokenizer, facts)
    before = further.measure(found.model, facts, evaluation, layers)
    unedited = before.add_to(evaluation)

    def result(after: Any, asked: Sequence[Fact], **others: Any) -> dict[str, Any]:
        shown = [name for names in TABLES.values() for name in names if name != "held_out_accuracy"]
        seconds = time.perf_counter() - start
        known = {name: value for name, value in {**after.metrics, **others}.items() if not math.isnan(value)}
        return {**known, "by_fact": shares_by_fact(after, asked, shown), "seconds": seconds}

    if UNEDITED not in known:
        yield UNEDITED, result(unedited, facts)
    if IN_CONTEXT not in known:
        start = time.perf_counter()
        told = [stated(fact) for fact in facts]
        neighbours = {new.key: evaluation.neighbours_exact[fact.key] for new, fact in zip(told, facts, strict=True)}
        asked = evaluate(found.model, tokenizer, told, neighbours)
        # what is measured on other texts has nothing stated before it
        own = FurtherMeasures([name for name in MEASURES if name != "general_ability"], tokenizer)
        yield IN_CONTEXT, result(own.measure(found.model, told, asked).add_to(asked), told)
    for name, apply in applied(found).items():
        if name in known:
            continue
        start, model = time.perf_counter(), copy.deepcopy(found.model)
        done = apply(model, facts)
        asked = evaluate(model, tokenizer, facts, evaluation.neighbours_exact)
        after = further.measure(model, facts, asked, layers, before)
        changed = {} if done is None else further.of_result(done, before, after)
        yield name, result(after.add_to(asked), facts, **changed)


def questions(found: Trained) -> dict[str, float]:
    """Share of the questions before any edit that the model answers right, of those it has read and of the others."""
    corpus, shares = found.data.corpus, {}
    assert isinstance(corpus, Atlas) and corpus.chains is not None
    for label, statements in (("read", corpus.chains.statements(is_asked=False)), ("not read", corpus.questions)):
        exact = score(
            found.model, found.tokenizer, [s.prompt for s in statements], [s.target for s in statements]
        ).exact
        for kind in KINDS:
            own = torch.tensor([s.fact.endswith(kind) for s in statements])
            shares[f"{kind}, {label}"] = float(exact[own].float().mean())
    return shares


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: what the model of chains answers before, and then each model's editors in tables by subject."""
    lines: list[str] = []
    asked = [own["questions"] for own in results.get(CHAINS, {}).values()]
    if asked:
        lines += [
            "Answered right before any edit, of countries of which the model has read what follows, and of others:"
        ]
        lines.append("")
        lines += [*header(asked[0]), row([mean_of(asked, name) for name in asked[0]]), ""]
    for name, by_seed in results.items():
        labels = dict.fromkeys(label for own in by_seed.values() for label in own["editors"])
        for subject, metrics in TABLES.items():
            lines += [f"{subject}: {name}, {EDITS[name]} edits", ""]
            known = [m for m in metrics if any(m in run for own in by_seed.values() for run in own["editors"].values())]
            known = [m for m in known if name == CHAINS or m not in KINDS]
            lines += header(["editor", *map(title_of, known)])
            for label in labels:
                runs = {seed: own["editors"][label] for seed, own in by_seed.items() if label in own["editors"]}
                own = [dict.fromkeys(known) | run for run in runs.values()]
                lines.append(row([label_of(label, runs, by_seed), *(mean_of(own, metric) for metric in known)]))
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it its model is left out")
    parser.add_argument("--parts", nargs="+", choices=tuple(EDITS), default=list(EDITS))
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "measures.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not arguments.fresh else {}
    for name in arguments.parts:
        if name == "counterfact" and arguments.facts is None:
            sys.stderr.write(f"{name} needs --facts, left out\n")
            continue
        for seed in arguments.seeds:
            options = corpus_options(edits=EDITS[name], **({} if name == CHAINS else {"path": arguments.facts}))
            found = trained(name, seed, arguments.models, *options)
            own = results.setdefault(name, {}).get(str(seed), {})
            if own.get("weights") != found.weights:
                own = {"weights": found.weights, "training": found.seconds, "editors": {}}
                if name == CHAINS:
                    own["questions"] = questions(found)
            results[name][str(seed)] = own
            for label, result in edits(found, [*own["editors"]]):
                own["editors"][label] = result
                command = (
                    f"`python -m benchmarks.measures --facts counterfact.json --seeds {' '.join(results[name])}`, "
                    f"{torch.get_num_threads()} thread(s): means over the seeds ({BY_FACT})"
                )
                write("measures", command, table(results), results, arguments.output)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
