"""What the command says to input that is broken or was made to do harm, one run for each.

Makes each input in a temporary folder, runs the command on it in a process of its own, and writes a table of what it
said. The benchmark fails if a run shows a traceback, runs code of its input or leaves a half-written file::

    python benchmarks/hostile_runs.py --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lit_moeedit.cli import main as command
from lit_moeedit.data.corpus import train_tokenizer

CAPITALS = {"Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Peru": "Lima", "Japan": "Tokyo"}
MODEL: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 420, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EDITOR = {"layers": [0, 1], "token": "last", "targets": {"class_path": "lit_moeedit.editing.TargetOptimizer"}}
SHOWN = 300
"""Characters of a message in the table."""
OTHER = "- Not a valid subclass of Callback"
PATIENCE = 30
"""Seconds after which a run is taken to hang."""


class Payload:
    """What a pickle is dangerous for: it makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


@dataclass
class Work:
    """One run: a folder with a sound model, tokenizer and checkpoint in it, for an input to spoil.

    Attributes:
        folder: where everything is.
        config: of the run, written when the input has changed it.
        largest: bytes that a file may have, as on a full disk.
        environment: variables of the run.
    """

    folder: Path
    config: dict[str, Any]
    largest: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """A folder for ``from_pretrained``, with a tokenizer."""
        return self.folder / "model"

    @property
    def weights(self) -> Path:
        return self.model / "model.safetensors"

    @property
    def checkpoint(self) -> Path:
        """What the Trainer saved."""
        return self.folder / "good.ckpt"

    @property
    def mark(self) -> Path:
        """A file that is there if code of the input was run."""
        return self.folder / "was-run"

    @property
    def editor(self) -> dict[str, Any]:
        """Settings of the run's editor."""
        return self.config["trainer"]["callbacks"][0]["init_args"]["editor"]["init_args"]

    def pretrained(self) -> None:
        """Start from the model's folder."""
        self.config["model"]["init_args"] = {"pretrained": str(self.model)}
        self.config["data"]["init_args"]["tokenizer"] = str(self.model)

    def change(self, file: str, **keys: Any) -> None:
        """Change keys of a JSON file of the model's folder."""
        self.pretrained()
        path = self.model / file
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")

    def change_weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        self.pretrained()
        weights = load_file(self.weights)
        change(weights)
        save_file(weights, self.weights, {"format": "pt"})

    def change_checkpoint(self, change: Callable[[dict[str, Any]], Any], name: str = "good.ckpt") -> None:
        contents = torch.load(self.checkpoint, weights_only=True)
        change(contents)
        torch.save(contents, self.folder / name)

    def resume(self, how: str = "fit", path: str = "good.ckpt") -> list[str]:
        return [how, f"--config={self.folder / 'run.yaml'}", f"--ckpt_path={self.folder / path}"]

    def export(self, *options: str, path: str = "good.ckpt", output: str = "exported") -> list[str]:
        return ["export", str(self.folder / path), str(self.folder / output), *options]

    def code(self) -> None:
        """Put code into the model's folder that marks that it was run."""
        for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
            (self.model / f"{name}.py").write_text(f"open({str(self.mark)!r}, 'w')\n", "utf-8")


CASES: dict[str, Callable[[Work], list[str] | None]] = {}


def case(name: str) -> Callable[[Callable[[Work], Any]], Callable[[Work], Any]]:
    """Name an input; what the function returns are the command's arguments, by default ``fit`` with the config."""

    def add(function: Callable[[Work], Any]) -> Callable[[Work], Any]:
        CASES[name] = function
        return function

    return add


# -- models -----------------------------------------------------------------------------------------------------------


@case("a model folder that is not there")
def _(work: Work) -> None:
    work.pretrained()
    shutil.rmtree(work.model)


@case("weights in pytorch_model.bin alone, with code in it")
def _(work: Work) -> None:
    work.pretrained()
    work.weights.unlink()
    (work.model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(work.mark)))


