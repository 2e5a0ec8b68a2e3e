"""A model's folder, taught some facts, and an editor that changes them in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer


@pytest.fixture
def base(taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The folder of a model that generates the true targets, in several files."""
    folder = tmp_path / "base"
    taught.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def easy(facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose new targets so small a model can be made to generate."""
    return [facts[0], facts[2]]


@pytest.fixture
def facts_file(easy: Sequence[Fact], tmp_path: Path) -> Path:
    """The facts as a file."""
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in easy), encoding="utf-8")
    return path


@pytest.fixture
def editor() -> Editor:
    """An editor whose target vectors reach what it is asked for."""
    targets = TargetOptimizer(steps=40, learning_rate=0.5, clamp=4.0, weight_decay=0.0)
    return Editor([0, 1], targets=targets, token="last")
