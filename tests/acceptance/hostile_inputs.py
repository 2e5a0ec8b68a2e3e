"""Input that is broken or was made to do harm, for ``hostile_runs.py``: by name, what it changes in a sound run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fsspec.implementations.local import LocalFileOpener
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_moeedit import safe_yaml
from lit_moeedit.editing import TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.transaction import Transaction
from tests.payload import Payload


@dataclass
class Work:
    """One run: a folder with a sound model, tokenizer and checkpoint in it, for an input to spoil.

    Attributes:
        folder: where everything is.
        config: of the run, written when the input has changed it.
        args: of the command; by default ``fit`` with the config.
        largest: bytes that a file may have.
        environment: variables of the run.
        patch: done in the run's process before the command.
    """

    folder: Path
    config: dict[str, Any]
    args: list[str] = field(default_factory=list)
    largest: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    patch: Callable[[], Any] = lambda: None

    @property
    def model(self) -> Path:
        """A folder for ``from_pretrained``, with a tokenizer."""
        return self.folder / "model"

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
        settings: dict[str, Any] = self.config["trainer"]["callbacks"][0]["init_args"]["editor"]["init_args"]
        return settings

    @property
    def fresh(self) -> dict[str, Any]:
        """Keys of the config of a model with fresh weights."""
        keys: dict[str, Any] = self.config["model"]["init_args"]["config"]
        return keys

    def command(self, how: str, *options: str) -> None:
        """Another command with the config."""
        self.args = [how, f"--config={self.folder / 'run.yaml'}", *options]

    def pretrained(self) -> Path:
        """Start from the model's folder."""
        self.config["model"]["init_args"] = {"pretrained": str(self.model)}
        self.config["data"]["init_args"]["tokenizer"] = str(self.model)
        return self.model

    def put(self, file: str, contents: Callable[[bytes], bytes]) -> None:
        """Give a file of the model's folder other contents, or make it."""
        path = self.pretrained() / file
        path.write_bytes(contents(path.read_bytes() if path.exists() else b""))

    def remove(self, pattern: str) -> None:
        """Remove files of the model's folder."""
        for path in self.pretrained().glob(pattern):
            path.unlink()

    def keys(self, file: str, **keys: Any) -> None:
        """Change keys of a JSON file of the model's folder."""
        self.put(file, lambda old: json.dumps({**json.loads(old), **keys}).encode())

    def weights(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        """Change weights in the model's folder."""
        path = self.pretrained() / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, {"format": "pt"})

    def code(self, file: str, **keys: Any) -> None:
        """Put code into the model's folder that marks that it was run, and name it in a file."""
        for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
            (self.model / f"{name}.py").write_text(f"open({str(self.mark)!r}, 'w')\n", "utf-8")
        self.keys(file, **keys)

    def resume(self, change: Callable[[Any], Any] = lambda _: None, how: str = "fit") -> None:
        """Go on from the checkpoint, changed; ``change`` may return something else in its place."""
        contents = torch.load(self.checkpoint, weights_only=True)
        other = change(contents)
        torch.save(contents if other is None else other, self.checkpoint)
        self.read(how)

    def read(self, how: str = "fit", path: str = "good.ckpt") -> None:
        """Use a checkpoint as it is."""
        if how == "export":
            self.args = ["export", str(self.folder / path), str(self.folder / "exported")]
        else:
            self.command(how, f"--ckpt_path={self.folder / path}")

    def bytes(self, contents: Callable[[bytes], bytes], how: str = "fit") -> None:
        """Use a checkpoint with other contents."""
        self.checkpoint.write_bytes(contents(self.checkpoint.read_bytes()))
        self.read(how)

    def yaml(self, text: str) -> None:
        """Use a config of the input's own."""
        path = self.folder / "own.yaml"
        path.write_text(text.replace("MARK", str(self.mark)), "utf-8")
        self.args = ["fit", f"--config={path}"]


Spoil = Callable[[Work], Any]
GATE, DOWN = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.3.down_proj.weight"


def evil(work: Work) -> Callable[[dict[str, Any]], None]:
    """Puts code into a checkpoint."""
    return lambda contents: contents.update(callbacks={"a": Payload(work.mark)})