@case("a pickle named model.safetensors")
def _(work: Work) -> None:
    work.pretrained()
    work.weights.write_bytes(pickle.dumps(Payload(work.mark)))


@case("safetensors whose header claims 2^60 bytes")
def _(work: Work) -> None:
    work.pretrained()
    work.weights.write_bytes(struct.pack("<Q", 2**60) + work.weights.read_bytes()[8:])


@case("safetensors cut in the middle")
def _(work: Work) -> None:
    work.pretrained()
    work.weights.write_bytes(work.weights.read_bytes()[:100_000])


@case("safetensors with offsets behind its end")
def _(work: Work) -> None:
    work.pretrained()
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [10**9, 10**9 + 16]}}).encode()
    work.weights.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


@case("an index that names a file outside of the folder")
def _(work: Work) -> None:
    work.change_weights(dict)
    names = list(load_file(work.weights))
    work.weights.rename(work.folder / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../nowhere.safetensors")}
    (work.model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


@case("NaN in a router")
def _(work: Work) -> None:
    work.change_weights(lambda w: w["model.layers.1.mlp.gate.weight"].fill_(torch.nan))


@case("one infinity in an expert")
def _(work: Work) -> None:
    work.change_weights(lambda w: w["model.layers.0.mlp.experts.3.down_proj.weight"][0, 0].fill_(torch.inf))


@case("weights of another shape")
def _(work: Work) -> None:
    work.change_weights(lambda w: w.update({"lm_head.weight": torch.ones(5, 5)}))


@case("a weight that is missing")
def _(work: Work) -> None:
    work.change_weights(lambda w: w.pop("model.layers.0.mlp.gate.weight"))


@case("config.json that is not JSON")
def _(work: Work) -> None:
    work.pretrained()
    (work.model / "config.json").write_text("{'model_type': qwen3_moe", "utf-8")


@case("config.json that is a list")
def _(work: Work) -> None:
    work.pretrained()
    (work.model / "config.json").write_text("[1, 2]", "utf-8")


@case("config.json with an unknown model_type")
def _(work: Work) -> None:
    work.change("config.json", model_type="qwen99_moe")


@case("config.json with code of its own (auto_map)")
def _(work: Work) -> None:
    work.code()
    maps = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
    work.change("config.json", model_type="evil_moe", auto_map=maps)


@case("a known model_type with code of its own (auto_map)")
def _(work: Work) -> None:
    work.code()
    work.change("config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.EvilModel"})


@case("config.json that wants an attention kernel of a stranger")
def _(work: Work) -> None:
    work.change("config.json", attn_implementation="stranger/kernel")


@case("config.json with a number of experts that is a text")
def _(work: Work) -> None:
    work.change("config.json", num_experts="many")


@case("config.json with -1 layers")
def _(work: Work) -> None:
    work.change("config.json", num_hidden_layers=-1)


@case("config.json with a hidden size of 10^12")
def _(work: Work) -> None:
    work.change("config.json", hidden_size=10**12)


@case("config.json of a model without experts")
def _(work: Work) -> None:
    work.config["model"]["init_args"]["config"] |= {"model_type": "llama"}


@case("a config with an unknown model_type")
def _(work: Work) -> None:
    work.config["model"]["init_args"]["config"] |= {"model_type": "evil_moe"}


# -- tokenizers -------------------------------------------------------------------------------------------------------


@case("a tokenizer with more tokens than the model embeds")
def _(work: Work) -> None:
    work.config["model"]["init_args"]["config"] |= {"vocab_size": 200}


@case("the same, in validate")
def _(work: Work) -> list[str]:
    work.config["model"]["init_args"]["config"] |= {"vocab_size": 200}
    work.config["trainer"]["callbacks"][0]["init_args"]["at"] = "validation"
    return ["validate", f"--config={work.folder / 'run.yaml'}"]


@case("no tokenizer in the folder")
def _(work: Work) -> None:
    work.pretrained()
    for path in work.model.glob("token*"):
        path.unlink()


@case("tokenizer.json cut in the middle")
def _(work: Work) -> None:
    work.pretrained()
    path = work.model / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])


