"""The place that locating chooses against the best place of a full sweep: scores, and what each of them costs.

Run from the root of the repository, with the package installed:

    python -m benchmarks.locate --facts counterfact.json

The sweep edits all facts at every single layer and every window of two or three layers, at both tokens. Locating sees
eight facts. Both have the editor of the model's config but for layers and token. How many points the place that is
chosen is below the best one has a 95 % bootstrap interval over all facts, the same ones for both places; a sweep of
other facts might find another best. Without ``--facts`` the model of CounterFact is left out. Writes ``locate.json``
and ``locate.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training import Trained, arguments_of, cell, changed, corpus_options, header, quiet, row, trained, write
from lit_moeedit.editing import Evaluation, Place, evaluate, locate
from lit_moeedit.editing.locating import Trial
from lit_moeedit.editing.place import TOKENS
from lit_moeedit.metrics.bootstrap import RESAMPLES
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import decoder_layers

SCORED = ("efficacy_accuracy", "generalization_accuracy", "specificity_retained")
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


def edited_at(case: Trained, place: Place, texts: list[str]) -> tuple[Trial, Tensor]:
    """Edit all facts at a place, measure, and undo; returns also what holds and counts of each fact, ``[3, 2, T]``."""
    facts, before = case.data.edit_facts(), evaluate(case.model, case.tokenizer, case.data.edit_facts())
    found: list[Evaluation] = []

    def guard() -> bool:
        found.append(evaluate(case.model, case.tokenizer, facts, before.neighbours_exact))
        return False

    result = case.editor.at(place).edit(case.model, case.tokenizer, facts, texts, guard=guard)
    metrics, by_fact = found[0].metrics, found[0].by_fact
    trial = Trial(place, float(result.targets.nll.mean()), *(metrics[name] for name in SCORED))
    return trial, torch.stack([by_fact[name] for name in SCORED])


def points_below(chosen: Tensor, best: Tensor) -> tuple[float, float] | None:
    """Compute the 95 % bootstrap interval of the difference of two scores, from what holds and counts of each fact.

    A metric of which nothing counts has no part in a score; ``None`` if no metric has.
    """
    known = (chosen[:, 1].sum(-1) > 0) & (best[:, 1].sum(-1) > 0)
    if not known.any():
        return None
    chosen, best = chosen[known], best[known]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(chosen.shape[-1], (RESAMPLES, chosen.shape[-1]), generator=generator)

    def scores(by_fact: Tensor) -> Tensor:
        holds, counts = by_fact[:, :, drawn].sum(-1).unbind(1)
        # the harmonic mean, which is 0 if one of the three is
        return len(holds) / (counts / holds).sum(0)

    # a draw may have no fact that counts
    low, high = (100 * (scores(best) - scores(chosen))).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def compare(name: str, seed: int, case: Trained) -> dict[str, Any]:
    """Sweep and locate on one model."""
    texts = case.data.preservation_texts()
    start = time.perf_counter()
    edited = [edited_at(case, place, texts) for place in all_places(case)]
    sweep, by_fact = [trial for trial, _ in edited], {trial.place: sums for trial, sums in edited}
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
        "below": points_below(by_fact[chosen.place], by_fact[best.place]),
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
        "points below (95 % interval)",
        "locating, s",
        "sweep, s",
    )
    lines = header(names)
    for result in results:
        chosen, best, below, seconds = (result[key] for key in ("chosen", "best", "below", "seconds"))
        lines.append(
            row(
                (
                    result["model"],
                    result["seed"],
                    Place.from_dict(chosen),
                    f"{chosen['score']:.3f}",
                    Place.from_dict(best),
                    f"{best['score']:.3f}",
                    cell(100 * (best["score"] - chosen["score"]), below, digits=1),
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
    command = (
        f"`python -m benchmarks.locate --facts counterfact.json --seeds {seeds}`, {torch.get_num_threads()} thread(s)"
    )
    for name in arguments.names:
        if name == "counterfact" and arguments.facts is None:
            continue
        options = corpus_options(path=arguments.facts) if name == "counterfact" else []
        for seed in arguments.seeds:
            results.append(compare(name, seed, trained(name, seed, arguments.models, *options)))
            sys.stdout.write(table(results[-1:]) + "\n")
            sys.stdout.flush()
            write("locate", command, f"{table(results)}\n\n{notes}", results, arguments.output)


if __name__ == "__main__":
    main()
