"""Copies of a model's folder, with other values of some weights."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.edits.folders import load_model, save_model
from lit_moeedit.edits.stored import INDEX, StoredModel

DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def base(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base" / "notes.txt").write_text("kept")
    return tmp_path / "base"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def test_only_what_has_changed_has_other_bytes(base: Path, tmp_path: Path) -> None:
    stored = StoredModel(base)
    model = load_model(stored)
    with torch.no_grad():
        model.get_parameter(DOWN)[2] += 1
    (tmp_path / "copy").mkdir()
    assert stored.copy(tmp_path / "copy", [stored.converted(model, DOWN)]) == 1  # one expert's own tensor
    before, after = tensors(base), tensors(tmp_path / "copy")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.experts.2.down_proj.weight"}
    same = [path.name for path in base.iterdir() if (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()]
    assert len(same) == len(list(base.iterdir())) - 1
    again = load_model(tmp_path / "copy")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_weight_that_has_no_such_place(base: Path) -> None:
    stored = StoredModel(base)
    with pytest.raises(ValueError, match="is stored as F32"):
        stored.converted(load_model(stored, torch.bfloat16), DOWN)
    with pytest.raises(ValueError, match="has no weight other"):
        stored.find([("other", torch.zeros(1))])


def test_experts_in_another_dtype_than_most_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    model.half()
    model.get_parameter(DOWN).data = model.get_parameter(DOWN).data.float()
    model.save_pretrained(tmp_path / "mixed")
    stored = StoredModel(tmp_path / "mixed")
    loaded = load_model(stored)
    stored.check_dtype(loaded, ["model.layers.0.mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"in several dtypes \(F16, F32\), and .*layers\.1.* in another than most"):
        stored.check_dtype(loaded, [DOWN])


def test_other_weights_are_not_copied_and_all_else_is(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "pytorch_model.bin.index.json", "modeling.py"):
        (base / name).write_bytes(b"before the edit")
    for folder, name in (("original", "consolidated.00.pth"), ("original", "params.json"), ("figures/a", "b.png")):
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / name).write_bytes(b"x")
    (base / "figures" / ".cache").mkdir()
    (base / "figures" / ".cache" / "c").write_bytes(b"x")
    (base / "figures" / "up").symlink_to(base)
    (base / "elsewhere").symlink_to("/etc")
    (base / "link.json").symlink_to("/dev/zero")
    others = set(StoredModel(base).other_files())
    assert others >= {"config.json", "notes.txt", "modeling.py", "figures/a/b.png", INDEX}
    assert not any(name.endswith((".bin", "link.json", ".pth", "params.json", "/c", "passwd")) for name in others)
    assert len([name for name in others if "/" in name]) == 1
    assert "consolidated.safetensors, original/, pytorch_model.bin" in caplog.text


def test_templates_in_a_folder_are_in_the_copy(base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    own.chat_template = {"default": "{{ messages }}", "tool_use": "tools: {{ messages }}"}
    own.save_pretrained(base)
    assert (base / "additional_chat_templates" / "tool_use.jinja").is_file()
    stored, copy = StoredModel(base), tmp_path / "copy"
    copy.mkdir()
    save_model(stored, load_model(stored), [DOWN], [], copy)
    loaded = AutoTokenizer.from_pretrained(copy, local_files_only=True)
    assert loaded.chat_template == own.chat_template


def test_the_index_of_other_files_is_not_copied(base: Path, tmp_path: Path) -> None:
    stored = StoredModel(base)
    model = load_model(stored).bfloat16()
    (tmp_path / "anew").mkdir()
    save_model(stored, model, [DOWN], [], tmp_path / "anew")  # all weights are written anew, to one file
    assert (tmp_path / "anew" / "notes.txt").exists() and not (tmp_path / "anew" / INDEX).exists()
    save_file(model.state_dict(), base / "model.safetensors")
    assert INDEX not in StoredModel(base).other_files()


def test_the_card_is_copied_from_a_model_without_edits(base: Path) -> None:
    for name in ("README.md", "report.html"):
        (base / name).write_text("mine")
    assert "README.md" in StoredModel(base).other_files() and "report.html" not in StoredModel(base).other_files()
    (base / "edits").mkdir()
    assert "README.md" not in StoredModel(base).other_files()


def test_a_folder_that_is_no_model(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        StoredModel(tmp_path / "bass")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        StoredModel(tmp_path)
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has an adapter"):
        StoredModel(base)


@pytest.mark.parametrize("names", [{"a": "../../etc/passwd"}, {"a": 3}, ["a"], {"a": "model.bin"}])
def test_an_index_of_other_files(base: Path, names: object) -> None:
    (base / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="weight_map"):
        StoredModel(base)


def test_damaged_files(base: Path) -> None:
    path = next(base.glob("*.safetensors"))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [2**40]
    text = json.dumps(header).encode()
    for damaged in (b"", content[:100], content[:-7], struct.pack("<Q", 2**63), struct.pack("<Q", len(text)) + text):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            StoredModel(base)
    shutil.rmtree(base)
