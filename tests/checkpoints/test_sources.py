"""Weights of folders and checkpoints, read again one by one: the bits of the model that was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.sources import ModelSource, StoredWeights
from lit_moeedit.models.parts import stored_tensors
from lit_moeedit.planning.family_catalog import moe_families, small_model

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3"]
# transformers itself cannot load the small model of the other one that it has saved
OTHERS = [family.model_type for family in moe_families() if family.is_declared and family.model_type != "gemma4_text"]


def check(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    loaded, weights = ModelSource.find(folder).load()
    assert isinstance(weights, StoredWeights)  # else a second model is in memory
    tensors = stored_tensors(loaded)
    assert list(weights) == list(tensors) and len(weights) == len(tensors)
    originals = stored_tensors(model)
    for name, tensor in tensors.items():
        part = weights[name]
        assert part.is_whole and tuple(part.shape) == tuple(tensor.shape)
        assert torch.equal(part.elements.view(tensor.shape), tensor)
        assert torch.equal(tensor, originals[name])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_of_a_folder(model_type: str, tmp_path: Path) -> None:
    check(small_model(model_type, torch.bfloat16), tmp_path, torch.bfloat16)


@pytest.mark.families
@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_weights_of_every_family(model_type: str, tmp_path: Path) -> None:
    check(small_model(model_type), tmp_path, torch.float32)


def saved(model: PreTrainedModel, path: Path, **fields: Any) -> Path:
    """A checkpoint as Lightning saves it of a module with the model in its attribute ``model``."""
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": model.config.to_dict()}, **fields}, path)
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_checkpoint(tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = small_model("qwen3_moe", tie_word_embeddings=tied).eval()
    source = ModelSource.find(saved(model, tmp_path / "a.ckpt"))
    assert source.dtype == torch.float32
    loaded, weights = source.load()
    assert set(weights) == set(stored_tensors(model)) and len(weights) == len(stored_tensors(model))
    for name, tensor in stored_tensors(model).items():
        assert torch.equal(weights[name].elements.view(tensor.shape), tensor)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        # the attention of another implementation may add up in another order
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        next(loaded.parameters()).add_(1)
    name = next(iter(weights))
    assert torch.equal(weights[name].elements.view(-1), stored_tensors(model)[name].view(-1))


def test_a_checkpoint_without_a_config_or_weights(tmp_path: Path) -> None:
    model = small_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    path = saved(model, tmp_path / "a.ckpt", hyper_parameters={})
    with pytest.raises(CheckpointError, match="name the model with --model"):
        ModelSource.find(path).load()
    loaded, _ = ModelSource.find(path, tmp_path / "base").load(torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    torch.save({"state_dict": {"model.model.norm.weight": torch.ones(16)}}, path)
    with pytest.raises(CheckpointError, match="missing"):
        ModelSource.find(path, tmp_path / "base").load()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ModelSource.find(tmp_path / "none")
