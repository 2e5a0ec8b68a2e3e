"""The page on edits, run as it stands: an edit recorded, saved, applied to another copy of the base and taken out."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, EditResult, TargetOptimizer
from lit_moeedit.edits import Edit, SavedEdits, apply, layers_by_parameter, states
from lit_moeedit.edits.edit import in_sums
from lit_moeedit.edits.states import keep_in
from lit_moeedit.sharding.history import History
from tests.edits.making import chain, equal, make
from tests.test_docs import ROOT, blocks


@pytest.mark.parametrize("frozen", [False, True])
def test_the_page_as_it_stands(
    frozen: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (code for language, _, code in blocks((ROOT / "docs" / "edits.md").read_text()) if language == "python")
    code, undone, rest = code.partition("undo(other")
    editor = Editor([0, 1], targets=TargetOptimizer(steps=3), preserve="none")
    base, other = copy.deepcopy(model), copy.deepcopy(model)
    other.requires_grad_(not frozen)
    names: dict[str, Any] = {"editor": editor, "model": model, "tokenizer": tokenizer, "facts": facts, "texts": texts}
    names |= {"other": other, "model_before": base}
    exec(code, names)
    assert equal(other, model) and not equal(other, base)
    exec(undone + rest, names)
    assert equal(other, base)
    edit = Edit.load(tmp_path / "edits" / "capitals")
    assert list(edit.facts) == facts
    assert edit.settings["solver"]["class"].endswith("Woodbury") and edit.settings["targets"]["steps"] == 3


def test_only_a_kept_edit_is_recorded(model: PreTrainedModel) -> None:
    editor = Editor([0], preserve="none")
    result = EditResult([], {}, None, {}, kept=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the edit 'one' was not kept"):
        Edit.record("one", model, result, states(layers_by_parameter(model)), method=editor)


@pytest.mark.parametrize("rounding", ["together", "alone"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_applies_edits_of_frozen_and_of_trained_weights_to_either(
    rounding: str, frozen: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    edit, made_in = make("one", model, rounding=rounding)
    other = copy.deepcopy(model).requires_grad_(not frozen)
    saved = SavedEdits([edit])
    assert saved.edit(other, tokenizer, saved.facts).kept
    assert equal(other, made_in)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rounding", ["together", "alone"])
def test_a_run_applies_a_chain_of_several_sums(
    rounding: str, frozen: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    base: Any = copy.deepcopy(model)
    first, between = chain(base, 2)
    later, models = chain(between[-1], 3, rounding=rounding, terms=9)
    saved = SavedEdits([*first, *(replace(edit, name=f"later-{edit.name}") for edit in later)])
    other, histories = copy.deepcopy(base).requires_grad_(not frozen), dict[str, History]()
    assert saved.edit(other, tokenizer, saved.facts, histories=histories).kept
    assert equal(other, models[-1])
    counts = ([2, 3] if rounding == "together" else [2, 1, 1, 1]) if frozen else []
    assert all([len(own.deltas) for own in sums] == counts for sums in histories.values())


def test_an_edit_tells_the_sum_that_it_belongs_to(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """As in a run: the histories are with the model."""
    other: Any = copy.deepcopy(model).requires_grad_(False)
    histories = dict[str, History]()
    keep_in(other, histories)
    edits: list[Edit] = []
    for seed, is_known in enumerate((True, True, False)):
        if not is_known:  # as after a restart with the edited weights
            histories.clear()
        saved = SavedEdits([make("one", other, seed=seed)[0]], any_base=True)
        before = states(layers_by_parameter(other))
        result = saved.edit(other, tokenizer, saved.facts, histories=histories)
        edits.append(Edit.record(f"edit-{seed}", other, result, before, method=saved, made_on=edits))
    assert [len(own) for own in in_sums([edit.layers[0] for edit in edits])] == [2, 1]
    again: Any = copy.deepcopy(model)
    assert apply(again, edits)
    assert equal(again, other)


def test_metrics_that_are_not_finite_are_left_out(model: PreTrainedModel, tmp_path: Path) -> None:
    edit, _ = make("one", model, metrics_before={"score": float("nan"), "efficacy": 0.5, "loss": float("inf")})
    assert Edit.load(edit.save(tmp_path)).metrics_before == {"efficacy": 0.5}