@case("a slow tokenizer, without offsets")
def _(work: Work) -> None:
    work.pretrained()
    (work.model / "tokenizer.json").unlink()
    (work.model / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}', "utf-8")


@case("a tokenizer with code of its own (auto_map)")
def _(work: Work) -> None:
    work.code()
    work.change(
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]},
        tokenizer_class="Evil",
    )


@case("a tokenizer without pad, bos and eos")
def _(work: Work) -> None:
    work.change("tokenizer_config.json", pad_token=None, bos_token=None, eos_token=None)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@case("a checkpoint that is not there")
def _(work: Work) -> list[str]:
    return work.resume(path="none.ckpt")


@case("a checkpoint with code in it, resumed")
def _(work: Work) -> list[str]:
    work.change_checkpoint(lambda c: c.update(callbacks={"a": Payload(work.mark)}))
    return work.resume()


@case("a checkpoint with code in it, validated")
def _(work: Work) -> list[str]:
    work.change_checkpoint(lambda c: c.update(callbacks={"a": Payload(work.mark)}))
    return work.resume("validate")


@case("a checkpoint with code in it, exported")
def _(work: Work) -> list[str]:
    work.change_checkpoint(lambda c: c.update(callbacks={"a": Payload(work.mark)}))
    return work.export()


@case("a bare pickle named .ckpt")
def _(work: Work) -> list[str]:
    work.checkpoint.write_bytes(pickle.dumps(Payload(work.mark)))
    return work.resume()


@case("a folder of DeepSpeed with code in it, resumed")
def _(work: Work) -> list[str]:
    (work.folder / "zero.ckpt" / "checkpoint").mkdir(parents=True)
    (work.folder / "zero.ckpt" / "latest").write_text("checkpoint", "utf-8")
    torch.save({"module": Payload(work.mark)}, work.folder / "zero.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt")
    work.config["trainer"]["strategy"] = {"class_path": "lit_moeedit.sharding.strategy.DeepSpeedCPUStrategy"}
    return work.resume(path="zero.ckpt")


@case("a checkpoint cut in the middle, resumed")
def _(work: Work) -> list[str]:
    work.checkpoint.write_bytes(work.checkpoint.read_bytes()[:100_000])
    return work.resume()


@case("a checkpoint cut in the middle, exported")
def _(work: Work) -> list[str]:
    work.checkpoint.write_bytes(work.checkpoint.read_bytes()[:100_000])
    return work.export()


@case("a checkpoint that is a list")
def _(work: Work) -> list[str]:
    torch.save([1, 2], work.checkpoint)
    return work.resume()


@case("a checkpoint with NaN weights, resumed")
def _(work: Work) -> list[str]:
    work.change_checkpoint(lambda c: c["state_dict"]["model.model.layers.1.mlp.gate.weight"].fill_(torch.nan))
    return work.resume()


@case("a checkpoint of another model, resumed")
def _(work: Work) -> list[str]:
    work.change_checkpoint(lambda c: c["state_dict"].update({"model.lm_head.weight": torch.ones(3, 3)}))
    return work.resume()


def _callback(name: str, **keys: Any) -> Callable[[Work], list[str]]:
    def spoil(work: Work) -> list[str]:
        def change(contents: dict[str, Any]) -> None:
            [state] = [state for key, state in contents["callbacks"].items() if key.startswith(name)]
            state |= keys
            for key in [key for key, value in keys.items() if value is None]:
                del state[key]

        work.change_checkpoint(change)
        return work.resume()

    return spoil


