"""An edit on 1 to 512 ranks, for published sizes of models: memory, bytes sent and work per rank, by simulation.

Run from the root of the repository, with the package and its extra ``deepspeed`` installed:

    python -m benchmarks.scaling

Nothing is measured. ``lit-moeedit plan`` simulates a rank, with the code of the run itself and tensors that have no
elements. It does so for models of two depths; every further layer costs what the last one costs. Writes
``scaling.json``, ``scaling.md`` and ``scaling.png`` into ``benchmarks/results``, and goes on with the edits that
``scaling.json`` lacks: all of them take half an hour. ``--ranks`` alone leaves the edits out.
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
from torch import nn

from benchmarks.solver_report import table
from lit_moeedit.editing import PHASES, Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.planning import Cost, ExpertParallelCost, Workload, empty_model, simulate
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.zero_costs import ModelSize, held_in_training
from lit_moeedit.pretrained import build_config

ROOT = Path(__file__).resolve().parents[1]
RANKS = (1, 2, 4, 8, 64, 512)
BACKENDS = ("ZeRO-3", "FSDP2")
"""Backends whose edits are simulated."""
EXPERTS, DISPATCHED = "EP", "dispatched for a text"
OWNERS = 8
"""Maximum number of ranks that share the experts of a layer under expert parallelism, those of a node."""
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
what the last one does. Bytes sent and operations are sums over the phases of the edit, `peak` is the highest of them.
"""


def simulated(keys: dict[str, Any], backend: str, ranks: int, depth: int) -> tuple[int, list[Cost]]:
    """The number of parameters and the phases of a model of ``depth`` layers on one of several ranks."""
    keys = {**keys, "num_hidden_layers": depth}
    editor = Editor(
        (EDITED,), token="subject_last", targets=TargetOptimizer(steps=25), contexts=("",), token_budget=4096
    )
    module = LitMoE(config=keys)
    with empty_model(build_config(keys), torch.bfloat16) as module.model:
        return module.model.num_parameters(), simulate(module, editor, sharding_of(backend, ranks), WORK)[0]


def sharding_of(backend: str, ranks: int) -> Sharding:
    """The sharding of a model in bfloat16."""
    zero = backend == "ZeRO-3"
    return Sharding(ranks, 3 if zero else None, 2, sub_group=10**8, fsdp2=not zero)


def of_shapes(keys: dict[str, Any], all_ranks: Sequence[int]) -> dict[str, dict[str, dict[str, int]]]:
    """What a rank holds and sends, by the plan's formulas, from the shapes of all weights of a whole model."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    with empty_model(build_config(keys), torch.bfloat16) as model:
        for backend in BACKENDS:
            for ranks in all_ranks:
                sharding = sharding_of(backend, ranks)
                size = ModelSize.of(model, sharding)
                gathered = ranks * size.shard if sharding.fsdp2 else size.parameters
                found.setdefault(backend, {})[str(ranks)] = {
                    "parameters": size.parameters,
                    "held": held_in_training(size, sharding),
                    "largest gathering": size.block * sharding.itemsize,
                    "sent for a forward": sharding.part(gathered * sharding.itemsize),
                }
        # on one rank there is nothing to share
        found[EXPERTS] = {
            str(ranks): found["FSDP2"]["1"] if ranks == 1 else of_owners(model, ranks) for ranks in all_ranks
        }
    return found


def of_owners(model: nn.Module, ranks: int) -> dict[str, int]:
    """What a rank holds and sends under expert parallelism, where FSDP2 shards all other weights over all ranks."""
    cost = ExpertParallelCost.of(model, ranks, min(OWNERS, ranks), WORK.text_tokens, QWEN3["num_experts_per_tok"])
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held": cost.held,
        "largest gathering": cost.gathered,
        "sent for a forward": cost.sent,
        DISPATCHED: cost.dispatched,
    }


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


def report(results: dict[str, Any]) -> str:
    """Tables, and what grows with the ranks."""
    parts = ["# An edit on 1 to 512 ranks\n", "`python -m benchmarks.scaling`\n", SHAPES_NOTE]
    columns = ("held", "largest gathering", "sent for a forward")
    kinds = (*BACKENDS, EXPERTS)
    header = ["ranks", *(f"{kind}: {what}, GB" for kind in kinds for what in columns)]
    for name, found in results["shapes"].items():
        rows = [
            [ranks, *(f"{found[kind][ranks][what] / 1e9:,.3g}" for kind in kinds for what in columns)]
            for ranks in found["FSDP2"]
        ]
        parameters = next(iter(found["FSDP2"].values()))["parameters"]
        texts = [cell[DISPATCHED] / 1e9 for cell in found[EXPERTS].values() if DISPATCHED in cell]
        parts += [f"\n## {name}: {parameters / 1e9:,.1f} billion parameters\n", table(header, rows)]
        parts += [
            f"Under EP a forward of {WORK.text_tokens} tokens on a rank sends {min(texts):.2g} to {max(texts):.2g} GB "
            "of hidden states to the owners of their experts and back.\n"
        ]
    parts += [SENTENCE]
    rows = [
        [
            name,
            backend,
            ranks,
            *(f"{cell[what] / 1e9:,.4g}" for what in ("peak", "sent")),
            f"{cell['flops'] / 1e12:,.4g}",
        ]
        for name, found in results["edits"].items()
        for backend, cells in found.items()
        for ranks, cell in sorted(cells.items(), key=lambda item: int(item[0]))
    ]
    if rows:
        commits = {cell["sent: commit"] for found in results["edits"].values() for cells in found.values()
                   for cell in cells.values()}  # fmt: skip
        parts += [
            "\n## Whole edits\n",
            NOTE,
            table(["model", "backend", "ranks", "peak, GB", "sent, GB", "TFLOP"], rows),
        ]
        parts += [f"Of this a commit sends {min(commits)} to {max(commits)} bytes: two norms.\n"]
    return "\n".join(parts)


SHAPES_NOTE = """\
Nothing here is measured. The figures are those that `lit-moeedit plan` computes from the shapes of all weights, per
rank, for training in bfloat16, where FSDP2 has no float32 master weights, and ZeRO-3 has some.

