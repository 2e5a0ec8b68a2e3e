"""Tests of untrusted model folders: one clear error, and none of their code is run."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_moeedit.pretrained import (
    build_config,
    check_vocabulary,
    pretrained_config,
    pretrained_tokenizer,
)
from lit_moeedit.sharding.loading import pretrained_model
from tests.payload import Payload

ARRAY = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[900,916]}}'


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "was-run"


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any, mark: Path) -> Path:
    """Make a valid model with its tokenizer, and code beside them that must not be run."""
    path = tmp_path / "model"
    make_model("qwen3_moe").save_pretrained(path)
    tokenizer.save_pretrained(path)
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n", "utf-8")
    return path


def keys(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")

    return change


def contents(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return spoil


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(folder.parent / "was-run")))


def posing_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(folder.parent / "was-run")))


WEIGHTS = "model.safetensors"
EVIL = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_a_pickle, "no file named model.safetensors"),
        (posing_pickle, "no model can be made of .*model: Error while deserializing header"),
        (contents(WEIGHTS, lambda old: struct.pack("<Q", 2**60) + old[8:]), "header too large"),
        (contents(WEIGHTS, lambda old: old[:2000]), "no model can be made of .*model: Error while deserializing"),
        (contents(WEIGHTS, lambda _: struct.pack("<Q", len(ARRAY)) + ARRAY + bytes(16)), "invalid offset"),
        (contents(WEIGHTS, lambda _: b""), "no model can be made of"),
        (
            weights(lambda t: t.update({"lm_head.weight": torch.ones(5, 5)})),
            "weights have other shapes than its config",
        ),
        (weights(lambda t: t.pop("lm_head.weight")), "lacks 1 weights of the model: lm_head.weight"),
        (contents("config.json", lambda old: old[:-20]), "not a valid JSON file"),
        (contents("config.json", lambda _: b"[1]"), "no model can be made of"),
        (contents("config.json", lambda _: b"\xff\xfe"), "config.json"),
        (keys("config.json", model_type="qwen99_moe"), "does not recognize this architecture"),
        (keys("config.json", model_type="evil", auto_map=EVIL), "contains custom code"),
        (keys("config.json", num_experts="many"), "Field 'num_experts' expected int, got str"),
    ],
)
def test_what_is_no_model(folder: Path, mark: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises((OSError, ValueError), match=message):
        pretrained_model(str(folder), torch.float32)
    assert not mark.exists()


def test_code_beside_a_known_model_is_left_alone(folder: Path, mark: Path) -> None:
    keys("config.json", auto_map=EVIL)(folder)
    assert type(pretrained_model(str(folder), torch.float32)).__name__ == "Qwen3MoeForCausalLM"
    assert pretrained_config(folder).model_type == "qwen3_moe"
    assert not mark.exists()


def without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        if path.suffix == ".json":
            path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_tokenizer, "the tokenizer of .*model cannot be used: it has no vocabulary"),
        (contents("tokenizer.json", lambda old: old[:1000]), "the tokenizer of .*model cannot be used"),
        (contents("tokenizer.json", lambda _: b"{}"), "the tokenizer of .*model cannot be used"),
        (keys("config.json", num_experts="many"), "the tokenizer of .*model cannot be used"),
    ],
)
def test_what_is_no_tokenizer(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        pretrained_tokenizer(folder)


def test_code_beside_a_tokenizer_is_left_alone(folder: Path, mark: Path, tokenizer: Any) -> None:
    auto_map = {"AutoTokenizer": [None, "tokenization_evil.Evil"]}
    keys("tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")(folder)
    assert pretrained_tokenizer(folder)("Rome")["input_ids"] == tokenizer("Rome")["input_ids"]
    assert not mark.exists()


@pytest.mark.parametrize(
    "read", [pretrained_config, pretrained_tokenizer, lambda p: pretrained_model(p, torch.float32)]
)
def test_a_folder_that_is_not_there(tmp_path: Path, read: Callable[[str], Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*none"):
        read(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "evil_moe"}, "model_type 'evil_moe'.* cannot be used: Unrecognized model identifier"),
        ({"model_type": "qwen3_moe", "hidden_size": "wide"}, "cannot be used: .*'hidden_size' expected int, got str"),
        ({"model_type": 7}, "model_type 7"),
    ],
)
def test_what_is_no_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(config)


def test_a_tokenizer_must_fit_the_embedding(model: Any, tokenizer: Any) -> None:
    check_vocabulary(tokenizer, model)
    small = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(len(tokenizer) - 1, 2))
    with pytest.raises(
        ValueError, match=f"has {len(tokenizer)} tokens, but the model embeds only {len(tokenizer) - 1}"
    ):
        check_vocabulary(tokenizer, small)  # type: ignore[arg-type]
