"""A model nearer to a real language model: what it knows, where it reads facts, and what editing does to it.

Run from the root of the repository, with the package installed, and WordNet's ``data.noun`` (from the Debian package
``wordnet-base``, say) in a folder:

    python -m benchmarks.standin --wordnet /usr/share/wordnet --seeds 0 1 2

Training takes about 40 minutes on one shared core, once, and the rest 25 minutes. Facts that the model does not
generate are not edited. Writes ``standin.json`` and ``standin.md`` into ``benchmarks/results``; parts, and editors, of
the same weights that are not measured again are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmarks.baselines import in_context
from benchmarks.editing import ADAPTERS, IN_CONTEXT, runs
from benchmarks.standin.measures import (
    CANDIDATES,
    KNOWN,
    WORDINGS,
    corpus_of,
    generated_contexts,
    keep_known,
    perplexities,
    recall,
    swaps,
    trained_on,
)
from benchmarks.training import (
    BY_FACT,
    QUALITY,
    STANDIN,
    Trained,
    arguments_of,
    changed,
    corpus_options,
    header,
    label_of,
    mean_of,
    quiet,
    row,
    title_of,
    trained,
    write,
)
from lit_moeedit.data import Fact
from lit_moeedit.data.encoding import join
from lit_moeedit.editing import Place
from lit_moeedit.models.experts import expert_layers

PARTS = ("knowledge", "places", "contexts", "neutral", "editors", "survival")
GENERATED = (2, 5)
"""Numbers of contexts that the model generates itself."""
STEPS, RATES = 120, (0.0, 2.5e-5, 2.5e-4)
"""Steps of further training, and learning rates: none, that at the end of the config's schedule, and ten times that."""
PLACES = (
    *(Place(layers, "subject_last") for layers in ((0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3), (3,), (0, 1, 2, 3))),
    *(Place(layers, "last") for layers in ((1, 2, 3), (3, 4), (4,), (3, 4, 5))),
)
NEUTRAL = ((0, 60), (0, 120), (2, 120), (4, 60), (4, 120), (8, 120), (8, 240))
"""Numbers of further neutral prompts, each with a maximum number of steps of the search for target vectors."""
EDITORS = (
    "Woodbury, output",
    "Woodbury, output, two further prompts",
    "Woodbury, output, three further prompts, stop 0.15",
    "Woodbury, covariance",
    "Woodbury, null space",
    "BCD, null space (MoEEdit)",
    "BCD, null space (MoEEdit as released)",
    "Tucker at each layer, output",
    "Woodbury carried down, output",
    "Tucker carried down, output",
    "Woodbury at the target layer alone, output",
    "Tucker, null space (MoTE)",
    "AlphaEdit per expert",
    "MEMIT per expert",
    "FT",
    "FT-L, 0.05",
    *ADAPTERS,
    IN_CONTEXT,
)
GROUPS = ("specificity_retained_same_relation", "specificity_retained_same_subject")
SHOWN = ("efficacy_accuracy", "generalization_accuracy", *QUALITY, *GROUPS)


def measure(found: Trained, parts: Sequence[str], editors: Sequence[str] = EDITORS) -> Iterator[tuple[str, Any]]:
    """Names of what is measured of a model, each with its results."""
    if "knowledge" in parts:
        yield from knowledge(found)
    keep_known(found, KNOWN)
    if "places" in parts:
        yield from at_places(found)
    if "contexts" in parts:
        yield from in_contexts(found)
    if "neutral" in parts:
        yield from with_neutral_prompts(found)
    if "editors" in parts:
        every, methods = runs(found, STANDIN, share=True), {}
        yield "layers", list(found.editor.layers)
        for label in editors:
            methods[label] = in_context(found) if label == IN_CONTEXT else found.quality(every[label])
            yield "editors", methods
    if "survival" in parts:
        yield from survival(found)


def knowledge(found: Trained) -> Iterator[tuple[str, Any]]:
    """What the model knows, and where it reads it."""
    yield "training", {"seconds": found.seconds, "weights": found.weights}
    yield "parameters", sum(parameter.numel() for parameter in found.model.parameters())
    yield "subjects", len(corpus_of(found).subjects)
    yield "words", sum(len(join(text.prompt, text.target).split()) for text in corpus_of(found).train)
    yield "recall", recall(found)
    yield "perplexity", perplexities(found)
    yield "swaps", swaps(found)
    candidates = len(found.data.edit_facts())
    yield "known", keep_known(found, candidates)
    yield "edits", min(KNOWN, len(found.data.edit_facts()))


def at_places(found: Trained) -> Iterator[tuple[str, Any]]:
    """The default editor at several tokens and layers."""
    places, tokenizer = {}, found.tokenizer
    layers = expert_layers(found.model)
    moments = found.editor.moments(found.model, tokenizer, [*layers.values()], found.data.preservation_texts())
    for place in PLACES:
        editor = found.editor.at(place)
        edited = changed(found, editor=editor)  # routing is that of the layers above the edited ones
        own = {index: moments[index] for index in place.layers}
        places[_label(place)] = edited.quality(
            lambda model, facts: editor.edit(model, tokenizer, facts, moments=own).seconds  # noqa: B023
        )
        yield "places", places


