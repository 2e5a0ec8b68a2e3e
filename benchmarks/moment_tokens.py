"""Edits whose second moments are of a part of the text, against the edit with all of it.

Run from the root of the repository, with the package installed:

    python -m benchmarks.moment_tokens

The target vectors are the same in all rows. Writes ``moment_tokens.json`` and ``moment_tokens.md`` into
``benchmarks/results``.

Three seeds take about 6 minutes on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.training import (
    BY_FACT,
    Once,
    Trained,
    arguments_of,
    changed,
    corpus_options,
    header,
    mean_of,
    only,
    quiet,
    row,
    trained,
    write,
)
from lit_moeedit.data import Fact
from lit_moeedit.solvers import ExpertDeltas

PARTS = (250, 500, 1000, 2000, 4000, 8000, 16000, None)
"""Tokens; ``None`` for all."""
SHOWN = ("efficacy_accuracy", "generalization", "specificity_retained", "routing", "perplexity")


def difference(deltas: dict[int, ExpertDeltas], whole: dict[int, ExpertDeltas]) -> float:
    """``‖ΔW − ΔW_all‖_F / ‖ΔW_all‖_F`` over all layers and experts."""
    squares = torch.zeros(2, dtype=torch.float64)
    for index, other in whole.items():
        for expert in sorted({*other.experts, *deltas[index].experts}):
            dense = other.dense(expert).double()
            squares[0] += (deltas[index].dense(expert).double() - dense).square().sum()
            squares[1] += dense.square().sum()
    return float((squares[0] / squares[1]).sqrt())


def measure(found: Trained) -> dict[str, dict[str, Any]]:
    """By number of tokens, metrics of the edit, its seconds of statistics, and how far it is from the whole edit."""
    editor = changed(found.editor, targets=Once(found.editor.targets))
    texts, results = found.data.preservation_texts(), {}
    made: dict[Any, dict[int, ExpertDeltas]] = {}

    def edit(model: PreTrainedModel, facts: Sequence[Fact]) -> dict[str, float]:
        result = changed(editor, max_tokens=part).edit(model, found.tokenizer, facts, texts)
        made[part] = result.deltas
        return result.seconds

    for part in PARTS:
        quality = found.quality(edit)
        results[str(part)] = only(quality, SHOWN) | {"seconds": quality["seconds"]["statistics"]}
    for part in PARTS:
        results[str(part)]["difference"] = difference(made[part], made[None])
    return results


def table(results: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> str:
    """Markdown: means over the seeds of each model."""
    lines = header(["model", "tokens", "difference of ΔW", *SHOWN, "statistics, s"])
    for name, by_seed in results.items():
        for part in map(str, PARTS):
            own = [found[part] for found in by_seed.values()]
            cells = [mean_of(own, key) for key in ("difference", *SHOWN, "seconds")]
            lines.append(row([name, "all" if part == "None" else part, *cells]))
    return "\n".join(lines)


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--facts", type=Path, help="a CounterFact file, for a second model")
    arguments = parser.parse_args()
    quiet()
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    models: dict[str, list[str]] = {"atlas": []}
    if arguments.facts is not None:
        models["counterfact"] = corpus_options(path=arguments.facts.resolve())
    for name, given in models.items():
        results[name] = {str(s): measure(trained(name, s, arguments.models, *given)) for s in arguments.seeds}
    seeds = " ".join(map(str, arguments.seeds))
    facts = " --facts counterfact.json" if arguments.facts is not None else ""
    command = f"`python -m benchmarks.moment_tokens{facts} --seeds {seeds}`, {torch.get_num_threads()} thread(s), "
    command += f"means over the seeds ({BY_FACT})"
    write("moment_tokens", command, table(results), results, arguments.output)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
