"""Tucker (MoTE) against Woodbury: edits of the same weights of the demo's model, and the spectra of its experts.

Run from the root of the repository, with the package installed:

    python -m benchmarks.tucker --seeds 0 1 2

Every variant edits a copy of the same weights towards the same target vectors. Writes ``tucker.json`` and ``tucker.md``
into ``benchmarks/results``.
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


def edits(seed: int, models: Path) -> tuple[dict[str, Any], list[str]]:
    """Measure each variant, by preservation and solver; and the rows of a table of spectra."""
    found = trained("atlas", seed, models, f"--data.init_args.corpus.init_args.edits={EDITS}")
    layers = found.editor.check(found.model)
    texts, shared = found.preservation_texts(), Once(found.editor.targets)
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
    rows = []
    for layer in layers:
        second_moment = moments[False][layer.index].total.sum(0) / moments[False][layer.index].count.sum()
        for name, metric in (("plain", None), ("whitened", second_moment)):
            ranks = [TuckerFactors.hosvd(layer.down_proj.detach(), metric, energy=energy).ranks for energy in ENERGIES]
            rows.append(row([seed, layer.index, name, *(" ".join(map(str, r)) for r in ranks)]))
    return results, rows


def main() -> None:
    parser = arguments_of(__doc__)
    arguments = parser.parse_args()
    quiet()
    results, spectra = {}, []
    for seed in arguments.seeds:
        results[seed], rows = edits(seed, arguments.models)
        spectra += rows
    columns = (*QUALITY, "seconds")
    lines = header(["variant", *columns])
    for name in results[arguments.seeds[0]]:
        own = [results[seed][name] for seed in arguments.seeds]
        lines.append(row([name, *(mean_of(own, column) for column in columns)]))
    experts, d_model, d_hidden = 16, 128, 192
    lines += ["", f"Directions (of {experts} experts, {d_model} outputs, {d_hidden} inputs) that hold a share:", ""]
    lines += [*header(["seed", "layer", "weights", *ENERGIES]), *spectra]
    text = "\n".join(lines) + "\n"
    command = (
        f"`python -m benchmarks.tucker --seeds {' '.join(map(str, arguments.seeds))}`, {EDITS} edits, the means over"
    )
    command += f" the seeds ({BY_FACT}, likewise the seconds of features and solve)."
    write("tucker", command, text, results, arguments.output)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