def in_contexts(found: Trained) -> Iterator[tuple[str, Any]]:
    """The default editor with other contexts: none, those of the config, and some that the model generates."""
    results, editor = {}, found.editor
    moments = editor.moments(found.model, found.tokenizer, editor.check(found.model), found.data.preservation_texts())
    contexts = {"none": [""], "those of the config": editor.contexts}
    written = generated_contexts(found, max(GENERATED))
    contexts |= {f"{count} generated by the model": ["", *written[:count]] for count in GENERATED}
    for label, texts in contexts.items():
        own = changed(editor, contexts=tuple(texts))
        run = found.quality(lambda model, facts: own.edit(model, found.tokenizer, facts, moments=moments).seconds)  # noqa: B023
        results[label] = {**run, "contexts": list(texts)}
        yield "contexts", results


def with_neutral_prompts(found: Trained) -> Iterator[tuple[str, Any]]:
    """The default editor with further neutral prompts, which hold other answers about the subject."""
    tokenizer, results, editor = found.tokenizer, {}, found.editor
    moments = editor.moments(found.model, tokenizer, editor.check(found.model), found.data.preservation_texts())
    for count, steps in NEUTRAL:
        own = changed(editor, neutral_prompts=count, targets=changed(editor.targets, steps=steps))
        results[f"{count}, at most {steps} steps"] = found.quality(
            lambda model, facts: own.edit(model, tokenizer, facts, moments=moments).seconds  # noqa: B023
        )
        yield "neutral", results


def survival(found: Trained) -> Iterator[tuple[str, Any]]:
    """The default editor's edits, after further training without the edited subjects."""
    texts, results = found.data.preservation_texts(), {}
    for rate in RATES:

        def edit(model: PreTrainedModel, facts: Sequence[Fact], rate: float = rate) -> dict[str, float]:
            seconds = found.editor.edit(model, found.tokenizer, facts, texts).seconds
            if rate:
                trained_on(found, model, STEPS, rate)
            return seconds

        results[f"{STEPS if rate else 0} steps at {rate:g}"] = found.quality(edit)
        yield "survival", results


def _label(place: Place) -> str:
    return f"{place.token}, layers {', '.join(map(str, place.layers))}"


TITLES = {
    "places": "The default editor by token and layers",
    "contexts": "The default editor at the token and layers of the config, by the contexts of the prompts, which are "
    "edited without one, too",
    "neutral": "The default editor at the token and layers of the config, by further neutral prompts of each fact and "
    "steps of the search for target vectors",
    "editors": "Editors at the token and layers of the config, with shared targets and moments",
    "survival": "The default editor at the token and layers of the config, after further training on other texts",
}
HEADS = {"neutral": "neutral prompts"}


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of all that was measured: what the model of each seed knows, then the edits of all seeds together."""
    lines = []
    for seed, found in results.items():
        size, seconds = found["parameters"] / 1e6, found["training"]["seconds"]
        lines += [
            f"Seed {seed}: {size:.1f} M parameters, trained for {seconds:.0f} s on {found['words'] / 1e6:.2f} million "
            f"words, once each: texts about {found['subjects']} persons and places, and definitions.",
            "",
            "Share of facts that it generates, by wording:",
            "",
            *header(["wording", *found["recall"]]),
            *(row([wording, *(f"{r[wording]:.3f}" for r in found["recall"].values())]) for wording in WORDINGS),
            "",
            f"Perplexity of held-out texts: {_listed(found['perplexity'])}.",
            "",
            "Share of prompts that are answered as another subject's if a layer's output at a token is exchanged for "
            "the one that it has with that subject:",
            "",
            *header(["token", *(f"layer {i}" for i in found["swaps"]["last"])]),
            *(row([token, *(f"{x:.2f}" for x in by.values())]) for token, by in found["swaps"].items()),
            "",
            f"{found['edits']} edits of facts that it generates, which are {found['known']:.0%} of the candidates.",
            "",
        ]
    for part, title in TITLES.items():
        by_seed = {seed: found[part] for seed, found in results.items() if part in found}
        if not by_seed:
            continue
        lines += [f"{title}, mean over seeds {', '.join(by_seed)} ({BY_FACT}):", ""]
        lines += header([HEADS.get(part, part.removesuffix("s")), *map(title_of, SHOWN)])
        for label in dict.fromkeys(label for rows in by_seed.values() for label in rows):
            own = {seed: rows[label] for seed, rows in by_seed.items() if label in rows}
            lines.append(row([label_of(label, own, by_seed), *(mean_of([*own.values()], metric) for metric in SHOWN)]))
        lines.append("")
    return "\n".join(lines)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def main() -> None:
    parser = arguments_of(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--editors", nargs="+", choices=EDITORS, default=list(EDITORS))
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet's data.noun")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "standin.json"
    results: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    options = corpus_options(wordnet=arguments.wordnet, edits=CANDIDATES)
    for seed in map(str, arguments.seeds):
        found = trained(STANDIN, int(seed), arguments.models, *options)
        known = results.get(seed, {}).get("training", {}).get("weights") == found.weights
        parts = arguments.parts if known else PARTS
        results[seed] = results[seed] if known else {}
        for name, value in measure(found, parts, arguments.editors):
            # rows that are not measured yet keep their results
            results[seed][name] = {**results[seed].get(name, {}), **value} if name in TITLES else value
            if "edits" in results[seed]:
                command = f"`python -m benchmarks.standin --wordnet /usr/share/wordnet --seeds {' '.join(results)}`"
                write("standin", command, tables(results), results, arguments.output)
    sys.stdout.write(tables(results))


if __name__ == "__main__":
    main()
