"""Target vectors of all facts together against one fact at a time: seconds, final losses, and the parts of the gain.

Run from the root of the repository, with the package installed:

    python -m benchmarks.targets

Both sides get the same facts, hyperparameters and rule to stop. Writes ``targets.json`` and ``targets.md`` into
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.one_at_a_time import reference_targets
from benchmarks.training import MODELS, RESULTS, header, quiet, row, trained, write
from lit_moeedit.data import Atlas
from lit_moeedit.data.encoding import EditToken
from lit_moeedit.editing import Editor, TargetOptimizer, targets
from lit_moeedit.editing.targets import TargetRow, Targets
from lit_moeedit.models.partial_forward import logits

CONTEXTS = ("", "Note:", "As we know,")
DEMO = TargetOptimizer(steps=60, learning_rate=0.5, clamp=2.0, weight_decay=0.05, stop=0.05)
"""As in configs/atlas.yaml."""
PUBLISHED = TargetOptimizer(steps=25, learning_rate=0.1, clamp=0.75, weight_decay=0.5, kl=0.0625, stop=0.05)
DEEP = {
    "vocab_size": 2624,
    "hidden_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "moe_intermediate_size": 192,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "initializer_range": 0.1,
}
"""Three times the demo's depth; the target layer has two thirds of the layers above it."""


def rows_of(
    model: PreTrainedModel, tokenizer: Any, count: int, seed: int, layer: int, token: EditToken
) -> list[TargetRow]:
    """The rows of an edit of ``count`` facts of the atlas, three contexts and a neutral prompt each."""
    editor = Editor([layer], token=token, contexts=CONTEXTS)
    return editor.encode(tokenizer, Atlas(edits=count, seed=seed).edits).rows