- `held`: weights, gradients, master weights (ZeRO-3), moments and buffers between steps.
- `largest gathering`: the weights that are gathered at once, an expert block of ZeRO-3, a whole layer of FSDP2.
- `EP`: expert parallelism of transformers with FSDP2, in which the ranks of a node, at most 8, share the experts of
  each layer, by `lit_moeedit.planning.expert_parallel`. Embedding and head are gathered one after the other there.
- `sent for a forward`: bytes that a rank sends so that a forward of the whole model has its weights. Each step for the
  targets of an edit sends them about twice, for the layers above the edited ones. Divided by the bandwidth of a rank
  that is a lower bound of the seconds.

The shape of 1T has the experts of Kimi K2 (384 of width 2048) with the attention of Qwen3, and experts in every layer.
"""
SENTENCE = """
## What grows with the ranks, and why

Under ZeRO-3 nothing grows without bound: partitions have hardly any padding, and a forward sends the size of the
model times (ranks - 1) / ranks. FSDP2 shards along the first dimension, whose entries are whole experts. **With more
ranks than experts each shard is padded to one expert, so that what a rank holds stays the same, and what is gathered
and sent grows in proportion to the ranks**; where the number of ranks does not divide that of the experts, the
padding is in between. Replicas of shards (HSDP), with at most as many ranks in a group as there are experts, keep it
flat, or shards along rows or columns (`shard_placement_fn`) in a module that shards
itself. Under expert parallelism a rank gathers its own experts alone, and with at most 8 ranks sends no expert at all;
the hidden states of tokens go to the owners and back instead, which does not depend on the number of ranks. With more
ranks than experts its shards are padded like those of FSDP2. A commit sends two norms under all three.
"""


def picture(results: dict[str, Any], path: Path) -> None:
    """Memory and bytes sent per rank against the number of ranks."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    names = ("held between steps", "largest gathering", "sent for a forward")
    kinds = {name.removesuffix(" between steps"): (f"{name}, GB", 1e9) for name in names}
    for axis, (what, (label, unit)) in zip(axes, kinds.items(), strict=True):
        for color, (name, found) in zip(("C0", "C1", "C2"), results.items(), strict=False):
            for backend, style in zip(found, ("o--", "s-", "^:"), strict=True):
                ranks = [int(count) for count in found[backend]]
                # nothing is sent on one rank, which a logarithmic axis cannot show
                values = [cell[what] / unit or float("nan") for cell in found[backend].values()]
                axis.plot(ranks, values, style, color=color, markersize=4, label=f"{name}, {backend}")
        axis.set(xscale="log", yscale="log", xlabel="ranks", title=f"{label}, per rank")
        axis.set_xticks(list(RANKS), [str(count) for count in RANKS])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    figure.suptitle("Computed from the shapes of the weights (nothing measured)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, help="of the simulated edits")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shrink", type=int, default=1, help="divide widths and experts by this, for a test")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    file = given.output / "scaling.json"
    # goes on with what is there
    results: dict[str, Any] = {"shapes": {}, "edits": {}}
    results |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def write() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (given.output / "scaling.md").write_text(report(results), encoding="utf-8")
        picture(results["shapes"], given.output / "scaling.png")

    models = {name: dict(MODELS[name]) for name in given.models}
    for name, keys in models.items():
        for key in ("hidden_size", "moe_intermediate_size", "num_experts", "vocab_size"):
            keys[key] //= given.shrink
        results["shapes"][name] = of_shapes(keys, RANKS)
    write()
    for name, keys in models.items():
        for ranks in given.ranks:
            for backend in BACKENDS:
                own = results["edits"].setdefault(name, {}).setdefault(backend, {})
                if str(ranks) not in own:
                    own[str(ranks)] = scaled(keys, backend, ranks)
                    write()


if __name__ == "__main__":
    logging.getLogger("lit_moeedit.editing").setLevel(logging.WARNING)
    main()