_rows = {"row": torch.tensor([0]), "expert": torch.tensor([0]), "facts": ["a"], "sketched": []}
for _what, _name, _keys in [
    ("a state of KnowledgeEditing without 'applied'", "KnowledgeEditing", {"applied": None}),
    ("a state of KnowledgeEditing with texts for answers", "KnowledgeEditing", {"applied": {"a": "yes"}}),
    ("a state of KnowledgeEditing with -1 edits", "KnowledgeEditing", {"edits_made": -1}),
    ("a memory that is a list", "KnowledgeEditing", {"memory": [1]}),
    ("a memory with keys of another width", "KnowledgeEditing",
     {"applied": {}, "edits_made": 0, "memory": {0: {**_rows, "key": torch.ones(1, 7)}}}),
    ("a memory with 2^40 rows", "KnowledgeEditing",
     {"memory": {0: {**_rows, "row": torch.tensor([2**40]), "key": torch.ones(1, 64)}}}),
    ("a memory with an expert that is not there", "KnowledgeEditing",
     {"memory": {0: {**_rows, "expert": torch.tensor([99]), "key": torch.ones(1, 64)}}}),
    ("a memory with NaN", "KnowledgeEditing", {"memory": {0: {**_rows, "key": torch.full((1, 64), torch.nan)}}}),
    ("a state of EditReport that is no list of edits", "EditReport", {"edits": "none"}),
    ("a state of RoutingMonitor without its tensors", "RoutingMonitor", {"experts": None}),
    ("a state of RoutingMonitor with expert 30000", "RoutingMonitor",
     {"experts": {0: torch.full((5, 2), 30000, dtype=torch.int16)}}),
]:  # fmt: skip
    CASES[_what] = _callback(_name, **_keys)


# -- configs ----------------------------------------------------------------------------------------------------------


def _text(text: str) -> Callable[[Work], list[str]]:
    def write(work: Work) -> list[str]:
        (work.folder / "own.yaml").write_text(text.replace("MARK", str(work.mark)), "utf-8")
        return ["fit", f"--config={work.folder / 'own.yaml'}"]

    return write


_laughs = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
for _what, _own in {
    "a config that calls a function (!!python/object/apply)": "trainer: !!python/object/apply:os.system ['touch MARK']",
    "a config that calls a function (!!python/name)": "trainer: !!python/name:os.system",
    "a config nested 100,000 deep": "trainer: " + "[" * 100_000,
    "a billion laughs": _laughs,
    "a billion laughs, where anything is allowed": _laughs.replace("a0: ", "x: ", 1)
    + "model:\n  class_path: lit_moeedit.module.LitMoE\n  init_args:\n    config: {model_type: *a11}\n",
    "a config that is not YAML": "trainer: [1, 2\nmodel: }",
    "a config of zero bytes": "\0" * 100,
    "a config that is a list": "[1, 2, 3]",
    "an empty config": "",
}.items():
    CASES[_what] = _text(_own)


@case("a config that is not there")
def _(work: Work) -> list[str]:
    return ["fit", f"--config={work.folder / 'none.yaml'}"]


@case("a config that is a folder")
def _(work: Work) -> list[str]:
    return ["fit", f"--config={work.folder}"]


@case("a misspelt key")
def _(work: Work) -> None:
    work.editor["rigde"] = 0.1


@case("a class that is not there")
def _(work: Work) -> None:
    work.editor["solver"] = {"class_path": "lit_moeedit.solvers.Woodberry"}


@case("a class that is a function of the system")
def _(work: Work) -> None:
    work.editor["solver"] = {"class_path": "os.system", "init_args": {"command": f"touch {work.mark}"}}


@case("a text where a number belongs")
def _(work: Work) -> None:
    work.editor["ridge"] = "much"


@case("a layer that the model has not")
def _(work: Work) -> None:
    work.editor["layers"] = [7]


@case("a log level that is not there")
def _(work: Work) -> None:
    work.environment["LIT_MOEEDIT_LOG"] = "loud"


# -- outputs ----------------------------------------------------------------------------------------------------------


@case("default_root_dir is a file")
def _(work: Work) -> None:
    work.config["trainer"]["default_root_dir"] = str(work.checkpoint)


@case("summary.json is a folder")
def _(work: Work) -> None:
    (work.folder / "run" / "summary.json").mkdir(parents=True)


@case("the logger's folder is a file")
def _(work: Work) -> None:
    work.config["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(work.checkpoint)},
    }