def header(tensors: Mapping[str, Any], numbers: bytes) -> bytes:
    """A file of safetensors."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def deepspeed(work: Work) -> None:
    """A folder as DeepSpeed writes them, with code in it."""
    folder = work.folder / "zero.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("checkpoint", "utf-8")
    torch.save({"module": Payload(work.mark)}, folder / "mp_rank_00_model_states.pt")
    work.config["trainer"]["strategy"] = {"class_path": "lit_moeedit.sharding.cpu_strategy.DeepSpeedCPUStrategy"}
    work.read(path="zero.ckpt")


def linked(work: Work) -> None:
    """The same, with the code behind a link."""
    deepspeed(work)
    folder = work.folder / "zero.ckpt" / "checkpoint"
    folder.rename(work.folder / "elsewhere")
    folder.symlink_to(work.folder / "elsewhere")


def elsewhere(work: Work) -> None:
    """An index whose weights are to be found outside of the folder."""
    path = work.pretrained() / "model.safetensors"
    names = list(load_file(path))
    path.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../nowhere.safetensors")}
    (work.model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def state(callback: str, **keys: Any) -> Spoil:
    """Fields of a callback's state changed; or left out, if they are ``None``."""

    def change(contents: dict[str, Any]) -> None:
        [own] = [own for key, own in contents["callbacks"].items() if key.startswith(callback)]
        own |= keys
        for key in [key for key, value in keys.items() if value is None]:
            del own[key]

    return lambda work: work.resume(change)


def memory(**keys: Any) -> Spoil:
    """A memory with one row, but for ``keys``; of facts that are still to be edited."""
    rows = {"row": torch.tensor([0]), "expert": torch.tensor([0]), "key": torch.ones(1, 64), "facts": ["a"]}
    return state("KnowledgeEditing", applied={}, edits_made=0, memory={0: {**rows, "sketched": [], **keys}})


def patched(owner: Any, name: str, do: Callable[..., Any]) -> Spoil:
    """Runs with a function that does ``do(original, *args)`` instead."""

    def spoil(work: Work) -> None:
        original = getattr(owner, name)
        work.patch = lambda: setattr(owner, name, lambda *args, **keys: do(original, *args, **keys))
        work.editor["cache"] = str(work.folder / "cache")

    return spoil


def interrupted(owner: Any, name: str, call: int) -> Spoil:
    """Ctrl-C as a function is called for the ``call``-th time."""
    calls: list[int] = []

    def do(original: Callable[..., Any], *args: Any, **keys: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **keys)

    return patched(owner, name, do)


