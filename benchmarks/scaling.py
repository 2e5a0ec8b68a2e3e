"""An edit on 1 to 512 ranks, for published sizes of models: memory, bytes sent and work per rank, by simulation.

Run from the root of the repository, with the package and its extra ``deepspeed`` installed:

    python -m benchmarks.scaling

Nothing is measured. ``lit-moeedit plan`` simulates a rank, with the code of the run itself and tensors that have no
elements. It does so for models of two depths; every further layer costs what the last one costs. Writes
``scaling.json``, ``scaling.md`` and ``scaling.png`` into ``benchmarks/results``, and goes on with the figures that
``scaling.json`` lacks: all of them take half an hour.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.solver_report import table
from lit_moeedit.editing import PHASES, Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.planning import Cost, Workload, empty_model, simulate
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.pretrained import build_config

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 4, 8, 64, 512)
BACKENDS = ("ZeRO-3", "FSDP2")
EDITED, DEPTHS = 1, (3, 4)
WORK = Workload(edits=512, prompt_tokens=10, target_tokens=2, questions=1, texts=4096, rows=1)
QWEN3 = {"model_type": "qwen3_moe", "vocab_size": 151936, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    # config.json of Qwen/Qwen3-30B-A3B
    "30B": {
        **QWEN3,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
    },
    # config.json of Qwen/Qwen3-235B-A22B
    "235B": {
        **QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 1536,
    },
    # a shape of 1 T parameters: the experts of Kimi K2; attention as in Qwen3, and experts in every layer
    "1T": {
        **QWEN3,
        "vocab_size": 163840,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 2048,
        "num_experts": 384,
    },
}
NOTE = f"""\
Nothing here is measured: every figure is that of the simulation of a rank by `lit-moeedit plan`, in bfloat16 on GPUs.
Layer {EDITED} gets {WORK.edits} facts, with second moments of {WORK.texts} texts of {WORK.text_tokens} tokens and 25
steps for the targets. Models of {DEPTHS[0]} and {DEPTHS[1]} layers are simulated; each further layer is taken to add
what the last one does. Bytes sent and operations are sums over the phases of the edit. `held` is what a rank holds of
weights, gradients, master weights (ZeRO-3), moments and buffers between steps; `peak` is the highest of the edit.
A plan knows no seconds: bytes sent, divided by the bandwidth of a rank, and operations, divided by its speed, are lower
bounds of them. The shape of 1T has the experts of Kimi K2 (384 of width 2048) with the attention of Qwen3.
"""


def simulated(keys: dict[str, Any], backend: str, ranks: int, depth: int) -> tuple[int, list[Cost]]:
    """The number of parameters and the phases of a model of ``depth`` layers on one of several ranks."""
    keys = {**keys, "num_hidden_layers": depth}
    zero = backend == "ZeRO-3"
    sharding = Sharding(ranks, 3 if zero else None, 2, sub_group=10**8, fsdp2=not zero)
    editor = Editor(
        (EDITED,), token="subject_last", targets=TargetOptimizer(steps=25), contexts=("",), token_budget=4096
    )
    module = LitMoE(config=keys)
    with empty_model(build_config(keys), torch.bfloat16) as module.model:
        return module.model.num_parameters(), simulate(module, editor, sharding, WORK)[0]


def figures(parameters: int, costs: Sequence[Cost]) -> dict[str, int]:
    """What one rank holds, needs, sends and computes for an edit."""
    edit = [cost for cost in costs if cost.phase in PHASES]
    phases = {f"sent: {cost.phase}": cost.sent for cost in edit}
    training = next(cost for cost in costs if cost.phase == "training step")
    return {
        "parameters": parameters,
        "held": training.held,
        "peak": max(cost.peak for cost in edit),
        "sent": sum(cost.sent for cost in edit),
        "flops": sum(cost.flops for cost in edit),
        **phases,
    }


def scaled(keys: dict[str, Any], backend: str, ranks: int) -> dict[str, int]:
    """The figures of a whole model, from those of its first layers."""
    few, more = (figures(*simulated(keys, backend, ranks, depth)) for depth in DEPTHS)
    further = keys["num_hidden_layers"] - DEPTHS[0]
    return {name: few[name] + further * (more[name] - few[name]) // (DEPTHS[1] - DEPTHS[0]) for name in few}


def report(results: dict[str, dict[str, dict[str, dict[str, int]]]]) -> str:
    """Tables, and what grows with the ranks."""
    parts = ["# An edit on 1 to 512 ranks\n", "`python -m benchmarks.scaling`\n", NOTE]
    header = ["ranks", *(f"{b}: {what}" for b in BACKENDS for what in ("held, GB", "peak, GB", "sent, GB", "TFLOP"))]
    header += ["commit sends, B"]
    for name, found in results.items():
        ranks = list(next(iter(found.values())))
        rows: list[list[Any]] = []
        for count in ranks:
            cells = [
                f"{found[backend][count][what] / unit:,.3g}"
                for backend in found
                for what, unit in (("held", 1e9), ("peak", 1e9), ("sent", 1e9), ("flops", 1e12))
            ]
            sent = max(found[backend][count]["sent: commit"] for backend in found)
            rows.append([count, *cells, sent])
        parameters = next(iter(found["FSDP2"].values()))["parameters"]
        parts += [f"\n## {name}: {parameters / 1e9:,.1f} billion parameters\n", table(header, rows), findings(found)]
    return "\n".join(parts)


def findings(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """Sentences about what grows from eight ranks to the largest number, with the numbers of the simulation."""
    ranks = list(found["FSDP2"])
    first, last = ranks[-2], ranks[-1]
    growth = {backend: found[backend][last]["sent"] / max(1, found[backend][first]["sent"]) for backend in found}
    held = {backend: found[backend][last]["held"] * int(last) / found[backend][ranks[0]]["held"] for backend in found}
    return (
        f"From {first} to {last} ranks a rank sends {growth['ZeRO-3']:.2f} times as much under ZeRO-3 and "
        f"{growth['FSDP2']:.2f} times under FSDP2. All ranks together hold {held['ZeRO-3']:.2f} and "
        f"{held['FSDP2']:.2f} times what {ranks[0]} holds.\n"
    )


SENTENCE = """
## What grows with the ranks, and why

