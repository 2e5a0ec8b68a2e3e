"""What an older reader finds in an exported folder, in which transformers reads the same config and tokenizer.

The expected keys are those that transformers 4.56.2 reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    ByT5Tokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from lit_moeedit.checkpoints.older_readers import add_older_spellings, add_older_tokenizer
from lit_moeedit.planning.family_catalog import moe_families, small_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 77777.0}


def saved(config: PretrainedConfig, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of ``config.json`` with both spellings, after checking that they are the same config."""
    config.save_pretrained(folder)
    before = AutoConfig.from_pretrained(folder).to_dict()
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lost = add_older_spellings(folder, config)
    assert AutoConfig.from_pretrained(folder).to_dict() == before
    both = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert _without_others(both, keys) == keys
    return both, lost


def _without_others(some: Any, known: Any) -> Any:
    """The entries of nested dicts that are in ``known``, too."""
    if not (isinstance(some, dict) and isinstance(known, dict)):
        return some
    return {name: _without_others(value, known[name]) for name, value in some.items() if name in known}


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (
            "qwen3_moe",
            {"num_experts": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "dtype": "bfloat16"},
            {"num_experts": 8, "rope_theta": 5e6, "rope_scaling": None, "torch_dtype": "bfloat16"},
        ),
        (
            "qwen3_moe",
            {"rope_parameters": YARN},
            {"rope_theta": 77777.0, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        ),
        # its older default scales
        ("gpt_oss", {}, {"rope_theta": 10000.0, "rope_scaling": None, "num_experts": 8}),
        ("qwen3_next", {}, {"partial_rotary_factor": 0.25, "rope_theta": 10000.0}),
        ("deepseek_v3", {}, {"n_routed_experts": 8, "num_local_experts": 8}),
        ("mixtral", {}, {"num_local_experts": 8, "rope_theta": 1000000.0}),
        ("olmoe", {}, {"num_experts": 8}),
    ],
    ids=str,
)
def test_both_spellings(family: str, changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    keys, lost = saved(small_config(family, **changes), tmp_path)
    assert {name: keys.get(name, "missing") for name in expected} == expected and not lost


@pytest.mark.families
def test_every_family_reads_the_same_config(tmp_path: Path) -> None:
    lost = {}
    for family in moe_families():
        try:
            config = small_config(family.model_type)
            config.save_pretrained(tmp_path)
            AutoConfig.from_pretrained(tmp_path)
        except (ValueError, TypeError, KeyError):  # transformers itself cannot make, or read, it
            continue
        _, lost[family.model_type] = saved(config, tmp_path / family.model_type)
    assert len(lost) > 45
    # rotary embeddings that differ between layers are newer than the older spelling, and so are these families
    assert {name for name, settings in lost.items() if settings == ["rope_parameters"]} == {
        "beam", "deepseek_v4", "dots3_note_text", "gemma4_text", "laguna", "mellum", "mimo_v2_flash", "zaya"
    }  # fmt: skip
    assert all(settings in ([], ["rope_parameters"]) for settings in lost.values())


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer"])
def test_a_byte_level_tokenizer(kind: str, prefix: bool, tmp_path: Path) -> None:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(["a world of it"] * 9, trainers.BpeTrainer(special_tokens=["<pad>", "<x>"]))
    make: Any = {"PreTrainedTokenizerFast": PreTrainedTokenizerFast, "Qwen2Tokenizer": Qwen2Tokenizer}[kind]
    model = json.loads(trained.to_str())["model"]
    own = (
        {"tokenizer_object": trained, "pad_token": "<pad>", "extra_special_tokens": ["<x>"]}
        if make is PreTrainedTokenizerFast
        else {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]], "add_prefix_space": prefix}
    )
    tokenizer = make(**own)
    tokenizer.save_pretrained(tmp_path)
    add_older_tokenizer(tmp_path, tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["add_prefix_space"] is prefix and settings["tokenizer_class"] == kind
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("world of <x>it", " world", "it"):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("world").input_ids == tokenizer(" world").input_ids or not prefix


def test_a_tokenizer_in_python(tmp_path: Path) -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    add_older_tokenizer(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a word").input_ids == tokenizer("a word").input_ids
