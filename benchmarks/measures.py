"""All further measures of edits by several editors: what follows from a fact, and what the model writes and can do.

Run from the root of the repository, with the package installed:

    python -m benchmarks.measures --facts counterfact.json

One model learns the atlas with facts that chain (``chains: true``): rivers of capitals, codes of countries, and what
follows from these, of half of the countries. 50 capitals are edited. Probes ask for the river of the new capital
(`multi hop`), for the new capital by the country's code (`portability`), and for its country (`reversed`).
They are shown apart for countries of which the model has read the old answers to these questions, and for the others.
The first table has what the model answers before any edit: if it cannot follow a chain, it cannot show that an editor
has changed all that follows. `others kept` is the share of the questions about unedited countries that it answers as
before. The other model is that of CounterFact, with 50 edits. Its file has no such probes.

Every editor edits a copy of the same weights; the new fact in the prompt changes none. Writes ``measures.json`` and
``measures.md``. What is in the JSON of the same weights and facts is not measured again; ``--fresh`` begins anew.

The model of chains takes 7 to 10 minutes to train, and each editor up to half a minute, on one core.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baselines import asked_in_context, train_adapters
from benchmarks.editing import IN_CONTEXT, adapter_training, editors
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
from lit_moeedit.data import Atlas, Fact, Statement, neutral_texts
from lit_moeedit.editing import Evaluation, evaluate
from lit_moeedit.editing.evaluation import score
from lit_moeedit.editing.further import MEASURES, Further, FurtherMeasures, HeldOut
from lit_moeedit.editing.job import EditResult

CHAINS = "atlas, chains"
EDITS = {CHAINS: 50, "counterfact": 50}
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
GROUPS = ("read", "not read")
OTHERS = "others_kept"
TABLES = {
    "What is said": ("efficacy_accuracy", "generalization_accuracy", "specificity_retained", "generation_exact",
                     "generation_contained"),
    "What follows": (*(f"{kind}, {group}" for group in GROUPS for kind in KINDS), OTHERS),
    "Probabilities and texts": ("probability_gap", "log_probability_gap", "fluency", "copy_accuracy",
                                "held_out_accuracy", "other_style_perplexity"),
    "Weights and routing": ("weight_growth_mean", "weight_growth_max", "null_space_rank_mean", "null_space_rank_min",
                            "template_routing_similarity"),
}  # fmt: skip
NOTES = (
    "These models have read answers alone, and no text that goes on after them. They know no end of a text, so next to "
    "nothing that they generate is exact, and what follows the answer, its fluency, copying and the perplexity of text "
    "of another style are those of a model that has not learned to write: they can be compared with the row without an "
    "edit, and with no other model."
)
UNEDITED = "no edit"
Apply = Callable[[PreTrainedModel, Sequence[Fact]], EditResult | None]


def applied(found: Trained) -> dict[str, Apply]:
    """Every editor by what it is called; adapters have no result of an edit."""
    texts, base = found.data.preservation_texts(), found.editor

    def by(editor: Any) -> Apply:
        return lambda model, facts: editor.edit(model, found.tokenizer, facts, texts)

    every, settings = editors(base, "counterfact"), adapter_training(base)

    def adapt(model: PreTrainedModel, facts: Sequence[Fact]) -> None:
        train_adapters(model, found.tokenizer, facts, settings)

    return {**{name: by(every[name]) for name in EDITORS}, "LoRA": adapt}


def answered(found: Trained, model: PreTrainedModel, statements: Sequence[Statement]) -> Tensor:
    """Tell which statements the model completes, ``[n]`` bool."""
    prompts, answers = [s.prompt for s in statements], [s.target for s in statements]
    return score(model, found.tokenizer, prompts, answers).exact


def in_groups(found: Trained, after: Evaluation, facts: Sequence[Fact]) -> Evaluation:
    """Take probes apart by whether the model has read the old answers to them."""
    if not isinstance(found.data.corpus, Atlas) or found.data.corpus.chained is None:
        return after
    asked = found.data.corpus.chained.asked_countries
    is_read = torch.tensor([fact.subject not in asked for fact in facts])
    parts: dict[str, Tensor] = {}
    for kind in KINDS:
        for group, members in zip(GROUPS, (is_read, ~is_read), strict=True):
            parts[f"{kind}, {group}"] = after.by_fact[kind] * members
    means = {name: float(sums[0].sum() / sums[1].sum()) for name, sums in parts.items()}
    return Further(means, parts).add_to(after)


def edits(found: Trained, known: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the editors of one model that are not known yet; yields names and results."""
    tokenizer, facts, layers = found.tokenizer, found.data.edit_facts(), found.editor.layers
    held_out = HeldOut(found.data.held_out_statements(), neutral_texts())
    further = FurtherMeasures(MEASURES, tokenizer, held_out)
    evaluation = evaluate(found.model, tokenizer, facts)
    before = further.measure(found.model, facts, evaluation, layers)
    others = unedited_questions(found)
    right = answered(found, found.model, others) if others else None

    def result(model: PreTrainedModel, after: Evaluation, asked: Sequence[Fact], **of_edit: float) -> dict[str, Any]:
        # held-out statements are no facts of the edit
        shown = [name for names in TABLES.values() for name in names if name != "held_out_accuracy"]
        after = in_groups(found, after, asked)
        if right is not None:
            of_edit[OTHERS] = float(answered(found, model, others)[right].float().mean())
        known = {name: value for name, value in {**after.metrics, **of_edit}.items() if not math.isnan(value)}
        return {**known, "by_fact": shares_by_fact(after, asked, shown)}

    if UNEDITED not in known:
        yield UNEDITED, result(found.model, before.add_to(evaluation), facts)
    if IN_CONTEXT not in known:
        told, asked = asked_in_context(found, evaluation)
        # what is measured on other texts has nothing stated before it
        own = FurtherMeasures([name for name in MEASURES if name != "general_ability"], tokenizer)
        yield IN_CONTEXT, result(found.model, own.measure(found.model, told, asked).add_to(asked), told)
    for name, apply in applied(found).items():
        if name in known:
            continue
        model = copy.deepcopy(found.model)
        done = apply(model, facts)
        asked = evaluate(model, tokenizer, facts, evaluation.neighbours_exact)
        after = further.measure(model, facts, asked, layers, before)
        changed = {} if done is None else further.of_result(done, before, after)
        yield name, result(model, after.add_to(asked), facts, **changed)