Under ZeRO-3 nothing grows without bound: what a rank sends to gather a layer is the layer's size times (ranks - 1) /
ranks, and it gathers fewer times as its share of texts and facts shrinks, until it has one batch. What stays is one
gathering of the layers for each step of the targets, and the all_reduce of the second moments. A commit sends some
bytes, however many ranks there are. **Under FSDP2 gathering grows when there are more ranks than experts**: `LitMoE`
shards along the first dimension, whose entries are whole experts, so each rank's shard is padded to one expert, and
an all_gather carries ranks x one expert. More ranks than experts should be replicas of shards (HSDP), or shard along
rows or columns of the experts (`shard_placement_fn`).
"""


def picture(results: dict[str, Any], path: Path) -> None:
    """Memory, bytes sent and work per rank against the number of ranks."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    kinds = {"peak": ("peak memory of the edit, GB", 1e9), "sent": ("sent, GB", 1e9), "flops": ("TFLOP", 1e12)}
    for axis, (what, (label, unit)) in zip(axes, kinds.items(), strict=True):
        for color, (name, found) in zip(("C0", "C1", "C2"), results.items(), strict=False):
            for backend, style in zip(found, ("o--", "s-"), strict=True):
                ranks = [int(count) for count in found[backend]]
                values = [cell[what] / unit for cell in found[backend].values()]
                axis.plot(ranks, values, style, color=color, markersize=4, label=f"{name}, {backend}")
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=f"{label}, per rank")
        axis.set_xticks(list(RANKS), [str(count) for count in RANKS])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.suptitle("An edit of 512 facts, simulated (nothing measured)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shrink", type=int, default=1, help="divide widths and experts by this, for a test")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("lit_moeedit.editing").setLevel(logging.WARNING)
    file = given.output / "scaling.json"
    # continues what is there
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in given.models:
        keys = dict(MODELS[name])
        for key in ("hidden_size", "moe_intermediate_size", "num_experts", "vocab_size"):
            keys[key] //= given.shrink
        for backend in BACKENDS:
            for ranks in given.ranks:
                own = results.setdefault(name, {}).setdefault(backend, {})
                if str(ranks) not in own:
                    own[str(ranks)] = scaled(keys, backend, ranks)
                file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (given.output / "scaling.md").write_text(report(results) + SENTENCE, encoding="utf-8")
    picture(results, given.output / "scaling.png")


if __name__ == "__main__":
    main()
