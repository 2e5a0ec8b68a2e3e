"""Size of edits as files, and seconds to save, load, apply and fingerprint them, at one layer of Qwen3-30B-A3B.

Run from the root of the repository, with the package installed:

    python -m benchmarks.edit_files

Writes ``edit_files.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lit_moeedit.data.facts import Fact
from lit_moeedit.edits import Edit, LayerChange, State
from lit_moeedit.edits.files import save_edit
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

ROOT = Path(__file__).resolve().parents[1]
EXPERTS, ACTIVE, D_MODEL, D_HIDDEN = 128, 8, 2048, 768
EDITS = (50, 1000)
T = TypeVar("T")


def random_deltas(edits: int) -> ExpertDeltas:
    """Changes of experts that are chosen at random with a skew: a few of them by many edits."""
    generator = torch.Generator().manual_seed(0)
    popularity = torch.arange(1, EXPERTS + 1).pow(-0.5).expand(edits, -1)
    experts = torch.multinomial(popularity, ACTIVE, generator=generator)
    rows = torch.arange(edits).repeat_interleave(ACTIVE)
    left = 1e-3 * torch.randn(edits, D_MODEL, generator=generator)
    return ExpertDeltas(experts.flatten(), rows, left, torch.randn(len(rows), D_HIDDEN, generator=generator), EXPERTS)


def timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def change(weight: nn.Parameter, deltas: ExpertDeltas) -> None:
    with Transaction() as transaction:
        transaction.commit(weight, deltas, exact=True)
        transaction.keep()


def measure(edits: int, weight: nn.Parameter) -> dict[str, float]:
    """Megabytes and seconds of one edit of a layer."""
    deltas = random_deltas(edits)
    facts = tuple(Fact(f"City {n}", f"The city {n} lies in", "Spain", "Italy", ("Where is it?",)) for n in range(edits))
    state = State("[1] torch.bfloat16 0", "[1] torch.bfloat16 0")
    layer = LayerChange("model.layers.3.mlp.experts.down_proj", False, deltas, state, state, state)
    edit = Edit("edit", facts, "Woodbury", {}, (layer,))
    longest = int(deltas.expert_index.bincount().amax())
    with tempfile.TemporaryDirectory() as folder:
        saving, path = timed(lambda: save_edit(edit, folder))
        loading, _ = timed(lambda: Edit.load(path))
        size = sum(file.stat().st_size for file in path.iterdir())
    fingerprint, _ = timed(lambda: fingerprints({"weight": weight}, Ranks()))
    applying, _ = timed(lambda: change(weight, deltas))
    return {
        "MB": size / 1e6,
        "MB as an adapter": EXPERTS * longest * (D_MODEL + D_HIDDEN) * 4 / 1e6,
        "MB of the weights": weight.nbytes / 1e6,
        "save s": saving,
        "load s": loading,
        "apply s": applying,
        "fingerprint s": fingerprint,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weight = nn.Parameter(torch.randn(EXPERTS, D_MODEL, D_HIDDEN).mul_(0.02).bfloat16(), requires_grad=False)
    found = {edits: measure(edits, weight) for edits in EDITS}
    lines = [f"| edits | {' | '.join(found[EDITS[0]])} |", f"| {' | '.join(['---'] * (len(found[EDITS[0]]) + 1))} |"]
    lines += [f"| {edits:,} | {' | '.join(f'{value:.2f}' for value in row.values())} |" for edits, row in found.items()]
    text = "\n".join(lines) + "\n"
    about = (
        f"`python -m benchmarks.edit_files`\n\nOne layer of {EXPERTS} experts, [{D_MODEL}, {D_HIDDEN}], in bfloat16; "
        f"factors in float32; {ACTIVE} experts an edit, chosen with a skew; one thread of a CPU.\n\n"
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "edit_files.md").write_text(about + text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
