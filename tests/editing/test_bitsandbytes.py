"""Models whose linear layers bitsandbytes quantises: their experts are whole and edited, or the reason is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lit_moeedit.editing import Editor
from lit_moeedit.models.experts import UnsupportedModelError, check_editable
from tests.editing.recording import QUICK, edited_weights

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def four_bit(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> PreTrainedModel:
    """A model with 4-bit attention, whose sizes are multiples of the blocks of bitsandbytes."""
    make_model("qwen3_moe", hidden_size=64, head_dim=32, moe_intermediate_size=32).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    return model.eval()  # type: ignore[no-any-return]


def repacks(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


@pytest.mark.parametrize("token", ["last", "subject_last"])
def test_experts_are_edited(token: Any, four_bit: PreTrainedModel, tokenizer: Any, facts: Any) -> None:
    assert {layer.down_proj.dtype for layer in check_editable(four_bit, [0, 1, 2])} == {torch.bfloat16}
    able = repacks(four_bit)
    before = edited_weights(four_bit)
    result = Editor([1], targets=QUICK, preserve="none", token=token).edit(four_bit, tokenizer, facts)
    assert result.relative_change[1] > 1e-4 and bool(result.targets.deltas.any(-1).all())
    changed = {name for name, weight in edited_weights(four_bit).items() if not torch.equal(weight, before[name])}
    assert changed == {"model.layers.1.mlp.experts.down_proj"}
    assert repacks(four_bit) == able  # the layers repack again when they run for themselves


def test_layers_that_pass_no_gradient_any_more(four_bit: PreTrainedModel, tokenizer: Any, facts: Any) -> None:
    if not repacks(four_bit):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 only")
    with torch.no_grad():
        four_bit(input_ids=IDS)
    editor = Editor([1], targets=QUICK, preserve="none", token="last")
    with pytest.raises(UnsupportedModelError, match=r"4-bit layer model\.layers\.0\..* support_avx512bf16_for_cpu = F"):
        editor.edit(four_bit, tokenizer, facts)