def unedited_questions(found: Trained) -> list[Statement]:
    """Return what the model has read of what follows from facts that are not edited."""
    corpus = found.data.corpus
    if not isinstance(corpus, Atlas) or corpus.chained is None:
        return []
    edited = corpus.facts_of(found.data.edit_facts())
    return [statement for statement in corpus.chained.statements(is_asked=False) if statement.fact not in edited]


def questions(found: Trained) -> dict[str, float]:
    """Share that the model answers before any edit: of single facts, of what it has read to follow, and of the rest."""
    corpus = found.data.corpus
    assert isinstance(corpus, Atlas) and corpus.chained is not None
    single = [s for s in (*corpus.train, *corpus.validation) if s.fact.endswith(("|capital", "|river", "|code"))]
    parts = {"single facts": single, "read": corpus.chained.statements(is_asked=False), "not read": corpus.questions}
    shares = {}
    for label, statements in parts.items():
        exact = answered(found, found.model, statements)
        for kind in ("capital", "river", "code") if label == "single facts" else KINDS:
            own = torch.tensor([s.fact.endswith(f"|{kind}") for s in statements])
            shares[kind if label == "single facts" else f"{kind}, {label}"] = float(exact[own].float().mean())
    return shares


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: what the model of chains answers before, and then each model's editors in tables by subject."""
    lines: list[str] = []
    asked = [own["questions"] for own in results.get(CHAINS, {}).values()]
    if asked:
        lines += ["Answered right before any edit: single facts, and what follows, read or not:", ""]
        lines += [*header([*map(title_of, asked[0])]), row([mean_of(asked, name) for name in asked[0]]), ""]
    for name, by_seed in results.items():
        labels = dict.fromkeys(label for own in by_seed.values() for label in own["editors"])
        for subject, metrics in TABLES.items():
            known = [m for m in metrics if any(m in run for own in by_seed.values() for run in own["editors"].values())]
            if not known:
                continue
            lines += [f"{subject}: {name}, {EDITS[name]} edits, mean over seeds {', '.join(by_seed)}", ""]
            lines += header(["editor", *map(title_of, known)])
            for label in labels:
                runs = {seed: own["editors"][label] for seed, own in by_seed.items() if label in own["editors"]}
                own = [dict.fromkeys(known) | run for run in runs.values()]
                lines.append(row([label_of(label, runs, by_seed), *(mean_of(own, metric) for metric in known)]))
            lines.append("")
    return "\n".join([*lines, NOTES])


def main() -> None:
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--facts", type=Path, help="a CounterFact file; without it its model is left out")
    parser.add_argument("--parts", nargs="+", choices=tuple(EDITS), default=list(EDITS))
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "measures.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not arguments.fresh else {}
    command = (
        f"`python -m benchmarks.measures --facts counterfact.json`, {torch.get_num_threads()} thread(s): {BY_FACT}"
    )
    for name in arguments.parts:
        if name == "counterfact" and arguments.facts is None:
            sys.stderr.write(f"{name} needs --facts, left out\n")
            continue
        for seed in arguments.seeds:
            options = corpus_options(edits=EDITS[name], **({} if name == CHAINS else {"path": arguments.facts}))
            found = trained(name, seed, arguments.models, *options)
            of = {"weights": found.weights, "facts": " ".join(fact.key[:16] for fact in found.data.edit_facts())}
            own = results.setdefault(name, {}).get(str(seed), {})
            if any(own.get(part) != value for part, value in of.items()):
                own = {**of, "training": found.seconds, "editors": {}}
                if name == CHAINS:
                    own["questions"] = questions(found)
            results[name][str(seed)] = own
            for label, result in edits(found, [*own["editors"]]):
                own["editors"][label] = result
                write("measures", command, table(results), results, arguments.output)
    write("measures", command, table(results), results, arguments.output)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