def half(original: Callable[..., Any], path: Path, text: str, *args: Any, **keys: Any) -> Any:
    """A disk that is full in the middle of summary.json."""
    if "summary" not in path.name:
        return original(path, text, *args, **keys)
    original(path, text[: len(text) // 2], *args, **keys)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(*_: Any) -> None:
    """A full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cramped(work: Work, largest: int, solver: str | None = None, **trainer: Any) -> None:
    """No file may be larger than this."""
    work.largest = largest
    work.config["trainer"] |= trainer
    cache = {"cache": str(work.folder / "cache")}
    work.editor.update(cache if solver is None else {"solver": {"class_path": solver, "init_args": cache}})


LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
TUCKER = "lit_moeedit.solvers.Tucker"
CONFIG_MAP = {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
MODEL_MAP = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_evil.Evil"]}

INPUTS: dict[str, Spoil] = {
    # models
    "a model folder that is not there": lambda w: shutil.rmtree(w.pretrained()),
    "weights in pytorch_model.bin alone, with code in it": lambda w: (
        w.remove("model.safetensors"), w.put("pytorch_model.bin", lambda _: pickle.dumps(Payload(w.mark)))),
    "a pickle named model.safetensors": lambda w: w.put("model.safetensors", lambda _: pickle.dumps(Payload(w.mark))),
    "safetensors whose header claims 2^60 bytes": lambda w: w.put(
        "model.safetensors", lambda old: struct.pack("<Q", 2**60) + old[8:]),
    "safetensors cut in the middle": lambda w: w.put("model.safetensors", lambda old: old[:100_000]),
    "safetensors with offsets behind its end": lambda w: w.put("model.safetensors", lambda _: header(
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [10**9, 10**9 + 16]}}, bytes(16))),
    "an index that names files outside of the folder": elsewhere,
    "NaN in a router": lambda w: w.weights(lambda t: t[GATE].fill_(torch.nan)),
    "one infinity in an expert": lambda w: w.weights(lambda t: t[DOWN][0, 0].fill_(torch.inf)),
    "a weight of another shape": lambda w: w.weights(lambda t: t.update({"lm_head.weight": torch.ones(5, 5)})),
    "a weight that is missing": lambda w: w.weights(lambda t: t.pop(GATE)),
    "config.json that is not JSON": lambda w: w.put("config.json", lambda _: b"{'model_type': qwen3_moe"),
    "config.json that is a list": lambda w: w.put("config.json", lambda _: b"[1, 2]"),
    "config.json with an unknown model_type": lambda w: w.keys("config.json", model_type="qwen99_moe"),
    "config.json with code of its own (auto_map)": lambda w: w.code(
        "config.json", model_type="evil_moe", auto_map=CONFIG_MAP),
    "the same, of a known model_type": lambda w: w.code("config.json", auto_map=MODEL_MAP),
    "config.json that wants a stranger's attention kernel": lambda w: w.keys(
        "config.json", attn_implementation="stranger/kernel"),
    "config.json with a text for the number of experts": lambda w: w.keys("config.json", num_experts="many"),
    "config.json with -1 layers": lambda w: w.keys("config.json", num_hidden_layers=-1),
    "config.json with a hidden size of 10^12": lambda w: w.keys("config.json", hidden_size=10**12),
    "a model without experts": lambda w: w.fresh.update(model_type="llama"),
    "a config with an unknown model_type": lambda w: w.fresh.update(model_type="evil_moe"),
    # tokenizers
    "a tokenizer with more tokens than the model embeds": lambda w: w.fresh.update(vocab_size=200),
    "the same, in validate": lambda w: (w.fresh.update(vocab_size=200), w.command("validate")),
    "no tokenizer in the folder": lambda w: w.remove("token*"),
    "tokenizer.json cut in the middle": lambda w: w.put("tokenizer.json", lambda old: old[:1000]),
    "a slow tokenizer, without offsets": lambda w: (
        w.remove("tokenizer.json"), w.keys("tokenizer_config.json", tokenizer_class="ByT5Tokenizer")),
    "a tokenizer with code of its own (auto_map)": lambda w: w.code(
        "tokenizer_config.json", auto_map=TOKENIZER_MAP, tokenizer_class="Evil"),
    "a tokenizer without pad, bos and eos": lambda w: w.keys(
        "tokenizer_config.json", pad_token=None, bos_token=None, eos_token=None),
    # checkpoints
    "a checkpoint that is not there": lambda w: w.read(path="none.ckpt"),
    "a checkpoint with code in it, resumed": lambda w: w.resume(evil(w)),
    "the same, validated": lambda w: w.resume(evil(w), "validate"),
    "the same, exported": lambda w: w.resume(evil(w), "export"),
    "a bare pickle named .ckpt": lambda w: w.bytes(lambda _: pickle.dumps(Payload(w.mark))),
    "a folder of DeepSpeed with code in it, resumed": deepspeed,
    "a folder of DeepSpeed with a link to code, resumed": linked,
    "a checkpoint with a text for its tokenizer, resumed": lambda w: w.resume(lambda c: c.update(tokenizer="gpt2")),
    "a checkpoint cut in the middle, resumed": lambda w: w.bytes(lambda old: old[:100_000]),
    "the same, exported ": lambda w: w.bytes(lambda old: old[:100_000], "export"),
    "a checkpoint that is a list": lambda w: w.resume(lambda _: [1, 2]),
    "a checkpoint with NaN weights": lambda w: w.resume(
        lambda c: c["state_dict"].update({f"model.{GATE}": torch.full((4, 32), torch.nan)})),
    "a checkpoint of another model": lambda w: w.resume(
        lambda c: c["state_dict"].update({"model.lm_head.weight": torch.ones(3, 3)})),
    "a state of KnowledgeEditing without 'applied'": state("KnowledgeEditing", applied=None),
    "a state of KnowledgeEditing with texts for answers": state("KnowledgeEditing", applied={"a": "yes"}),
    "a state of KnowledgeEditing with -1 edits": state("KnowledgeEditing", edits_made=-1),
    "a memory that is a list": state("KnowledgeEditing", memory=[1]),
    "a memory with keys of another width": memory(key=torch.ones(1, 7)),
    "a memory with 2^40 rows": memory(row=torch.tensor([2**40])),
    "a memory with an expert that is not there": memory(expert=torch.tensor([99])),
    "a memory with NaN": memory(key=torch.full((1, 64), torch.nan)),
    "a state of EditReport that is no list of edits": state("EditReport", edits="none"),
    "a state of RoutingMonitor without its tensors": state("RoutingMonitor", experts=None),
    "a state of RoutingMonitor with expert 30000": state(
        "RoutingMonitor", experts={i: torch.full((5, 2), 30000, dtype=torch.int16) for i in (0, 1)}),
    # configs
    "YAML that calls a function (python/object/apply)": lambda w: w.yaml(
        "trainer: !!python/object/apply:os.system ['touch MARK']"),
    "YAML that names a function (python/name)": lambda w: w.yaml("trainer: !!python/name:os.system"),
    "YAML nested 100,000 deep": lambda w: w.yaml("trainer: " + "[" * 100_000),
    "a billion laughs": lambda w: w.yaml(LAUGHS),
    "a billion laughs, where any value is allowed": lambda w: w.yaml(
        f"{LAUGHS}model: {{class_path: lit_moeedit.module.LitMoE, init_args: {{config: {{model_type: *a11}}}}}}"),
    "a config that is not YAML": lambda w: w.yaml("trainer: [1, 2\nmodel: }"),
    "a config of zero bytes": lambda w: w.yaml("\0" * 100),
    "a config that is a list": lambda w: w.yaml("[1, 2, 3]"),
    "an empty config": lambda w: w.yaml(""),
    "a config that is not there": lambda w: w.args.extend(["fit", f"--config={w.folder / 'none.yaml'}"]),
    "a config that is a folder": lambda w: w.args.extend(["fit", f"--config={w.folder}"]),
    "a misspelt key": lambda w: w.editor.update(rigde=0.1),
    "a class that is not there": lambda w: w.editor.update(solver={"class_path": "lit_moeedit.solvers.Woodberry"}),
    "a function of the system for a class": lambda w: w.editor.update(
        solver={"class_path": "os.system", "init_args": {"command": f"touch {w.mark}"}}),
    "a text where a number belongs": lambda w: w.editor.update(ridge="much"),
    "a layer that the model has not": lambda w: w.editor.update(layers=[7]),
    "a log level that is not there": lambda w: w.environment.update(LIT_MOEEDIT_LOG="loud"),
    # outputs
    "default_root_dir is a file": lambda w: w.config["trainer"].update(default_root_dir=str(w.checkpoint)),
    "summary.json is a folder": lambda w: (w.folder / "run" / "summary.json").mkdir(parents=True),
    "the logger's folder is a file": lambda w: w.config["trainer"].update(logger={
        "class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(w.checkpoint)}}),
    "the moments' cache is a file": lambda w: w.editor.update(cache=str(w.checkpoint)),
    "the cache of Tucker factors is a file": lambda w: w.editor.update(
        solver={"class_path": TUCKER, "init_args": {"cache": str(w.checkpoint)}}),
    "the output of an export is a file": lambda w: w.args.extend(
        ["export", str(w.checkpoint), str(w.model / "config.json")]),
    "the output of an export is inside of a file": lambda w: w.args.extend(
        ["export", str(w.checkpoint), str(w.model / "config.json" / "new")]),
    "no room for config.yaml": lambda w: cramped(w, 3000),
    "no room for second moments": lambda w: cramped(w, 40_000),
    "no room for Tucker factors": lambda w: cramped(w, 12_000, TUCKER),
    "no room for a checkpoint": lambda w: cramped(w, 40_000, enable_checkpointing=True),
    "no room for an export": lambda w: (cramped(w, 40_000), w.read("export")),
    "no room for the numbers of a plan": lambda w: (
        cramped(w, 100), w.command("plan", f"--json={w.folder / 'plan.json'}")),
    "a disk that is full in the middle of summary.json": patched(Path, "write_text", half),
    "a disk that is full in the middle of a checkpoint": lambda w: (
        patched(LocalFileOpener, "write", full)(w), w.config["trainer"].update(enable_checkpointing=True)),
    # Ctrl-C
    "Ctrl-C while the config is read": interrupted(safe_yaml, "check", 1),
    "Ctrl-C while the model trains": interrupted(LitMoE, "training_step", 2),
    "Ctrl-C while target vectors are found": interrupted(TargetOptimizer, "optimize", 1),
    "Ctrl-C between the commits of two layers": interrupted(Transaction, "commit", 2),
    "nothing wrong": lambda w: w.read(),
}  # fmt: skip
