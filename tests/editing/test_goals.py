"""Edits with the goals of an earlier edit: nothing is searched for that is known, and the weights become the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.preservation import CovariancePenalty
from lit_moeedit.solvers import Tucker, Woodbury
from tests.editing.recording import QUICK, Recording, edited_weights

CONTEXTS = ("", "Note:")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The facts of each search for target vectors, by their place."""
    found: list[list[int]] = []
    optimize = TargetOptimizer.optimize

    def noted(self: Any, model: Any, layer: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(sorted({row.edit for row in rows}))
        return optimize(self, model, layer, rows, *args, **kwargs)

    monkeypatch.setattr(TargetOptimizer, "optimize", noted)
    return found


def editor(**changes: Any) -> Editor:
    settings = {"targets": QUICK, "preserve": CovariancePenalty(10.0), "ridge": 0.1, "contexts": CONTEXTS, **changes}
    return Editor([0, 1], **settings)


@pytest.mark.parametrize("solver", [Woodbury(), Tucker()], ids=["Woodbury", "Tucker"])
def test_known_goals_lead_to_the_same_weights_without_a_search(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], texts: Sequence[str], searched: Any, solver: Any
) -> None:
    other = copy.deepcopy(model)
    first = editor(solver=solver).edit(model, tokenizer, facts, texts)
    assert searched == [[0, 1, 2, 3]] and first.moments is not None
    assert {key: list(goal.shape) for key, goal in first.goals.items()} == {
        fact.key: [len(CONTEXTS), 32] for fact in facts
    }
    again = editor(solver=solver).edit(other, tokenizer, facts, moments=first.moments, goals=first.goals)
    assert len(searched) == 1 and "targets" not in {name for name, value in again.seconds.items() if value}
    found = edited_weights(other)
    for name, weight in edited_weights(model).items():
        # goals minus hidden states instead of target vectors: one subtraction of float32
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    assert again.goals.keys() == first.goals.keys()


def test_some_facts_are_searched_for_and_others_stay(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], searched: Any
) -> None:
    other = copy.deepcopy(model)
    known = editor(preserve="none").edit(model, tokenizer, facts).goals
    solver = Recording()
    goals = {facts[1].key: known[facts[1].key], facts[3].key: None}
    result = editor(preserve="none", solver=solver).edit(other, tokenizer, facts, goals=goals)
    assert searched[1] == [0, 2]
    # at the first of two layers half of what is missing; each fact has a row for each context
    residuals = 2 * solver.problems[0].residuals.view(len(facts), len(CONTEXTS), -1)
    deltas = result.targets.deltas
    assert bool((deltas[[0, 2]].norm(dim=-1) > 0).all()) and not deltas[[1, 3]].any()
    for place in (0, 2):
        torch.testing.assert_close(residuals[place], deltas[place].expand(len(CONTEXTS), -1), rtol=1e-4, atol=1e-4)
    assert float(residuals[1].norm()) > 0.01 and not residuals[3].any()
    assert result.goals.keys() == {fact.key for fact in facts[:3]}
    torch.testing.assert_close(result.goals[facts[1].key], known[facts[1].key], rtol=1e-4, atol=1e-5)


def test_a_goal_far_away_is_approached_no_further_than_a_target_may_be(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact]
) -> None:
    far = {fact.key: torch.full((len(CONTEXTS), 32), 1e4) for fact in facts}
    solver, own = Recording(), editor(preserve="none")
    own.solver = solver
    goals = own.edit(model, tokenizer, facts, goals=far).goals
    wanted = 2 * solver.problems[0].residuals  # the first of two layers takes half
    hidden = torch.cat([goals[fact.key] for fact in facts]) - wanted
    torch.testing.assert_close(wanted.norm(dim=-1), QUICK.clamp * hidden.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_goals_of_another_shape_are_refused_before_any_change(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], unchanged: Any
) -> None:
    unchanged(model)
    with pytest.raises(ValueError, match=r"goals\['.*'\] should be of shape \[2, 32\], but it is \[1, 32\]"):
        editor(preserve="none").edit(model, tokenizer, facts, goals={facts[0].key: torch.zeros(1, 32)})
