"""The memory of past edits in the editor: what a later edit is given of it, and that an edit enters it wholly or not at
all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditMemory, Editor
from lit_moeedit.editing.memory import GatedKeys
from lit_moeedit.preservation import OutputPenalty
from lit_moeedit.solvers import EditProblem, Tucker
from tests.editing.recording import QUICK, Recording, bits, edited_weights, held, preservation
from tests.processes import run_ranks


def two_edits(model, tokenizer, facts: Sequence[Fact], texts, memory: EditMemory | None, **settings) -> Recording:
    """Edit the first half of the facts and then the second."""
    solver = Recording()
    settings = {"preserve": OutputPenalty(10.0), **settings}
    editor = Editor([0, 1], solver, QUICK, ridge=0.1, token="last", target_tokens="first", memory=memory, **settings)
    for half in (facts[:2], facts[2:]):
        editor.edit(model, tokenizer, half, texts)
    return solver


@pytest.mark.parametrize("preserve", ["output", "covariance", "nullspace", "none"])
def test_the_second_edit_has_the_rows_of_the_first_with_residual_0(model, tokenizer, facts, texts, preserve) -> None:
    memory = EditMemory()
    problems = two_edits(
        model, tokenizer, facts, texts, memory, contexts=("", "Note:"), preserve=preservation(preserve)
    ).problems
    assert [problem.num_edits for problem in problems[:2]] == [4, 4]
    for problem in problems[2:]:
        assert problem.num_edits in range(5, 9)
        assert not problem.residuals[4:].any() and bool(problem.residuals[:4].any(1).all())
        new = problem.edit_index < 4
        assert set(problem.expert_index[~new].tolist()) <= set(problem.expert_index[new].tolist())
    if preserve == "none":  # nothing shapes the keys, so they are the first edit's features
        old = {
            (j, *row) for j, row in zip(problems[0].expert_index.tolist(), problems[0].features.tolist(), strict=True)
        }
        again = problems[2].edit_index >= 4
        pairs = zip(problems[2].expert_index[again].tolist(), problems[2].features[again].tolist(), strict=True)
        assert {(j, *row) for j, row in pairs} <= old
    assert memory.size(0)[0] == memory.size(1)[0] == 8
    assert memory.state_dict()[0]["facts"] == [fact.prompt_key for fact in facts for _ in range(2)]


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("preserve", ["output", "nullspace", "none"])
def test_the_second_edit_in_tucker_form_has_all_rows_of_the_first(
    model, tokenizer, facts, texts, monkeypatch, preserve, carry
) -> None:
    """Whichever experts its own facts visit: it changes all."""
    problems: list[EditProblem] = []
    carry_core = Tucker.carry

    def recorded(self: Tucker, problem: EditProblem):
        problems.append(problem)
        return carry_core(self, problem)

    monkeypatch.setattr(Tucker, "carry", recorded)
    memory, solver = EditMemory(), Tucker((3, 20, 12), carry=carry)
    editor = Editor([0, 1], solver, QUICK, preservation(preserve), ridge=0.1, memory=memory)
    for half in (facts[:1], facts[1:2]):
        editor.edit(model, tokenizer, half, texts)
    layers = len(problems) // 2
    assert layers == (1 if carry else 2)
    assert [memory.size(i)[0] for i in (0, 1)] == ([0, 2] if carry else [2, 2])
    for first, second in zip(problems[:layers], problems[layers:], strict=True):
        own = second.edit_index == 0
        assert sorted(second.expert_index[~own].tolist()) == sorted(first.expert_index.tolist())
        assert set(first.expert_index.tolist()).isdisjoint(second.expert_index[own].tolist())


def test_facts_that_are_edited_again_do_not_meet_themselves(model, tokenizer, facts, texts) -> None:
    memory, solver = EditMemory(), Recording()
    editor = Editor([1], solver, QUICK, memory=memory)
    for _ in range(2):
        editor.edit(model, tokenizer, facts, texts)
    assert [problem.num_edits for problem in solver.problems] == [4, 4]
    assert memory.size(1)[0] == 4


def test_a_prompt_that_is_edited_to_another_target_does_not_meet_its_old_rows(model, tokenizer, facts, texts) -> None:
    memory, solver = EditMemory(), Recording()
    editor = Editor([1], solver, QUICK, memory=memory)
    for known in (facts, [replace(facts[0], target_new=facts[1].target_new), *facts[1:]]):
        editor.edit(model, tokenizer, known, texts)
    assert [problem.num_edits for problem in solver.problems] == [4, 4]
    assert memory.size(1)[0] == 4


def test_earlier_edits_move_less_with_a_memory(make_model, tokenizer, facts, texts) -> None:
    moved = {}
    for name in ("with", "without"):
        model = make_model("qwen3_moe")
        solver = two_edits(model, tokenizer, facts, texts, EditMemory() if name == "with" else None)
        first, second = solver.problems[0], solver.solutions[2]
        moved[name] = float(first.prediction(second).norm() / first.residuals.norm())
    assert moved["with"] < 0.5 * moved["without"]


@pytest.mark.parametrize("stage", ["solve", "guard", "remember"])
def test_an_edit_that_is_not_kept_leaves_no_trace(model, tokenizer, facts, texts, monkeypatch, stage) -> None:
    memory = EditMemory()
    editor = Editor([0, 1], targets=QUICK, memory=memory)
    editor.edit(model, tokenizer, facts[:2], texts)
    before, weights = bits(memory), edited_weights(model)
    if stage == "guard":
        assert not editor.edit(model, tokenizer, facts[2:], texts, guard=lambda: False).kept
    else:
        if stage == "solve":
            editor.solver = Recording(fail_at=1)
        else:
            remember = EditMemory.remember

            def fail_at_the_second_layer(self, edit, *rest):
                other = GatedKeys(edit[1].row, edit[1].expert, edit[1].key[:, 1:])
                remember(self, {0: edit[0], 1: other}, *rest)

            monkeypatch.setattr(EditMemory, "remember", fail_at_the_second_layer)
        with pytest.raises(ZeroDivisionError if stage == "solve" else RuntimeError):
            editor.edit(model, tokenizer, facts[2:], texts)
    assert bits(memory) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in edited_weights(model).items())


def _on_a_rank() -> list[object]:
    from lit_moeedit.sharding.ranks import Ranks
    from tests.sharding.small_edits import FACTS, TEXTS, editor, model, tokenizer

    ranks, whole, memory = Ranks(), model(), EditMemory(limit=10)
    together = editor(memory=memory)
    for fact in FACTS:
        together.edit(whole, tokenizer(), [fact], TEXTS, ranks=ranks)
    return [*bits(memory), held(memory).key.square().sum(), *(p.sum().item() for p in whole.parameters())]


def test_the_memory_is_the_same_on_all_ranks() -> None:
    first, second = run_ranks(_on_a_rank, 2)
    assert first == second