@case("the folder of the moments' cache is a file")
def _(work: Work) -> None:
    work.editor["cache"] = str(work.checkpoint)


@case("the folder of the Tucker factors is a file")
def _(work: Work) -> None:
    work.editor["solver"] = {"class_path": "lit_moeedit.solvers.Tucker", "init_args": {"cache": str(work.checkpoint)}}


@case("the output of an export is a file")
def _(work: Work) -> list[str]:
    return work.export(output="model/config.json")


@case("the output of an export is inside of a file")
def _(work: Work) -> list[str]:
    return work.export(output="model/config.json/new")


@case("no room for config.yaml")
def _(work: Work) -> None:
    work.largest = 3000


@case("no room for the moments' cache")
def _(work: Work) -> None:
    work.largest = 40_000
    work.editor["cache"] = str(work.folder / "cache")


@case("no room for the Tucker factors")
def _(work: Work) -> None:
    work.largest = 12_000
    work.editor["solver"] = {
        "class_path": "lit_moeedit.solvers.Tucker",
        "init_args": {"cache": str(work.folder / "cache")},
    }


@case("no room for a checkpoint")
def _(work: Work) -> None:
    work.largest = 40_000
    work.config["trainer"]["enable_checkpointing"] = True


@case("no room for an export")
def _(work: Work) -> list[str]:
    work.largest = 40_000
    return work.export()


@case("no room for the numbers of a plan")
def _(work: Work) -> list[str]:
    work.largest = 100
    return ["plan", f"--config={work.folder / 'run.yaml'}", f"--json={work.folder / 'plan.json'}"]


@case("nothing wrong")
def _(work: Work) -> list[str]:
    work.editor["cache"] = str(work.folder / "cache")
    return work.resume()


def good(folder: Path) -> dict[str, Any]:
    """Make the sound files; returns the config of a run that is done in a second."""
    facts = folder / "facts.jsonl"
    names = list(CAPITALS)
    rows = [
        {"subject": name, "prompt": f"The capital of {name} is", "target_new": CAPITALS[names[i - 1]],
         "target_true": CAPITALS[name], "paraphrases": [f"In {name}, the capital is"]}
        for i, name in enumerate(names)
    ]  # fmt: skip
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    texts = [f"{row['prompt']} {row['target_true']} {row['paraphrases'][0]}" for row in rows]
    train_tokenizer(texts, 400).save_pretrained(folder / "model")
    config: dict[str, Any] = {
        "trainer": {
            "default_root_dir": str(folder / "run"), "accelerator": "cpu", "devices": 1, "max_epochs": 1,
            "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": [
                {"class_path": "lit_moeedit.callbacks.KnowledgeEditing", "init_args": {
                    "editor": {"class_path": "lit_moeedit.editing.Editor", "init_args": {
                        "layers": [0, 1], "token": "last", "memory": {"class_path": "lit_moeedit.editing.EditMemory"},
                        "targets": {"class_path": "lit_moeedit.editing.TargetOptimizer", "init_args": {"steps": 2}}}}}},
                {"class_path": "lit_moeedit.callbacks.RoutingMonitor"},
                {"class_path": "lit_moeedit.callbacks.EditReport"},
            ],
        },
        "model": {"class_path": "lit_moeedit.module.LitMoE", "init_args": {"config": MODEL}},
        "data": {"class_path": "lit_moeedit.data.FactsDataModule", "init_args": {
            "corpus": {"class_path": "lit_moeedit.data.FactsCorpus", "init_args": {"path": str(facts), "edits": 2}},
            "tokenizer": str(folder / "model"), "batch_size": 8, "samples_per_epoch": 8}},
    }  # fmt: skip
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
              "init_args": {"dirpath": str(folder), "filename": "good"}}  # fmt: skip
    first = json.loads(json.dumps(config))
    first["trainer"] |= {"enable_checkpointing": True, "callbacks": [*config["trainer"]["callbacks"], saving]}
    (folder / "run.yaml").write_text(yaml.safe_dump(first), "utf-8")
    code, text = run(["fit", f"--config={folder / 'run.yaml'}"], Work(folder, first))
    if code:
        raise RuntimeError(f"the sound run failed: {text}")
    shutil.rmtree(folder / "run")
    config["trainer"]["max_epochs"] = 2
    return config


