"""An edit and training steps in 1, 2 and 4 processes under ZeRO-3, FSDP2 and expert parallelism, measured.

Run from the root of the repository, with the package and its extra ``deepspeed`` installed:

    python -m benchmarks.ranks

Every run has one small model with random weights, the same facts, texts and rows, which its processes share, and one
thread for each process. The learning rate is 0, so that all runs make the same edit; if they do not, the command fails.
Writes ``ranks.json``, ``ranks.md`` and ``ranks.png`` into ``benchmarks/results``. ``--cases`` measures some of the runs
again, and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import ModelParallelStrategy

from benchmarks.training import RESULTS, header, quiet, row, write
from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.data import Atlas, FactsDataModule
from lit_moeedit.editing import PHASES, Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.preservation import OutputPenalty
from lit_moeedit.pretrained import build_config
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
from lit_moeedit.sharding.loading import fresh_model

BASE, ZERO, FSDP2, EXPERTS = "no sharding", "ZeRO-3", "FSDP2", "EP with FSDP2"
CASES = [(BASE, 1), *((kind, ranks) for kind in (ZERO, FSDP2) for ranks in (1, 2, 4)), (EXPERTS, 2), (EXPERTS, 4)]
Phases = dict[str, dict[str, float]]
"""By phase, what it took."""
STEP = "training step"
"""A phase beside those of an edit: forward, backward and optimizer, on average after the first step of a run."""
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 2624,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PRELOADED = ["benchmarks.training", "deepspeed", "transformers.models.qwen3_moe.modeling_qwen3_moe"]
"""What all processes import, once."""
LAYERS, CONTEXTS, TARGET_STEPS, BEFORE, STEPS = (2, 3), ("",), 4, 1, 4
WORK = {"edits": 160, "texts": 1024, "rows": 64}
BUDGET = 512
"""Tokens of a forward: few enough that four ranks have a batch each."""
SMALL: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 8}
"""Keys of the model in a test."""
OVERHEAD = ("above one rank, s", "sent by all, GB", "s / GB")
SAME = 1e-3
"""Largest relative difference of losses between runs: float32, summed in other orders."""
NOTE = f"""\
Qwen3-MoE of 8 layers, 32 experts of which 4 are active, and width 256, in float32; layers {LAYERS[0]} and {LAYERS[1]}
get {WORK["edits"]} facts, with second moments of {WORK["texts"]} texts and {TARGET_STEPS}
steps for the targets. A training step has {WORK["rows"]} rows. All of this is shared by the processes. Each process has
one thread, and **all share the two cores of one machine**, so that wall time cannot fall below that of two processes,
and here was taken beside other work. What can be compared is processor time summed over the ranks: flat is perfect
scaling, and growth is what sharding costs. gloo's copies between processes are a part of it, which on GPUs is the
network's work. `sent` is what the kernel has sent from the sockets of a rank, the largest of the ranks; memory is
resident memory above that at the start, likewise, with what the allocator keeps.
"""
GROWTH = """\
Above one rank: processor time of all ranks beyond that of one rank with the same sharding (FSDP2 for EP), and the bytes
that all ranks send together. Passes gather the weights: in each round of a batch on every rank the ranks together send
(ranks - 1) times the weights that are gathered. The batches of an edit are dealt to the ranks, so that its bytes grow
as (ranks - 1) / ranks, and stop growing, if the batches can be dealt evenly; the few of `features` cannot. In a
training step every rank has a batch, however small, and the bytes grow as ranks - 1. gloo reduces gradients by an
all_reduce, which sends them twice. Where experts stay with their owners, only the other weights are gathered, and
hidden states of tokens are sent instead. `solve` grows in proportion to the ranks under ZeRO-3 and FSDP2, because each
of them solves the whole system. A commit sends two norms. Resident memory falls with the ranks under ZeRO-3 and EP, and
hardly under FSDP2; why was not examined.
"""


# -- one rank ---------------------------------------------------------------------------------------------------------


def bytes_sent() -> int:
    """The bytes that TCP has sent from the open sockets of this process."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            is_socket = str(path.readlink()).startswith("socket:")
            handle = os.dup(int(path.name)) if is_socket else None
        except OSError:  # closed since the folder was read
            continue
        if handle is None:
            continue
        with socket.socket(fileno=handle) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                # tcpi_bytes_sent of struct tcp_info, in linux/tcp.h
                total += struct.unpack_from("Q", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0]
    return total


