"""Generalization and neighbours on 300 facts of CounterFact: the hundred of the other benchmarks, and two further ones.

Run from the root of the repository, with the package installed:

    python -m benchmarks.further_facts --facts counterfact.json --seeds 0 1 2

Settings may be chosen on one hundred and measured on the others: those with three further prompts and a stop of 0.15
were chosen on the second, those with a stop of 0.3 on the first, and the third had no part in any choice. Each hundred
is edited by itself, and no text of another one is a further prompt. Writes ``further_facts.json`` and
``further_facts.md`` into ``benchmarks/results``; what is in the JSON is not measured again.

Three seeds take about 25 minutes on one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.training import (
    BY_FACT,
    Once,
    arguments_of,
    changed,
    corpus_options,
    header,
    label_of,
    mean_of,
    only,
    quiet,
    row,
    title_of,
    trained,
    write,
)
from lit_moeedit.data import Fact
from lit_moeedit.editing import Editor, SecondMoments
from lit_moeedit.preservation import OutputPenalty

EDITS = 100
NAMES = ("the first hundred", "the second hundred", "the third hundred")
PARTS = {name: slice(number * EDITS, (number + 1) * EDITS) for number, name in enumerate(NAMES)}
SETTINGS = (
    *((0, 0.05, 0.3), (3, 0.15, 0.3), (3, 0.15, 0.03), (3, 0.15, 0.003)),
    *((2, 0.3, 0.003), (3, 0.3, 3e-4), (8, 0.3, 0.3), (8, 0.3, 0.003)),
)
"""Number of further prompts, loss at which the search for target vectors stops, and strength."""
SHOWN = ("efficacy", "generalization", "specificity_retained", "routing", "perplexity")
Moments = Mapping[int, SecondMoments]
Results = dict[str, dict[str, list[dict[str, Any]]]]


def setting_of(result: Mapping[str, Any]) -> tuple[int, float, float]:
    return result["phrasings"], result["stop"], result["strength"]


def edits(
    seed: int, models: Path, facts: Path, known: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure each setting that is not known of a hundred; yields its name and the result."""
    found = trained("counterfact", seed, models, *corpus_options(edits=len(PARTS) * EDITS, path=facts))
    every = list(found.data.edit_facts())

    def edit(editor: Editor, model: PreTrainedModel, own: Sequence[Fact], moments: Moments) -> dict[str, float]:
        return editor.edit(model, found.tokenizer, own, moments=moments, measured=every).seconds

    for name, part in PARTS.items():
        chosen = every[part]
        found.data.corpus.edits[:] = chosen  # so that the others are text as any other
        layers, texts = found.editor.check(found.model), found.data.preservation_texts()
        moments = found.editor.moments(found.model, found.tokenizer, layers, texts)
        shared: dict[float, Once] = {}
        done = {setting_of(one) for one in known[name] if one["weights"] == found.weights}
        for phrasings, stop, strength in (setting for setting in SETTINGS if setting not in done):
            targets = shared.setdefault(stop, Once(changed(found.editor.targets, stop=stop)))
            editor = changed(found.editor, phrasings=phrasings, targets=targets, preserve=OutputPenalty(strength))
            result = found.quality(lambda m, own: edit(editor, m, own, moments), chosen)  # noqa: B023
            settings = {"phrasings": phrasings, "stop": stop, "strength": strength, "weights": found.weights}
            yield name, {**settings, **only(result, SHOWN)}


def table(results: Results) -> str:
    """Markdown: each hundred, and all together."""
    lines = header(["facts", "further prompts", "stop", "strength", *map(title_of, SHOWN)])
    every = [*results]
    for phrasings, stop, strength in SETTINGS:
        for label, names in {**{name: [name] for name in PARTS}, "all": [*PARTS]}.items():
            own = [
                (seed, result)
                for seed, by_name in results.items()
                for name in names
                for result in by_name[name]
                if setting_of(result) == (phrasings, stop, strength)
            ]
            label = label_of(label, dict(own), every)
            cells = [label, phrasings, f"{stop:g}", f"{strength:g}"]
            lines += [row([*cells, *(mean_of([r for _, r in own], metric) for metric in SHOWN)])] if own else []
    return "\n".join(lines)


def main() -> None:
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--facts", type=Path, required=True, help="a CounterFact file")
    arguments = parser.parse_args()
    quiet()
    file = arguments.output / "further_facts.json"
    results: Results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results = {seed: own for seed, own in results.items() if [*own] == [*PARTS]}
    for seed in arguments.seeds:
        by_name = results.setdefault(str(seed), {name: [] for name in PARTS})
        for name, result in edits(seed, arguments.models, arguments.facts, by_name):
            by_name[name] = [*(one for one in by_name[name] if setting_of(one) != setting_of(result)), result]
        command = (
            f"`python -m benchmarks.further_facts --facts counterfact.json --seeds {' '.join(results)}`, "
            f"{torch.get_num_threads()} thread(s): means over the seeds, or the seeds and "
            f"all hundreds ({BY_FACT})"
        )
        write("further_facts", command, table(results), results, arguments.output)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
