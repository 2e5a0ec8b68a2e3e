"""Targets of several tokens: edits of the first token of a target alone against edits of every token.

Run from the root of the repository, with the package installed:

    python -m benchmarks.long_targets --facts counterfact.json

The facts of a row are chosen by the number of tokens of their new target. On the atlas, targets of up to six tokens are
answers of the table; on CounterFact, where the answers that the model knows have one token each, and of 30 tokens, they
are known answers drawn at random. Without ``--facts`` the model of CounterFact is left out. Writes
``long_targets.json`` and ``long_targets.md`` into ``benchmarks/results``; rows that are in the JSON are not run again,
``--fresh`` begins anew.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.training import (
    BY_FACT,
    Trained,
    arguments_of,
    changed,
    corpus_options,
    header,
    mean_of,
    quiet,
    row,
    trained,
    write,
)
from lit_moeedit.data import Atlas, Fact
from lit_moeedit.data.atlas import TEMPLATES
from lit_moeedit.data.datamodule import StatementDataset
from lit_moeedit.data.encoding import encode
from lit_moeedit.editing import Editor, Place

MODELS = ("atlas", "counterfact")
CHOICES = ("first", "every")
LENGTHS = {"1": (1, 1), "2": (2, 2), "3–6": (3, 6), "30": (30, 30)}
"""Least and largest number of tokens of a target."""
OWN = "config's own"
"""Name of the facts that a config edits, most of whose targets have one token."""
SUBJECT = "subject_last, layer 0"
FACTS = 12
"""Number of facts of an edit."""
TEXTS = 512
"""Number of texts to preserve."""
PROBE = 64
"""Number of texts on which routing is compared."""
METRICS = ("generalization_accuracy", "specificity_retained", "routing", "perplexity")


def lengths_of(case: Trained, prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
    """Number of tokens of each target after its prompt."""
    return [len(found.ids) - found.target_start for found in encode(case.tokenizer, prompts, targets)]


def known_words(case: Trained) -> list[str]:
    """Answers of the training text that are one token each, sorted."""
    answers = sorted({statement.target for statement in case.data.corpus.train if statement.target.isalpha()})
    lengths = lengths_of(case, ["It is"] * len(answers), answers)
    return [answer for answer, length in zip(answers, lengths, strict=True) if length == 1]


def from_the_table(case: Trained, facts: Sequence[Fact], seed: int, least: int, most: int) -> Iterator[Fact]:
    """Yield facts of the atlas with another answer of the same relation, if one has a fitting length."""
    corpus, draw = case.data.corpus, random.Random(seed)
    assert isinstance(corpus, Atlas)
    for fact in facts:
        relation = next(name for name in TEMPLATES if TEMPLATES[name][0].format(fact.subject) == fact.prompt)
        answers = sorted({entry.answer for entry in corpus.entries if entry.relation == relation} - {fact.target_true})
        lengths = lengths_of(case, [fact.prompt] * len(answers), answers)
        fitting = [answer for answer, length in zip(answers, lengths, strict=True) if least <= length <= most]
        if fitting:
            yield replace(fact, target_new=draw.choice(fitting))


def of_known_words(case: Trained, facts: Sequence[Fact], seed: int, least: int, most: int) -> Iterator[Fact]:
    """Yield facts with targets of random words."""
    draw, words = random.Random(seed), known_words(case)
    for fact in facts:
        yield replace(fact, target_new=" ".join(draw.choices(words, k=draw.randint(least, most))))


def facts_of(name: str, case: Trained, seed: int, length: str, given: Sequence[Fact]) -> list[Fact]:
    """Choose the facts of a row: those that the config edits, or some with targets of the wanted length."""
    if length == OWN:
        return list(given)
    least, most = LENGTHS[length]
    if name == "counterfact" and most == 1:
        return list(given[:FACTS])
    if name == "counterfact":
        return list(of_known_words(case, given[:FACTS], seed, least, most))
    # a fact of each country
    facts = Atlas(edits=len({entry.subject for entry in case.data.corpus.entries}), seed=seed).edits  # type: ignore[attr-defined]
    if most > 6:
        return list(of_known_words(case, facts[:FACTS], seed, least, most))
    return list(from_the_table(case, facts, seed, least, most))[:FACTS]


def measure(case: Trained, editor: Editor, facts: Sequence[Fact]) -> dict[str, Any]:
    """Edit with each choice, with the same second moments, and measure."""
    case.data.corpus.edits[:] = facts  # so that no text that states an edited fact is preserved, or a probe
    case.data._validation = StatementDataset(case.tokenizer, case.data._held_out())
    texts = case.data.preservation_texts()[:TEXTS]
    moments = editor.moments(case.model, case.tokenizer, editor.find_layers(case.model), texts)
    found: dict[str, Any] = {}
    for choice in CHOICES:

        def edit(model: PreTrainedModel, own: Sequence[Fact], choice: str = choice) -> dict[str, float]:
            start = time.perf_counter()
            chosen = changed(editor, target_tokens=choice, memory=None)
            result = chosen.edit(model, case.tokenizer, own, moments=moments)
            nll, residual = float(result.targets.nll.mean()), float(result.residual.nanmean())  # type: ignore[union-attr]
            return {"edit": time.perf_counter() - start, "nll": nll, "residual": residual}

        found[choice] = case.quality(edit, facts, probe=PROBE)
    return found


def rows_of(name: str) -> list[tuple[str, str]]:
    """Token and length of each row of a model."""
    rows = [("last", length) for length in ([OWN] if name == "atlas" else []) + [*LENGTHS]]
    return [*rows, *([(SUBJECT, "3–6")] if name == "atlas" else [])]


def compare(name: str, seed: int, case: Trained, rows: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the results of rows of one model."""
    given, config = list(case.data.edit_facts()), case.editor
    for token, length in rows:
        editor = config if token == "last" else config.at(Place((0,), "subject_last"))
        facts = facts_of(name, case, seed, length, given)
        sizes = lengths_of(case, [fact.prompt for fact in facts], [fact.target_new for fact in facts])
        yield {
            "model": name,
            "seed": seed,
            "token": token,
            "tokens": length,
            "facts": len(facts),
            "lengths": sizes,
            **measure(case, editor, facts),
        }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Format the results as Markdown: means over seeds."""
    names = ("generated", "generalization", "specificity retained", "routing", "perplexity", "target loss")
    lines = header(("model", "token", "tokens", "facts", "rows", *names, "edit, s", "time"))
    for key in dict.fromkeys((result["model"], result["token"], result["tokens"]) for result in results):
        own = [result for result in results if (result["model"], result["token"], result["tokens"]) == key]
        for choice in CHOICES:
            found = [result[choice] for result in own]
            cells = [mean_of(found, metric) for metric in ("efficacy_accuracy", *METRICS)]
            loss, seconds = (statistics.mean(one["seconds"][name] for one in found) for name in ("nll", "edit"))
            ratio = statistics.mean(one[choice]["seconds"]["edit"] / one["first"]["seconds"]["edit"] for one in own)
            facts = "/".join(dict.fromkeys(str(result["facts"]) for result in own))
            lines.append(row((*key, facts, choice, *cells, f"{loss:.2f}", f"{seconds:.1f}", f"{ratio:.2f}")))
    return "\n".join(lines)


NOTES = (
    "`rows`: the setting `target_tokens`. `generated`: share of the new targets that are generated in full. "
    f"`generalization`: the same after paraphrases. Means over the seeds, {BY_FACT}. `routing`: similarity above the "
    "lowest edited layer. `perplexity`: after over before. `target loss`: nats per token with the target vectors. "
    "`edit, s`: without second moments; `time`: over that of `first`, in one run."
)


def main() -> None:
    """Run it, and write the table."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--names", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--facts", type=Path, help="a CounterFact file")
    parser.add_argument("--fresh", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "long_targets.json"
    results: list[dict[str, Any]] = []
    if file.exists() and not arguments.fresh:
        results = json.loads(file.read_text(encoding="utf-8"))
    for name in arguments.names:
        if name == "counterfact" and arguments.facts is None:
            continue
        options = corpus_options(path=arguments.facts) if name == "counterfact" else []
        for seed in arguments.seeds:
            known = {(one["token"], one["tokens"]) for one in results if (one["model"], one["seed"]) == (name, seed)}
            missing = [one for one in rows_of(name) if one not in known]
            if not missing:
                continue
            for result in compare(name, seed, trained(name, seed, arguments.models, *options), missing):
                results.append(result)
                results.sort(key=_order)
                seeds = " ".join(map(str, sorted({one["seed"] for one in results})))
                command = (
                    f"`python -m benchmarks.long_targets --facts counterfact.json --seeds {seeds}`, "
                    f"{torch.get_num_threads()} thread(s)"
                )
                write("long_targets", command, f"{table(results)}\n\n{NOTES}", results, arguments.output)
    sys.stdout.write(table(results) + "\n")


def _order(result: dict[str, Any]) -> tuple[int, int, int]:
    rows = rows_of(result["model"])
    return MODELS.index(result["model"]), rows.index((result["token"], result["tokens"])), result["seed"]


if __name__ == "__main__":
    main()
