"""Folders of every family: what is written is what is in memory, and nothing else has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.edits import read_edits, verify
from lit_moeedit.edits.folders import load_model
from lit_moeedit.standalone import edit

TARGETS = TargetOptimizer(steps=5, learning_rate=0.5, clamp=4.0)
pytestmark = pytest.mark.families


def check(model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], folder: Path, layers: list[int]) -> None:
    """Edit a saved model; only down-projections of the edited layers differ, and edits are found in the weights."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    editor = Editor(layers, targets=TARGETS, token="last", preserve="none")
    report = edit(folder / "base", facts, folder / "out", editor=editor, min_efficacy=0)
    assert any(report.relative_change.values())
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "out"))
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert all(f"layers.{layers[0]}." in name or f"layers.{layers[-1]}." in name for name in changed)
    assert all("down_proj" in name or ".w2" in name for name in changed)
    loaded = load_model(folder / "out")
    assert {presence.status for presence in verify(loaded, read_edits(folder / "out"))} == {"applied"}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_family(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    facts: Sequence[Fact],
    tmp_path: Path,
    model_type: str,
    dtype: torch.dtype,
) -> None:
    # torch's grouped matrix product wants rows of a multiple of 16 bytes
    sizes = {"moe_intermediate_size": 24} if model_type in ("qwen3_moe", "deepseek_v3") else {}
    check(make_model(model_type, **sizes).to(dtype), tokenizer, facts, tmp_path, [1, 2])


def test_a_model_with_an_image_encoder(
    tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact], tmp_path: Path
) -> None:
    text = {
        "vocab_size": 420, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 20, "num_experts": 6,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    check(model, tokenizer, facts, tmp_path, [0, 1])
    assert any("visual" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"Unrecognized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
