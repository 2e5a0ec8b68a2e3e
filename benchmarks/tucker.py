"""Tucker (MoTE) against Woodbury: edits of the same weights of the demo's model, and the spectra of its experts.

Run from the root of the repository, with the package installed:

    python -m benchmarks.tucker --seeds 0 1 2

Every variant edits a copy of the same weights towards the same target vectors. Writes ``tucker.json`` and ``tucker.md``
into ``benchmarks/results``.

Three seeds take about 6 minutes on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training import (
    BY_FACT,
    QUALITY,
    Once,
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
from lit_moeedit.editing import second_moments
from lit_moeedit.preservation import CovariancePenalty, NullSpace, OutputPenalty, Preservation
from lit_moeedit.solvers import Tucker, TuckerFactors, Woodbury

EDITS = 50
PRESERVE: dict[str, tuple[Preservation | None, float]] = {
    "output": (OutputPenalty(0.3), 1e-3),
    "covariance": (CovariancePenalty(1e4), 1e-3),
    "nullspace": (NullSpace(1.0), 0.1),
    "none": (None, 1.0),
}
"""What is preserved, and the ridge."""
ENERGIES = (0.9, 0.95, 0.99)
ALONE = "the last layer alone"


def variants(energies: Sequence[float]) -> dict[str, Woodbury | Tucker]:
    """The solvers by name."""
    found: dict[str, Woodbury | Tucker] = {"Woodbury": Woodbury()}
    for carry in (True, False):
        for whiten in (True, False):
            for energy in energies:
                name = f"Tucker {energy}, {'whitened' if whiten else 'plain'}, {'carried' if carry else 'each layer'}"
                found[name] = Tucker(energy=energy, whiten=whiten, carry=carry)
    # what carrying adds to
    found[f"Tucker {energies[-1]}, whitened, {ALONE}"] = Tucker(energy=energies[-1], carry=False)
    return found


def measure(seed: int, models: Path) -> dict[str, Any]:
    """Measure each variant, by preservation and solver (``edits``), and the spectra of each layer's experts."""
    found = trained("atlas", seed, models, *corpus_options(edits=EDITS))
    layers = found.editor.check(found.model)
    texts, shared = found.data.preservation_texts(), Once(found.editor.targets)
    moments = {g: second_moments(found.model, found.tokenizer, layers, texts, gated=g) for g in (False, True)}
    results: dict[str, Any] = {}
    for preserve, (kept, ridge) in PRESERVE.items():
        own = moments[preserve == "output"]
        for name, solver in variants(ENERGIES if preserve == "output" else ENERGIES[-1:]).items():
            editor = changed(found.editor, preserve=kept, solver=solver, targets=shared, ridge=ridge)
            if name.endswith(ALONE):
                editor.layers = editor.layers[-1:]
            result = found.quality(lambda m, facts: editor.edit(m, found.tokenizer, facts, moments=own).seconds)  # noqa: B023
            seconds = result["seconds"]["features"] + result["seconds"]["solve"]
            results[f"{preserve}, {name}"] = {**only(result, QUALITY), "seconds": seconds}
    spectra: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    for layer in layers:
        second_moment = moments[False][layer.index].total.sum(0) / moments[False][layer.index].count.sum()
        weights, metrics = layer.down_proj.detach(), {"plain": None, "whitened": second_moment}
        spectra[str(layer.index)] = {
            name: [TuckerFactors.hosvd(weights, metric, energy=energy).ranks for energy in ENERGIES]
            for name, metric in metrics.items()
        }
    return {"edits": results, "spectra": spectra}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: the variants, means over seeds, and the spectra."""
    columns = (*QUALITY, "seconds")
    lines = header(["variant", *columns])
    for name in next(iter(results.values()))["edits"]:
        own = [found["edits"][name] for found in results.values()]
        lines.append(row([name, *(mean_of(own, column) for column in columns)]))
    experts, d_model, d_hidden = 16, 128, 192
    lines += ["", f"Directions (of {experts} experts, {d_model} outputs, {d_hidden} inputs) that hold a share:", ""]
    lines += header(["seed", "layer", "weights", *ENERGIES])
    for seed, found in results.items():
        for layer, by_weights in found["spectra"].items():
            for name, ranks in by_weights.items():
                lines.append(row([seed, layer, name, *(" ".join(map(str, r)) for r in ranks)]))
    return "\n".join(lines)


def main() -> None:
    parser = arguments_of(__doc__)
    arguments = parser.parse_args()
    quiet()
    results = {str(seed): measure(seed, arguments.models) for seed in arguments.seeds}
    command = (
        f"`python -m benchmarks.tucker --seeds {' '.join(results)}`, {EDITS} edits, the means over the seeds "
        f"({BY_FACT}); seconds are those of features and solve."
    )
    write("tucker", command, table(results), results, arguments.output)
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()