def timed(run: Callable[[], Targets], repeats: int = 1) -> tuple[float, Targets]:
    """Median seconds, and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def compare(
    model: PreTrainedModel, layer: Any, rows: Sequence[TargetRow], settings: TargetOptimizer, sample: int = 50
) -> dict[str, Any]:
    """Both sides on the same facts; the reference on the first ``sample`` of them, its seconds scaled to all."""
    count = rows[-1].edit + 1
    some = min(sample, count)
    ours, found = timed(lambda: settings.optimize(model, layer, rows, 0), repeats=3 if count <= 50 else 1)
    seconds, expected = timed(lambda: reference_targets(model, layer, [r for r in rows if r.edit < some], settings))
    difference = (found.nll[:some] - expected.nll).abs()
    return {
        "edits": count,
        "reference_edits": some,
        "reference_seconds": seconds * count / some,
        "seconds": ours,
        "ratio": seconds * count / some / ours,
        "reference_nll": float(expected.nll.mean()),
        "nll": float(found.nll[:some].mean()),
        "largest_difference": float(difference.max()),
        "same_steps": float((found.steps[:some] == expected.steps).float().mean()),
        "mean_steps": float(found.steps.float().mean()),
        "per_edit": {
            "reference_nll": [round(value, 6) for value in expected.nll.tolist()],
            "nll": [round(value, 6) for value in found.nll.tolist()],
            "steps": found.steps.tolist(),
        },
    }


def logits_everywhere(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, rows: Tensor, columns: Tensor, cache: Any
) -> Tensor:
    """``logits_at`` without its point."""
    return logits(model, ids, mask, positions, keep=0, cache=cache)[rows, columns]


def shares(
    model: PreTrainedModel, layer: Any, rows: Sequence[TargetRow], settings: TargetOptimizer
) -> dict[str, float]:
    """Seconds as one part after the other is taken out of ours, and of plain batching and the reference."""
    from lit_moeedit.editing import target_rows

    parts: list[tuple[str, Any]] = [
        ("… without kept keys and values", patch.object(targets, "prefix_for", lambda model, length: None)),
        (
            "… and experts on padding and where nothing is predicted",
            patch.multiple(
                target_rows,
                experts_run_on=lambda layers, tokens: nullcontext(),
                experts_run_at=lambda layers, chosen, count: nullcontext(),
            ),
        ),
        ("… and logits at all positions", patch.object(target_rows, "logits_at", logits_everywhere)),
        ("… and finished edits stay", patch.object(targets._Batch, "_drop", lambda self, active: None)),
        ("… and the layers below run every step", patch.object(target_rows, "skipped", lambda *_: nullcontext())),
    ]
    count = rows[-1].edit + 1
    found = {"all": timed(lambda: settings.optimize(model, layer, rows, 0), 3)[0]}
    with ExitStack() as stack:
        for name, part in parts:
            stack.enter_context(part)
            found[name] = timed(lambda: settings.optimize(model, layer, rows, 0))[0]
    found["plain batching"] = timed(lambda: reference_targets(model, layer, rows, settings, 0, count))[0]
    return found


def line(shape: str, found: dict[str, Any]) -> str:
    scaled = "" if found["reference_edits"] == found["edits"] else f" (from {found['reference_edits']})"
    cells = [shape, found["edits"], f"{found['reference_seconds']:.2f}{scaled}", f"{found['seconds']:.3f}"]
    cells += [f"{found[name]:{form}}" for name, form in (("ratio", ".1f"), ("reference_nll", ".4f"), ("nll", ".4f"))]
    return row([*cells, f"{found['largest_difference']:.1e}", f"{found['mean_steps']:.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that keeps trained weights")
    parser.add_argument("--seed", type=int, default=1, help="of the model and of the facts")
    parser.add_argument("--edits", type=int, nargs="+", default=[1, 10, 50, 200])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet()
    found = trained("atlas", arguments.seed, arguments.models)
    model, tokenizer = found.model, found.tokenizer
    layer = Editor([2]).check(model)[-1]
    results: dict[str, Any] = {"demo": {}, "deep": {}}
    lines: list[str] = []

    def say(*more: str) -> None:
        lines.extend(more)
        sys.stdout.write("\n".join(more) + "\n")
        sys.stdout.flush()

    columns = ["model", "edits", "one at a time, s", "together, s", "ratio", "NLL, one at a time", "NLL, together"]
    say(*header([*columns, "largest difference", "steps"]))
    DEMO.optimize(model, layer, rows_of(model, tokenizer, 5, arguments.seed, 2, "last"), 0)  # warm-up
    for count in arguments.edits:
        rows = rows_of(model, tokenizer, count, arguments.seed, 2, "last")
        results["demo"][count] = compare(model, layer, rows, DEMO)
        say(line("demo, trained", results["demo"][count]))
    rows = rows_of(model, tokenizer, 50, arguments.seed, 2, "last")
    results["shares"] = shares(model, layer, rows, DEMO)
    torch.manual_seed(0)
    deep = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **DEEP))
    upper = Editor([4]).check(deep)[-1]
    for token in ("last", "subject_last"):
        rows = rows_of(deep, tokenizer, 50, arguments.seed, 4, token)  # type: ignore[arg-type]
        results["deep"][token] = compare(deep, upper, rows, PUBLISHED, sample=5)
        say(line(f"12 layers, random, `{token}`", results["deep"][token]))
    reference = results["demo"].get(50, {}).get("reference_seconds")
    say("", *header(["50 edits of the demo", "s", "times one at a time"]))
    shown = results["shares"] if reference is None else {**results["shares"], "one at a time": reference}
    for name, seconds in shown.items():
        factor = "" if reference is None else f"{reference / seconds:.1f}"
        say(row([name, f"{seconds:.3f}", factor]))
    command = f"`python -m benchmarks.targets --seed {arguments.seed}`, {torch.get_num_threads()} thread(s)"
    write("targets", command, "\n".join(lines), results, arguments.output)


if __name__ == "__main__":
    main()
