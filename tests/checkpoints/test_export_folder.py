"""The folder that is exported is whole or not there, is made in little memory, and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.tensors import WeightFile
from lit_moeedit.cli import run
from tests.checkpoints.full_disk import full_disk
from tests.checkpoints.zero_files import write_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 5,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def weights(config: dict[str, Any]) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    return {f"model.{name}": value.detach() for name, value in model.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights(CONFIG), "hyper_parameters": {"config": CONFIG}}, path)
    return path


def children(path: Path) -> set[str]:
    return {child.name for child in path.iterdir()}


# -- the folder -------------------------------------------------------------------------------------------------------


def test_what_is_there_already(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    output.mkdir(parents=True)
    export(checkpoint, output)
    first = children(output)
    assert first == {"config.json", "generation_config.json", "model.safetensors"}
    with pytest.raises(FileExistsError, match="out is not empty; --overwrite replaces it"):
        export(checkpoint, output)
    (output / "model-00001-of-00007.safetensors").touch()
    export(checkpoint, output, overwrite=True)
    assert children(output) == first and children(output.parent) == {"out"}

    (output / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"is not replaced: it has no config\.json"):
        export(checkpoint, output, overwrite=True)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileExistsError, match=r"is not replaced: the checkpoint .*last\.ckpt is in it"):
        export(checkpoint, tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file and not a folder"):
        export(checkpoint, checkpoint, overwrite=True)
    assert checkpoint.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"auto_map": {"AutoModelForCausalLM": "some/code--modeling.Model"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"attn_implementation": "some/kernel"},
        {"experts_implementation": "some/kernel"},
    ],
    ids=str,
)
def test_a_config_that_asks_for_code_from_elsewhere(more: dict[str, Any], tmp_path: Path) -> None:
    path, output = tmp_path / "last.ckpt", tmp_path / "out"
    torch.save({"state_dict": weights(CONFIG), "hyper_parameters": {"config": {**CONFIG, **more}}}, path)
    if "experts_implementation" in more:
        with pytest.raises(CheckpointError, match="no causal language model can be made of the field 'hyper_param"):
            export(path, output)
        return
    export(path, output)
    assert json.loads((output / "config.json").read_text(encoding="utf-8")).keys().isdisjoint(more)
    AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)


def interrupt(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """What Ctrl-C does between two weights."""
    write, written = WeightFile.write, []

    def some(self: WeightFile, name: str, tensor: Tensor) -> None:
        written.append(name)
        if len(written) == 20:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(WeightFile, "write", some)


@pytest.mark.parametrize("before", [False, True], ids=["nothing", "another model"])
@pytest.mark.parametrize("what", ["a full disk", "Ctrl-C", "the last step"])
def test_no_half_of_it(
    what: str, before: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    if before:
        export(checkpoint, output, dtype="bfloat16")
    files = {path: path.read_bytes() for path in output.glob("*")}
    if what == "a full disk":
        with pytest.raises(OSError, match="File too large"), full_disk(5000):
            export(checkpoint, output, max_shard_size="10KB", overwrite=before)
    elif what == "Ctrl-C":
        interrupt(monkeypatch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, output, max_shard_size="10KB", overwrite=before)
    else:
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.parent.name.endswith(".part"):
                raise OSError("no")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        monkeypatch.setattr("lit_moeedit.atomic_files._exchange", lambda *_: False)
        with pytest.raises(OSError, match="no"):
            export(checkpoint, output, overwrite=before)
    assert {path: path.read_bytes() for path in output.glob("*")} == files
    assert children(tmp_path) == ({"last.ckpt", "out"} if before else {"last.ckpt"})


def test_a_file_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "ä": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 3), "one": torch.tensor(True),
        "half": torch.randn(3, 2).half(), "turned": torch.randn(3, 5).T, "long": torch.arange(3),
    }  # fmt: skip
    file = WeightFile(tmp_path / "it", {name: value.to("meta") for name, value in tensors.items()})
    for name, value in reversed(tensors.items()):
        file.write(name, value)
    found = load_file(tmp_path / "it")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    with pytest.raises(ValueError, match=r"z has dtype torch\.complex128, which safetensors does not support"):
        WeightFile(tmp_path / "other", {"z": torch.zeros(1, dtype=torch.complex128)})


# -- memory -----------------------------------------------------------------------------------------------------------

LARGE = {
    **CONFIG, "vocab_size": 1000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 64,
    "moe_intermediate_size": 256, "num_experts": 16,
}  # fmt: skip
MEASURE = """
import sys, threading
from pathlib import Path
from lit_moeedit.checkpoints.export import export

def memory():  # MiB that belong to this process alone; mapped files do not
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

small, large, folder, dtype = sys.argv[1:]
export(Path(small), Path(folder, "small"))  # what is imported for any model does not count
before, peak, done = memory(), 0.0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, memory())

thread = threading.Thread(target=watch, daemon=True)
thread.start()
export(Path(large), Path(folder, "large"), max_shard_size="20MB", dtype=dtype)
done.set()
thread.join()
print("peak", peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the accounts of Linux")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one process", "stage 2, 4 ranks", "stage 3, 4 ranks"])
def test_memory(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    """The model has 163 MiB, its largest weight 16, which needs as much again for what it becomes."""
    state, path = weights(LARGE), tmp_path / "large.ckpt"
    fields = {"hyper_parameters": {"config": LARGE}}
    if kind == "one process":
        torch.save({"state_dict": {name: value.bfloat16() for name, value in state.items()}, **fields}, path)
    else:
        write_checkpoint(path, state, int(kind[6]), 4, working=torch.float32, **fields)
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(path), str(tmp_path), "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout.split("peak")[1])
    assert 10 < peak < 40, f"{peak:.0f} MiB"
    index = json.loads((tmp_path / "large" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] > 160 * 2**20 and len(set(index["weight_map"].values())) >= 9


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_process")
def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", str(checkpoint), str(tmp_path / "out"), "--dtype=bfloat16"]) is None
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    with pytest.raises(SystemExit) as exit:
        run(["export", str(checkpoint), str(tmp_path / "out")])
    assert str(exit.value.code) == f"lit-moeedit export: {tmp_path / 'out'} is not empty; --overwrite replaces it"
    run(["export", str(checkpoint), str(tmp_path / "out"), "--overwrite"])
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    with pytest.raises(SystemExit, match=r"lit-moeedit export: there is no checkpoint .*none"):
        run(["export", str(tmp_path / "none"), str(tmp_path / "out2")])
    for wrong in (["--dtype=int3"], ["--dtpye=float32"], ["too", "many"]):
        with pytest.raises(SystemExit) as exit:
            run(["export", str(checkpoint), str(tmp_path / "out2"), *wrong])
        assert exit.value.code == 2
    capsys.readouterr()
    for args, texts in (
        (["--help"], ["export", "Write a checkpoint of a training run"]),
        (["export", "--help"], ["usage: lit-moeedit export", "local path or hub id of the tokenizer", "--overwrite ["]),
    ):
        with pytest.raises(SystemExit) as exit:
            run(args)
        printed = capsys.readouterr().out
        assert exit.value.code == 0 and all(text in printed for text in texts)
