"""Run the command on input that is broken or was made to do harm, once for each.

Makes each input in a temporary folder, runs the command on it in a process of its own, and writes a table of what it
said. The command fails if a run shows a traceback, runs code of its input, hangs or leaves a half-written file::

    python -m tests.acceptance.hostile_runs --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from lit_moeedit.data.corpus import train_tokenizer
from tests.acceptance.forked import run_and_exit
from tests.acceptance.hostile_inputs import INPUTS, Work

CAPITALS = {"Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Peru": "Lima", "Japan": "Tokyo"}
MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 420, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHOWN = 300
"""Characters of a message in the table."""
PATIENCE = 60
"""Seconds after which a run is taken to hang."""
OTHER = "- Not a valid subclass of Callback"


def made(class_path: str, **settings: Any) -> dict[str, Any]:
    """A class in a config."""
    return {"class_path": class_path, "init_args": settings}


def sound_files(folder: Path) -> dict[str, Any]:
    """Make facts, a model and a tokenizer; returns the config of a run that is done in a second."""
    facts, names = folder / "facts.jsonl", list(CAPITALS)
    rows = [
        {"subject": name, "prompt": f"The capital of {name} is", "target_new": CAPITALS[names[i - 1]],
         "target_true": CAPITALS[name], "paraphrases": [f"In {name}, the capital is"]}
        for i, name in enumerate(names)
    ]  # fmt: skip
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    texts = [f"{row['prompt']} {row['target_true']} {row['paraphrases'][0]}" for row in rows]
    train_tokenizer(texts, 400).save_pretrained(folder / "model")
    editor = made(
        "lit_moeedit.editing.Editor", layers=[0, 1], token="last", memory=made("lit_moeedit.editing.EditMemory"),
        targets=made("lit_moeedit.editing.TargetOptimizer", steps=2),
    )  # fmt: skip
    callbacks = [
        made("lit_moeedit.callbacks.KnowledgeEditing", editor=editor, on_failure="keep"),
        made("lit_moeedit.callbacks.RoutingMonitor"),
        made("lit_moeedit.callbacks.EditReport"),
    ]
    corpus = made("lit_moeedit.data.FactsCorpus", path=str(facts), edits=2)
    config: dict[str, Any] = {
        "trainer": {
            "default_root_dir": str(folder / "run"), "accelerator": "cpu", "devices": 1, "max_epochs": 2,
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False, "callbacks": callbacks,
        },
        "model": made("lit_moeedit.module.LitMoE", config=MODEL),
        "data": made("lit_moeedit.data.FactsDataModule", corpus=corpus, tokenizer=str(folder / "model"),
                     batch_size=8, samples_per_epoch=8),
    }  # fmt: skip
    return config


def good(folder: Path) -> dict[str, Any]:
    """Make the sound files and a checkpoint; returns the config of a run."""
    config = sound_files(folder)
    saving = made("lightning.pytorch.callbacks.ModelCheckpoint", dirpath=str(folder), filename="good")
    first = json.loads(json.dumps(config))
    first["trainer"] |= {
        "max_epochs": 1,
        "enable_checkpointing": True,
        "callbacks": [*config["trainer"]["callbacks"], saving],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(first), "utf-8")
    code, text = run(Work(folder, first, ["fit", f"--config={folder / 'run.yaml'}"]))
    if code:
        raise RuntimeError(f"the sound run failed: {text}")
    shutil.rmtree(folder / "run")
    return config


def run(work: Work) -> tuple[int, str]:
    """Run the command in a process of its own; returns its exit code and what it wrote."""
    ours, its = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(its, 1)
        os.dup2(its, 2)
        _child(work)
    os.close(its)
    with os.fdopen(ours, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


def _child(work: Work) -> NoReturn:
    def prepare() -> None:
        if work.largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (work.largest, resource.RLIM_INFINITY))
        work.patch()

    signal.alarm(PATIENCE)
    run_and_exit(work.folder, work.args, {"COLUMNS": "2000", **work.environment}, prepare)


def said(code: int, text: str, work: Work) -> str:
    """The message in an output, as a cell of the table."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(work.folder), "…").replace("|", "\\|")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if re.match(r"(lit-moeedit [a-z]+|error): ", line)), None)
    if start is None:
        warned = [match[1] for match in (re.match(r"\S+ WARNING +(.*)", line) for line in lines) if match]
        known = [line for line in lines if "Detected KeyboardInterrupt" in line]
        shown = "; ".join(["works"] * (not code) + known + warned[:1]) or "(nothing)"
    else:
        # of a value of several possible types the parser says what is wrong with it for each; the first is meant
        first = lines[start:].index(OTHER) if OTHER in lines[start:] else None
        meant = [line for line in lines[start:][:first] if not line.startswith(("Given value", "- Expected a <class"))]
        shown = " ".join(meant) if first is None else f"{meant[0]} … {meant[-1].removeprefix('- ')}"
    shown = " ".join(shown.replace("(LIT_MOEEDIT_LOG=debug shows where it was raised)", "").split())
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


def faults(code: int, text: str, work: Work) -> list[str]:
    """What must not be."""
    left = sorted(str(path.relative_to(work.folder)) for path in work.folder.rglob(".*"))
    found = {
        "a traceback": "Traceback" in text,
        f"ended by signal {-code}": code < 0,
        "code was run": work.mark.exists(),
        f"left {', '.join(left)}": bool(left),
    }
    return [what for what, is_so in found.items() if is_so]


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for hostile_runs.md")
    parser.add_argument("--only", default="", help="a pattern; run the inputs whose names it is found in")
    parser.add_argument("--full", action="store_true", help="show all that the runs wrote")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table, wrong = ["| input | exit | what was said |", "| --- | --- | --- |"], []
    with tempfile.TemporaryDirectory() as place:
        sound, folder = Path(place) / "sound", Path(place) / "work"
        sound.mkdir()
        config = good(sound)
        for name, spoil in INPUTS.items():
            if not re.search(arguments.only, name):
                continue
            shutil.copytree(sound, folder)
            work = Work(folder, json.loads(json.dumps(config).replace(str(sound), str(folder))))
            spoil(work)
            work.args = work.args or ["fit", f"--config={folder / 'run.yaml'}"]
            (folder / "run.yaml").write_text(yaml.safe_dump(work.config), "utf-8")
            code, text = run(work)
            if arguments.full:
                sys.stdout.write(text)
            table.append(f"| {name.strip()} | {code} | {said(code, text, work)} |")
            sys.stdout.write(table[-1] + "\n")
            sys.stdout.flush()
            wrong += [f"{name}: {fault}" for fault in faults(code, text, work)]
            shutil.rmtree(folder)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        title = "What `lit-moeedit` says to hostile and broken input: `python -m tests.acceptance.hostile_runs`\n\n"
        (arguments.output / "hostile_runs.md").write_text(title + "\n".join(table) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
