"""Second moments that an edit has used, kept on disk for its renewals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.preservation.kept_moments import KeptMoments
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.preservation.second_moments import SecondMoments, second_moments
from lit_moeedit.sharding.ranks import Ranks


def made(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], **changes: Any) -> tuple[list[ExpertLayer], Any]:
    layers = list(expert_layers(model).values())[:2]
    return layers, second_moments(model, tokenizer, layers, texts, token_budget=64, **changes)


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b)
        for i in one
        for a, b in zip(one[i].tensors().values(), other[i].tensors().values(), strict=True)
    )


def test_moments_come_back_as_they_were(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], tmp_path: Path
) -> None:
    layers, moments = made(model, tokenizer, texts, gated=True)
    ranks = Ranks.current()
    kept = KeptMoments.of(moments, None, str(tmp_path / "kept"), ranks)
    assert kept.folder == str(tmp_path / "kept") and len(list(Path(kept.folder).iterdir())) == 2
    with torch.no_grad():  # a key of the cache would be another now
        model.get_input_embeddings().weight.mul_(2)
    found = kept.load(model, layers, True, ranks)
    assert found is not None and same(found, moments) and all(own.gated for own in found.values())
    third = list(expert_layers(model).values())[2:3]
    assert kept.load(model, layers + third, True, ranks) is None  # of another layer there are none
    damaged = next(Path(kept.folder).iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\\1\\2\\3\\4")
    assert kept.load(model, layers, True, ranks) is None
    assert KeptMoments().load(model, layers, True, ranks) is None


def test_what_is_in_the_cache_is_not_written_again(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], tmp_path: Path
) -> None:
    cache, ranks = MomentsCache(tmp_path / "cache"), Ranks.current()
    layers, moments = made(model, tokenizer, texts, cache=cache)
    kept = KeptMoments.of(moments, cache, str(tmp_path / "kept"), ranks)
    assert kept.folder == str(tmp_path / "cache") and not (tmp_path / "kept").exists()
    found = kept.load(model, layers, False, ranks)
    assert found is not None and same(found, moments)
    # moments that came from elsewhere are in no cache
    foreign = {index: replace(own, key=None) for index, own in moments.items()}
    assert KeptMoments.of(foreign, cache, str(tmp_path / "kept"), ranks).folder == str(tmp_path / "kept")


def test_moments_of_many_layers_are_all_kept(model: PreTrainedModel, tmp_path: Path) -> None:
    (layer, *_), ranks = expert_layers(model).values(), Ranks.current()
    layers = [replace(layer, index=index) for index in range(40)]
    moments = {own.index: SecondMoments.zeros(own) for own in layers}
    for index, own in moments.items():
        own.count.fill_(index)
    # and those of another callback in the same folder
    others = {index + 100: replace(own, count=own.count + 100) for index, own in moments.items()}
    kept = KeptMoments.of(moments, None, str(tmp_path), ranks)
    KeptMoments.of(others, None, str(tmp_path), ranks)
    found = kept.load(model, layers, False, ranks)
    assert found is not None and same(found, moments)
