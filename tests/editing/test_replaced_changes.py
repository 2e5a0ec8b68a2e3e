"""Edits that take earlier changes out first: as if these had never been made, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation import CovariancePenalty
from tests.editing.recording import QUICK


def edited_weights(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    return {index: expert_layers(model)[index].down_proj.detach().clone() for index in (0, 1)}


def editor(**changes: Any) -> Editor:
    return Editor([0, 1], **{"targets": QUICK, "preserve": CovariancePenalty(10.0), "ridge": 0.1, **changes})


def test_the_edit_is_that_of_the_weights_without_the_earlier_ones(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], texts: Sequence[str]
) -> None:
    unedited, before = copy.deepcopy(model), edited_weights(model)
    first = editor().edit(model, tokenizer, facts[:2], texts)
    second = editor().edit(model, tokenizer, facts[2:], texts)
    earlier = {index: [first.deltas[index], second.deltas[index]] for index in (0, 1)}
    found = editor().edit(model, tokenizer, facts, texts, replaced=earlier)
    expected = editor().edit(unedited, tokenizer, facts, texts)
    # without the changes the weights are what they were but for rounding, and so are keys and moments
    for index, weight in edited_weights(unedited).items():
        change = float((weight - before[index]).norm())
        # seen: 1e-6 to 1e-5 of the change
        assert change > 0.1 and float((edited_weights(model)[index] - weight).norm()) < 1e-4 * change
    assert found.relative_change == pytest.approx(expected.relative_change, rel=1e-4)
    assert found.moments is not None and expected.moments is not None
    for index, own in expected.moments.items():
        experts = torch.arange(len(own.count))
        torch.testing.assert_close(found.moments[index].mean(experts), own.mean(experts), rtol=1e-3, atol=1e-5)


def test_the_earlier_changes_stay_if_the_edit_is_undone_or_fails(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], texts: Sequence[str]
) -> None:
    earlier = {index: [own] for index, own in editor().edit(model, tokenizer, facts, texts).deltas.items()}
    before, seen = edited_weights(model), []

    def guard() -> bool:
        seen.append(edited_weights(model))
        return False

    assert not editor().edit(model, tokenizer, facts, texts, replaced=earlier, guard=guard).kept
    with pytest.raises(ValueError, match="needs preservation text"):
        editor().edit(model, tokenizer, facts, replaced=earlier)
    for index, weight in edited_weights(model).items():
        assert torch.equal(weight, before[index]) and not torch.equal(weight, seen[0][index])


def test_changes_that_do_not_fit_are_refused(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], texts: Sequence[str], unchanged: Any
) -> None:
    deltas = editor().edit(copy.deepcopy(model), tokenizer, facts, texts).deltas[0]
    with pytest.raises(
        ValueError, match=r"replaced has changes of layers \[3\], but the edit is one of layers \[0, 1\]"
    ):
        editor().edit(model, tokenizer, facts, texts, replaced={3: [deltas]})
    with pytest.raises(ValueError, match=r"replaced has a change of shape \[.*\] in layer 0, whose experts are"):
        editor().edit(model, tokenizer, facts, texts, replaced={0: [deltas.with_right(deltas.right[:, 1:])]})
    unchanged(model)