def resident(what: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, or ``VmHWM``, the most since :func:`forget_peak`."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Measured:
    """Processor time, wall time, bytes sent and peak memory of phases."""

    def __init__(self) -> None:
        self.start, self.phases = resident("VmRSS"), dict[str, list[dict[str, float]]]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        forget_peak()
        before = self.now()
        yield
        found = {what: value - before[what] for what, value in self.now().items()}
        self.phases.setdefault(name, []).append({**found, "memory": resident("VmHWM") - self.start})

    def now(self) -> dict[str, float]:
        return {"processor": time.process_time(), "wall": time.perf_counter(), "sent": bytes_sent()}


class MeasuredEditor(Editor):
    """An editor whose phases are measured."""

    measured: Measured
    result: Any = None

    def edit(self, *args: Any, **options: Any) -> Any:
        self.result = super().edit(*args, **{**options, "phase": self.measured})
        return self.result


class Steps(L.Callback):
    """Measures training steps. Callbacks that come after it run outside of them."""

    def __init__(self, measured: Measured) -> None:
        self.measured, self.losses = measured, list[float]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.step = self.measured(STEP)
        self.step.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.step.__exit__(None, None, None)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def strategy_of(kind: str, ranks: int) -> Any:
    if kind == BASE:
        return "auto"
    if kind == ZERO:
        return DeepSpeedCPUStrategy(stage=3, param_persistence_threshold=0)
    return ModelParallelStrategy(ranks, 1)


def run(rank: int, kind: str, ranks: int, port: int, weights: str, work: dict[str, int], folder: str) -> None:
    """Train and edit as one of several ranks; writes what this rank took into a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    quiet()
    measured = Measured()
    targets = TargetOptimizer(steps=TARGET_STEPS, stop=0.0, token_budget=BUDGET)
    editor = MeasuredEditor(
        LAYERS, targets=targets, contexts=CONTEXTS, token_budget=BUDGET, preserve=OutputPenalty(0.3)
    )
    editor.measured = measured
    steps = Steps(measured)
    editing = KnowledgeEditing(editor, at={"step": BEFORE}, on_failure="keep", survival_every_n_steps=None)
    data = FactsDataModule(
        Atlas(edits=work["edits"], neighbours=1, seed=0), weights, batch_size=work["rows"] // ranks,
        samples_per_epoch=work["rows"] * STEPS, preservation_samples=work["texts"],
    )  # fmt: skip
    module = LitMoE(weights, learning_rate=0.0, expert_parallel_size=ranks if kind == EXPERTS else 1)
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=strategy_of(kind, ranks), max_steps=STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0, callbacks=[steps, editing], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    if editor.result is None or not editor.result.kept or set(PHASES) - set(measured.phases):
        raise RuntimeError(f"{kind} on {ranks} ranks made no edit, or one without the phases {PHASES}")
    parts = measured.phases.pop(STEP)[1:]  # the first step makes Adam's moments
    phases = {STEP: {what: statistics.mean(part[what] for part in parts) for what in parts[0]}}
    for name in PHASES:
        of_phase = measured.phases[name]
        phases[name] = {what: sum(part[what] for part in of_phase) for what in of_phase[0]}
    for name, found in (*measured.phases.items(), (STEP, parts)):
        phases[name]["memory"] = max(part["memory"] for part in found)
    done = {
        "phases": phases,
        "losses": steps.losses,
        "nll": editor.result.targets.nll.tolist(),
        "changes": list(editor.result.relative_change.values()),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(done), encoding="utf-8")
    os._exit(0)  # what DeepSpeed and gloo tear down is not measured, and can wait for ranks that have ended


def measure(kind: str, ranks: int, weights: str, work: dict[str, int]) -> list[dict[str, Any]]:
    """What each rank took in a run of several processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # ends all ranks as soon as one has failed, with its traceback
        arguments = (kind, ranks, port, weights, work, folder)
        mp.start_processes(run, arguments, nprocs=ranks, start_method="forkserver")
        return [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


# -- all runs ---------------------------------------------------------------------------------------------------------


def save_model(keys: dict[str, Any], folder: Path) -> None:
    """Write random weights and the tokenizer of the data, which every run reads."""
    torch.manual_seed(0)
    fresh_model(build_config(keys), torch.float32).save_pretrained(folder)
    data = FactsDataModule(Atlas(edits=WORK["edits"], seed=0), vocab_size=keys["vocab_size"])
    data.setup("fit")
    assert data.tokenizer is not None
    data.tokenizer.save_pretrained(folder)


def summed(ranks: Sequence[Phases]) -> Phases:
    """By phase: processor time summed over the ranks, the longest wall time, the most bytes sent and memory."""
    return {
        name: {what: (sum if what == "processor" else max)(rank[name][what] for rank in ranks) for what in found}
        for name, found in ranks[0].items()
    }


def best(repeated: Sequence[Sequence[Phases]]) -> Phases:
    """The least of repeated runs: other work on the machine only adds."""
    every = [summed(ranks) for ranks in repeated]
    return {name: {what: min(one[name][what] for one in every) for what in found} for name, found in every[0].items()}


def difference(found: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """Largest relative difference between the losses, targets and edits of two runs, on any of their ranks."""
    first = other[0]
    return max(
        abs(mine - its) / abs(its)
        for rank in found
        for name in ("losses", "nll", "changes")
        for mine, its in zip(rank[name], first[name], strict=True)
    )


def of_edit(phases: Phases, what: str) -> float:
    """A figure of all phases of the edit together."""
    return (max if what == "memory" else sum)(phases[name][what] for name in PHASES)


def overhead(phases: Phases, alone: Phases, runs: Sequence[Sequence[Phases]], names: Sequence[str]) -> list[str]:
    """Processor time above one rank in seconds, what all ranks send in GB, and the first for each of the second."""
    above = sum(phases[name]["processor"] - alone[name]["processor"] for name in names)
    sent = min(sum(rank[name]["sent"] for rank in ranks for name in names) for ranks in runs) / 1e9
    return [f"{above:.2f}", f"{sent:.3g}", f"{above / sent:.1f}"]


def report(results: dict[str, Any]) -> str:
    cases = {name: best(found["runs"]) for name, found in results["cases"].items()}
    base = cases[f"{BASE}, 1"]
    lines = [NOTE, "## Processor time, seconds, summed over the ranks", ""]
    lines += header(["", "ranks", *PHASES, "edit", "edit / no sharding", STEP, "step / no sharding"])
    for name, phases in cases.items():
        kind, ranks = name.rsplit(", ", 1)
        edit, step = of_edit(phases, "processor"), phases[STEP]["processor"]
        ratios = [f"{edit / of_edit(base, 'processor'):.2f}", f"{step / base[STEP]['processor']:.2f}"]
        seconds = [*(f"{phases[phase]['processor']:.2f}" for phase in PHASES), f"{edit:.1f}"]
        lines.append(row([kind, ranks, *seconds, ratios[0], f"{step:.2f}", ratios[1]]))
    lines += ["", "## Wall time, bytes sent and memory of a rank", ""]
    lines += header(["", "ranks", "edit, s", f"{STEP}, s", *(f"{phase}: sent, MB" for phase in (*PHASES, STEP)),
                     "edit: peak, MB", f"{STEP}: peak, MB"])  # fmt: skip
    for name, phases in cases.items():
        wall = [f"{of_edit(phases, 'wall'):.1f}", f"{phases[STEP]['wall']:.2f}"]
        sent = [f"{phases[phase]['sent'] / 1e6:,.3g}" for phase in (*PHASES, STEP)]
        memory = [f"{value / 1e6:,.0f}" for value in (of_edit(phases, "memory"), phases[STEP]["memory"])]
        lines.append(row([*name.rsplit(", ", 1), *wall, *sent, *memory]))
    lines += ["", "## What grows with the ranks", "", GROWTH]
    lines += header(["", "ranks", *(f"{name}: {what}" for name in ("edit", STEP) for what in OVERHEAD)])
    for name, runs in ((name, found["runs"]) for name, found in results["cases"].items()):
        kind, ranks = name.rsplit(", ", 1)
        alone = cases.get(f"{FSDP2 if kind == EXPERTS else kind}, 1")
        if ranks != "1" and alone is not None:
            cells = [overhead(cases[name], alone, runs, names) for names in (PHASES, (STEP,))]
            lines.append(row([kind, ranks, *cells[0], *cells[1]]))
    largest = max(found["difference"] for found in results["cases"].values())
    lines += [
        "",
        "Losses of all steps, those of all targets and the relative changes of the weights differ by at most "
        f"{largest:.1e} (relative) from those without sharding.",
    ]
    loads = [found["load"] for found in results["cases"].values()]
    lines += [f"Least of {results['repeats']} runs each; the machine's load was {min(loads):.1f} to {max(loads):.1f} "
              "before them."]  # fmt: skip
    return "\n".join(lines)


def picture(results: dict[str, Any], path: Path) -> None:
    """Processor time against the number of ranks."""
    cases = {name: best(found["runs"]) for name, found in results["cases"].items()}
    figure, grid = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, title in zip(grid, ("edit", STEP), strict=True):
        for kind in dict.fromkeys(kind for kind, _ in CASES):
            points = [
                (ranks, of_edit(found, "processor") if title == "edit" else found[STEP]["processor"])
                for other, ranks in CASES
                if other == kind and (found := cases.get(f"{kind}, {ranks}")) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=kind)
        axes.set(title=title, xlabel="ranks", xticks=[1, 2, 4], ylabel="processor time of all ranks, seconds")
        axes.set_ylim(bottom=0)
    grid[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    names = [f"{kind}, {ranks}" for kind, ranks in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="the others are kept")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a model and work for a test")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    file = given.output / "ranks.json"
    known = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}
    keys, work = (CONFIG | SMALL, {"edits": 4, "texts": 8, "rows": 4}) if given.small else (CONFIG, WORK)
    with tempfile.TemporaryDirectory() as weights:
        save_model(keys, Path(weights))
        first: list[dict[str, Any]] | None = None
        for name in dict.fromkeys([names[0], *given.cases]):
            kind, ranks = name.rsplit(", ", 1)
            load = os.getloadavg()[0]
            repeated = [measure(kind, int(ranks), weights, work) for _ in range(given.repeats)]
            first = first or repeated[0]
            found = max(difference(one, first) for one in repeated)
            if not found <= SAME:  # neither NaN
                raise SystemExit(f"{name} made another edit than {names[0]}: they differ by {found:.1e} (relative)")
            known[name] = {
                "runs": [[rank["phases"] for rank in one] for one in repeated], "difference": found, "load": load
            }  # fmt: skip
            results = {"repeats": given.repeats, "cases": {name: known[name] for name in names if name in known}}
            text = report(results)
            title = "# Edits and training steps in 1, 2 and 4 processes\n\n`python -m benchmarks.ranks`"
            write("ranks", f"{title}, each run {given.repeats} time(s)", text, results, given.output)
            picture(results, given.output / "ranks.png")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
