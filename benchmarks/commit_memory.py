"""Peak memory of a commit under ZeRO stage 3 on two processes, against the size of the rank's shard of the layer.

Run from the root of the repository, with the package and its extra ``deepspeed`` installed:

    python -m benchmarks.commit_memory

Writes ``commit_memory.json`` and ``commit_memory.md`` into ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lit_moeedit.sharding.backends import locate
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

ROOT = Path(__file__).resolve().parents[1]
EXPERTS, PAIRS = 16, 32
WIDTHS = (256, 512, 1024)
"""``d_model`` and ``d_hidden``: layers of 4, 16 and 64 MiB in float32."""


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(EXPERTS, width, width))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return scale * self.experts.sum()


def measure(width: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of this rank's shard (model and master weights), and how much more the commit held at its peak."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = Layer(width)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    weight: Any = engine.module.experts
    expert = torch.arange(EXPERTS).repeat_interleave(PAIRS)
    row = torch.arange(PAIRS).repeat(EXPERTS)
    deltas = ExpertDeltas(expert, row, torch.randn(PAIRS, width), torch.randn(len(expert), width), EXPERTS)
    ranks = Ranks()
    shard = locate(weight, [optimizer])
    size = weight.ds_tensor.nbytes
    if shard.master.read().data_ptr() != weight.ds_tensor.data_ptr():
        size += shard.master.read().nbytes
    with Transaction([optimizer], ranks) as transaction:
        with torch.profiler.profile(profile_memory=True) as profile:
            transaction.commit(weight, deltas)
        extra = peak(profile)
    return {"shard": size, "extra": extra, "ratio": extra / size}


def peak(profile: Any) -> int:
    """Most bytes that tensors held at a time, of those that were made while profiling.

    Counted where they are allocated: the process's resident memory depends on what the allocator kept from before.
    """
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def run(rank: int, port: int, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for width in WIDTHS:
            results[f"{str(dtype)[6:]}, {width}"] = measure(width, dtype)
    if rank == 0:
        queue.put(results)
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=run, args=(rank, port, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = queue.get(timeout=300)
    for process in processes:
        process.join(60)
    lines = ["| dtype, width | shard MiB | extra at the peak MiB | ratio |", "| --- | --- | --- | --- |"]
    for name, found in results.items():
        mib = [found[key] / 2**20 for key in ("shard", "extra")]
        lines.append(f"| {name} | {mib[0]:.1f} | {mib[1]:.1f} | {found['ratio']:.2f} |")
    text = "\n".join(lines) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "commit_memory.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "commit_memory.md").write_text(
        f"`python -m benchmarks.commit_memory`\n\n{text}", encoding="utf-8"
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