def run(args: list[str], work: Work) -> tuple[int, str]:
    """Run the command in a process of its own; returns its exit code and what it wrote."""
    ours, its = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(its, 1)
        os.dup2(its, 2)
        os._exit(_child(args, work))
    os.close(its)
    with open(ours, encoding="utf-8", errors="replace") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


def _child(args: list[str], work: Work) -> int:
    """What a console script does."""
    os.environ.update({"COLUMNS": "2000", "HF_HUB_OFFLINE": "1", **work.environment})
    os.chdir(work.folder)
    sys.argv = ["lit-moeedit", *args]
    signal.alarm(PATIENCE)
    code: Any = 0
    try:
        if work.largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (work.largest, resource.RLIM_INFINITY))
        command()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            sys.stderr.write(code + "\n")
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def said(code: int, text: str, work: Work) -> str:
    """The message in an output, as a cell of the table."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace(str(work.folder), "…").replace("|", "\\|")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if re.match(r"(lit-moeedit [a-z]+|error): ", line)), None)
    if start is None:
        found = [line[9:] for line in lines if "WARNING" in line and ("…" in line or "factors" in line)]
        shown = f"works; {found[0]}" if found else "works" if not code else f"exit {code}: {lines[-1:]}"
    else:
        # of a value of several possible types the parser says what is wrong with it for each; the first is meant
        first = lines[start:].index(OTHER) if OTHER in lines[start:] else None
        meant = [line for line in lines[start:][:first] if not line.startswith(("Given value", "- Expected a <class"))]
        shown = " ".join(meant) if first is None else f"{meant[0]} … {meant[-1].removeprefix('- ')}"
    shown = " ".join(shown.replace("(LIT_MOEEDIT_LOG=debug shows where it was raised)", "").split())
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


def faults(code: int, text: str, work: Work) -> list[str]:
    """What must not be."""
    left = sorted(
        str(path.relative_to(work.folder))
        for path in work.folder.rglob("*")
        if path.name.startswith(".")
    )
    found = {
        "a traceback": "Traceback" in text,
        f"ended by signal {-code}": code < 0,
        "code was run": work.mark.exists(),
        f"left {', '.join(left)}": bool(left) and not work.mark.exists(),
    }
    return [what for what, is_so in found.items() if is_so]


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for hostile_runs.md")
    parser.add_argument("--only", default="", help="a pattern; run the inputs whose names it is found in")
    parser.add_argument("--full", action="store_true", help="show all that the runs wrote")
    arguments = parser.parse_args()
    table, wrong = ["| input | exit | what was said |", "| --- | --- | --- |"], []
    with tempfile.TemporaryDirectory() as place:
        sound, folder = Path(place) / "sound", Path(place) / "work"
        sound.mkdir()
        config = good(sound)
        for name, spoil in CASES.items():
            if not re.search(arguments.only, name):
                continue
            shutil.copytree(sound, folder)
            work = Work(folder, json.loads(json.dumps(config).replace(str(sound), str(folder))))
            args = spoil(work) or ["fit", f"--config={folder / 'run.yaml'}"]
            (folder / "run.yaml").write_text(yaml.safe_dump(work.config), "utf-8")
            code, text = run(args, work)
            if arguments.full:
                sys.stdout.write(text)
            table.append(f"| {name} | {code} | {said(code, text, work)} |")
            print(table[-1], flush=True)
            wrong += [f"{name}: {fault}" for fault in faults(code, text, work)]
            shutil.rmtree(folder)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        title = "What `lit-moeedit` says to hostile and broken input: `python benchmarks/hostile_runs.py`\n\n"
        (arguments.output / "hostile_runs.md").write_text(title + "\n".join(table) + "\n", encoding="utf-8")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
