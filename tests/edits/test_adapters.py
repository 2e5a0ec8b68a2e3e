"""Edits as adapters: plain peft on the base computes what the edited model does."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_moeedit.edits import EditConflictError, apply, to_peft
from tests.conftest import _build
from tests.edits.making import chain, equal, make, siblings

peft = pytest.importorskip("peft", reason="needs peft (the extra 'peft')")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_peft_computes_the_edited_model(family: str, input_ids: Tensor, tmp_path: Path) -> None:
    base = _build(family).eval()
    edits, models = chain(base, 2, layers=[1, 2])
    assert edits[0].layers[0].is_transposed == (family == "gpt_oss")
    folder = to_peft(edits, tmp_path / "adapter")
    with torch.no_grad():
        before, wanted = base(input_ids).logits, models[1].eval()(input_ids).logits
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        found = model(input_ids).logits
        merged = model.merge_and_unload()(input_ids).logits
    # factors in float32, a few units in the last place of weights of 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)
    assert (wanted - before).abs().max() > 0.01


def test_a_lower_rank_is_nearer_than_none(input_ids: Tensor, tmp_path: Path) -> None:
    base = _build("qwen3_moe").eval()
    edits, models = chain(base, 3)
    errors = []
    for rank in (1, 2, None):
        folder = to_peft(edits, tmp_path / str(rank), rank)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] and (rank is None or config["r"] == rank)
        assert tuple(map(int, config["peft_version"].split(".")[:2])) >= (0, 19)
        with torch.no_grad():
            found = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)(input_ids).logits
            errors.append(float((found - models[2].eval()(input_ids).logits).norm()))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ValueError, match="rank must be at least 1"):
        to_peft(edits, tmp_path / "none", 0)


def test_an_adapter_on_an_edited_model(input_ids: Tensor, tmp_path: Path) -> None:
    base = _build("qwen3_moe").eval()
    edits, models = chain(base, 2)
    folder = to_peft(edits[1:], tmp_path / "adapter")
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(copy.deepcopy(models[0]).eval(), folder)(input_ids).logits
        torch.testing.assert_close(found, models[1].eval()(input_ids).logits, rtol=0, atol=1e-5)  # as above


def test_an_edited_model_that_was_wrapped_keeps_the_edit(tmp_path: Path) -> None:
    """The base of an adapter on attention is edited in place."""
    base = _build("qwen3_moe")
    edit, model = make("one", base)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    apply(wrapped, [edit])
    assert equal(wrapped.unload(), model)


def test_square_experts_and_siblings_are_refused(tmp_path: Path) -> None:
    square, _ = make("square", _build("qwen3_moe", moe_intermediate_size=32))
    with pytest.raises(ValueError, match=r"d_model = d_hidden in model\.layers\.0.*allow_square"):
        to_peft([square], tmp_path / "square")
    assert not (tmp_path / "square").exists()
    to_peft([square], tmp_path / "square", allow_square=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        to_peft([square], tmp_path / "square", allow_square=True)
    both, _ = siblings(_build("qwen3_moe"), 2)
    with pytest.raises(EditConflictError, match="not solved jointly"):
        to_peft(both, tmp_path / "both")


def test_the_size_is_told_and_padding_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edits, _ = chain(_build("qwen3_moe"), 1, layers=[0])
    with caplog.at_level(logging.INFO, "lit_moeedit"):
        to_peft(edits, tmp_path / "small")
    assert "an adapter of rank" in caplog.text and "more than" not in caplog.text
    edits, _ = chain(_build("qwen3_moe"), 3, layers=[0], terms=40)
    to_peft(edits, tmp_path / "large")
    sizes = sum(tensor.nbytes for tensor in load_file(tmp_path / "large" / "adapter_model.safetensors").values())
    assert f"{sizes / 1e6:.1f} MB, more than the {6 * 32 * 20 * 4 / 1e6:.1f} MB of the changed experts" in caplog.text
