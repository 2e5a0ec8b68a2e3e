"""The place that locating chooses against the best place of a full sweep: scores, and what each of them costs.

Run from the root of the repository, with the package installed:

    python -m benchmarks.locate --facts counterfact.json

The sweep edits all facts at every single layer and every window of two or three layers, at both tokens. Locating sees
eight facts. Both have the editor of the model's config but for layers and token. Without ``--facts`` the model of
CounterFact is left out. Writes ``locate.json`` and ``locate.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import Trained, arguments_of, changed, header, quiet, row, trained, write
from lit_moeedit.editing import Place, evaluate, locate
from lit_moeedit.editing.locating import Trial
from lit_moeedit.editing.place import TOKENS
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import decoder_layers

MODELS = ("atlas", "atlas, Mixtral", "counterfact")


def all_places(case: Trained) -> Iterator[Place]:
    """Yield every window of one to three layers at each token, but for the subject's at the last layer."""
    layers = expert_layers(case.model)
    indices = list(layers)
    last = decoder_layers(case.model, layers[indices[-1]])[-1]
    for token in TOKENS:
        for size in range(1, 4):
            for start in range(len(indices) - size + 1):
                chosen = tuple(indices[start : start + size])
                if token == "last" or layers[chosen[-1]].layer is not last:
                    yield Place(chosen, token)


def edited_at(case: Trained, place: Place, texts: list[str]) -> Trial:
    """Edit all facts at a place, measure, and undo."""
    facts, before = case.data.edit_facts(), evaluate(case.model, case.tokenizer, case.data.edit_facts())
    metrics: dict[str, float] = {}

    def guard() -> bool:
        metrics.update(evaluate(case.model, case.tokenizer, facts, before.neighbours_exact).metrics)
        return False

    result = case.editor.at(place).edit(case.model, case.tokenizer, facts, texts, guard=guard)
    names = ("efficacy_accuracy", "generalization_accuracy", "specificity_retained")
    return Trial(place, float(result.targets.nll.mean()), *(metrics[name] for name in names))


def compare(name: str, seed: int, case: Trained) -> dict[str, Any]:
    """Sweep and locate on one model."""
    texts = case.data.preservation_texts()
    start = time.perf_counter()
    sweep = [edited_at(case, place, texts) for place in all_places(case)]
    swept = time.perf_counter() - start
    settings = changed(case.editor, layers=(), token="auto", memory=None)
    start = time.perf_counter()
    found = locate(case.model, case.tokenizer, case.data.edit_facts(), texts, editor=settings)
    located = time.perf_counter() - start
    best = max(sweep, key=lambda trial: trial.score or 0.0)
    chosen = next(trial for trial in sweep if trial.place == found.place)
    return {
        "model": name,
        "seed": seed,
        "facts": len(case.data.edit_facts()),
        "best": best.to_dict(),
        "chosen": chosen.to_dict(),
        "sweep": [trial.to_dict() for trial in sweep],
        "location": found.to_dict(),
        "seconds": {"sweep": swept, "locate": located},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as Markdown."""
    names = (
        "model",
        "seed",
        "chosen",
        "score",
        "best of the sweep",
        "score",
        "points below",
        "locating, s",
        "sweep, s",
    )
    lines = header(names)
    for result in results:
        chosen, best, seconds = (result[key] for key in ("chosen", "best", "seconds"))
        lines.append(
            row(
                (
                    result["model"],
                    result["seed"],
                    Place.from_dict(chosen),
                    f"{chosen['score']:.3f}",
                    Place.from_dict(best),
                    f"{best['score']:.3f}",
                    f"{100 * (best['score'] - chosen['score']):.1f}",
                    f"{seconds['locate']:.1f}",
                    f"{seconds['sweep']:.1f} ({len(result['sweep'])} places)",
                )
            )
        )
    return "\n".join(lines)


def main() -> None:
    """Run it, and write the table."""
    parser = arguments_of(__doc__ or "")
    parser.add_argument("--names", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--facts", type=Path, help="a CounterFact file")
    arguments = parser.parse_args()
    quiet()
    results = []
    notes = (
        "The score is the harmonic mean of efficacy, generalization (both: the new target is generated) and "
        "specificity retained, over all facts."
    )
    seeds = " ".join(map(str, arguments.seeds))
    command = f"`python -m benchmarks.locate --seeds {seeds}`, {torch.get_num_threads()} thread(s)"
    for name in arguments.names:
        if name == "counterfact" and arguments.facts is None:
            continue
        options = [f"--data.init_args.corpus.init_args.path={arguments.facts}"] if name == "counterfact" else []
        for seed in arguments.seeds:
            results.append(compare(name, seed, trained(name, seed, arguments.models, *options)))
            sys.stdout.write(table(results[-1:]) + "\n")
            sys.stdout.flush()
            write("locate", command, f"{table(results)}\n\n{notes}", results, arguments.output)


if __name__ == "__main__":
    main()
