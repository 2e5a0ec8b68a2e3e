"""A folder and five facts, as a new user has them: models of several families, each edited by one command.

For each family a small model is trained on the demo's text, without edits, and exported. ``lit-moeedit edit`` then gets
the folder, a facts file and no option. The table has the facts that are generated afterwards, and the seconds of the
command::

    python -m tests.acceptance.new_user --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_moeedit.data import Atlas
from lit_moeedit.reports import read_rows
from tests.acceptance.lora_run import train_base

FACTS = 5
BOUND = 60.0
"""Seconds that the command may take."""
FAMILIES: dict[str, dict[str, int]] = {
    "qwen3_moe": {},
    "mixtral": {"num_local_experts": 16, "intermediate_size": 192},
    "olmoe": {"intermediate_size": 192},
    "qwen2_moe": {"shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 16, "intermediate_size": 192},
    "deepseek_v3": {
        "n_routed_experts": 16,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "intermediate_size": 256,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "head_dim": 16,  # which the rotary embedding goes by
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
    },
}
"""Differences of each family's config from that of the demo's model."""


def edited(family: str, folder: Path, epochs: int, processes: int = 1) -> tuple[int, float]:
    """Train, export and edit a model; returns the number of facts that are generated, and the command's seconds."""
    changes = {"model_type": family, **FAMILIES[family]}
    options = [f"model.init_args.config.{name}={value}" for name, value in changes.items()]
    if not (folder / "base").exists():
        train_base(folder, *options, f"trainer.max_epochs={epochs}")
    facts, output = folder / "facts.jsonl", folder / f"output-{processes}"
    rows = (json.dumps(fact.to_dict()) for fact in Atlas(edits=FACTS, seed=1).edits)
    facts.write_text("\n".join(rows), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "lit_moeedit", "edit", str(folder / "base"), str(facts), str(output)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.stdout.write(done.stdout + done.stderr)
        return 0, seconds
    return sum(row.measured["after"].holds for row in read_rows(output / "edits.jsonl")), seconds


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for new_user.md")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the training")
    arguments = parser.parse_args()
    table = ["| family | processes | facts generated | seconds |", "| --- | --- | --- | --- |"]
    failed = False
    with tempfile.TemporaryDirectory() as place:
        for family in arguments.families:
            folder = Path(place, family)
            folder.mkdir()
            for processes in (1, 2) if family == "qwen3_moe" else (1,):
                generated, seconds = edited(family, folder, arguments.epochs, processes)
                table.append(f"| {family} | {processes} | {generated} of {FACTS} | {seconds:.1f} |")
                sys.stdout.write(table[-1] + "\n")
                sys.stdout.flush()
                failed |= generated < FACTS or seconds > BOUND
    if arguments.output:
        title = "`lit-moeedit edit MODEL FACTS OUTPUT`, no option: `python -m tests.acceptance.new_user`\n\n"
        (arguments.output / "new_user.md").write_text(title + "\n".join(table) + "\n", encoding="utf-8")
    if failed:
        raise SystemExit("a family has too few facts, or took too long")


if __name__ == "__main__":
    main()
