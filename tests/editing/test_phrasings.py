"""Further prompts of a fact in the words of others: which ones are taken, and the rows that they become."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact, Neighbour
from lit_moeedit.data.probes import Probe
from lit_moeedit.editing import EditMemory, Editor, evaluate
from lit_moeedit.editing.phrasings import candidate_prompts, further_prompts
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers import EditProblem
from tests.editing.recording import QUICK, Recording, edited_weights, held
from tests.processes import run_ranks

CONTEXTS = ("", "Note:")
FURTHER = [["Rome is found in", "People in Rome speak"], [], ["The city of Oslo lies in"], []]


def edit(
    model: PreTrainedModel, tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[str] = CONTEXTS, **changes: Any
) -> tuple[EditProblem, Any]:
    """The first layer's problem, and the result."""
    solver, kept = Recording(), {name: changes.pop(name) for name in ("goals", "measured") if name in changes}
    changes = {"target_tokens": "first", **changes}
    editor = Editor(
        [0, 1], solver=solver, targets=QUICK, preserve="none", ridge=0.1, contexts=contexts, token="last", **changes
    )
    result = editor.edit(copy.deepcopy(model), tokenizer, facts, **kept)
    return solver.problems[0], result


def assert_same_keys(found: EditProblem, row: int, expected: EditProblem, other: int, weight: float) -> None:
    """The two rows visit the same experts with the same gated keys, those of the first one weighted."""
    parts = []
    for problem, number, factor in ((found, row, 1.0), (expected, other, weight**0.5)):
        own = problem.edit_index == number
        order = problem.expert_index[own].argsort()
        parts.append((problem.expert_index[own][order], factor * problem.features[own][order]))
    assert torch.equal(parts[0][0], parts[1][0])
    # other batches are padded to other lengths, so float32 is rounded in another order
    torch.testing.assert_close(parts[0][1], parts[1][1], rtol=1e-4, atol=1e-6)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Further prompts that a random model would not choose; the number of facts of each call."""
    calls: list[int] = []

    def fixed(model: Any, tokenizer: Any, facts: Sequence[Fact], *args: Any) -> list[list[str]]:
        calls.append(len(facts))
        return [next((own for own in FURTHER if any(fact.subject in text for text in own)), []) for fact in facts]

    monkeypatch.setattr("lit_moeedit.editing.editor.further_prompts", fixed)
    return calls


def test_the_model_says_which_prompts_ask_for_a_fact(model: PreTrainedModel, tokenizer: Any, facts: list[Fact]) -> None:
    (bread,) = tokenizer(" bread", add_special_tokens=False)["input_ids"]
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor(bread), 99.0))
    truths = ("bread", "Russia", "bread", None)
    asked = [replace(fact, target_true=truth) for fact, truth in zip(facts, truths, strict=True)]
    found = further_prompts(model, tokenizer, asked, 2)
    assert [len(own) for own in found] == [2, 0, 2, 0]
    for fact, own in zip(asked, found, strict=True):
        assert set(own) < set(candidate_prompts(asked, 8)[asked.index(fact)])
        assert all(fact.subject in text for text in own)
    # of all candidates of a fact, one after another, the most certain answers
    for index in (0, 2):
        alone = []
        for text in candidate_prompts(asked, 8)[index]:
            probe = Fact(asked[index].subject, text, "bread", "bread")
            alone.append((-float(evaluate(model, tokenizer, [probe]).log_new), text))
        assert found[index] == [text for _, text in sorted(alone)[:2]]


def test_a_prompt_without_tokens_of_its_own_is_left_out(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bread,) = tokenizer(" bread", add_special_tokens=False)["input_ids"]
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor(bread), 99.0))
    asked = [replace(fact, target_true="bread") for fact in facts]
    everything = [["Rome is found in"], ["nothing of the lake"], ["People in Oslo speak"], []]
    monkeypatch.setattr("lit_moeedit.editing.phrasings.candidate_prompts", lambda *args: everything)
    found = further_prompts(model, tokenizer, asked, 2)
    assert found == [["Rome is found in"], [], ["People in Oslo speak"], []]  # the second does not have its subject


def test_what_is_measured_or_edited_by_itself_is_no_candidate(facts: list[Fact]) -> None:
    everything = candidate_prompts(facts, 8)
    assert "Rome is found in" in everything[0] and "Oslo is found in" in everything[2]
    measured = [
        replace(facts[0], paraphrases=("Rome is found in",)),
        facts[1],
        replace(facts[2], neighbours=(Neighbour("Oslo is found in", "Norway"),)),
        Fact("Rome", "People who live in Rome speak", "Latin"),
    ]
    left = candidate_prompts(measured, 8)
    texts = {"Rome is found in", "Oslo is found in", "People who live in Rome speak"}
    assert not texts & {text for own in left for text in own}
    assert candidate_prompts(measured, 8) == left and all(len(own) <= 1 for own in candidate_prompts(facts, 1))


def test_what_measures_any_fact_is_no_candidate(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], asked: list[str]
) -> None:
    # the last one has no truth, so it has no candidates, and here it has a known goal
    probe = Probe("portability", "People who live in Lake Ladoga speak", ("Latin",))
    neighbour = Neighbour("Rome is found in", "Italy")
    known = replace(facts[3], paraphrases=("Oslo is found in",), neighbours=(neighbour,), probes=(probe,))
    own, goals = [*facts[:3], known], {known.key: None}
    texts = {"Oslo is found in", neighbour.prompt, probe.prompt}
    edit(model, tokenizer, facts, phrasings=2, goals=goals)
    assert texts < set(asked)
    for changed, measured in ((own, []), (facts, [known])):
        asked.clear()
        edit(model, tokenizer, changed, phrasings=2, goals=goals, measured=measured)
        assert asked and not texts & set(asked)


def test_a_candidate_has_what_is_in_front_of_its_sentence() -> None:
    header = "System: be brief. Be kind.\nUser: "
    asked = [
        Fact("Rome", f"{header}Where is Rome?", "Spain"),
        Fact("Oslo", f"{header}What do people in Oslo speak?", "Thai"),
    ]
    assert candidate_prompts(asked, 3) == [[f"{header}What do people in Rome speak?"], [f"{header}Where is Oslo?"]]


def test_further_prompts_are_rows_with_the_target_vector_of_their_fact(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], given: list[int]
) -> None:
    plain, before = edit(model, tokenizer, facts)
    assert not given
    found, result = edit(model, tokenizer, facts, phrasings=2)
    assert given == [4]
    own = len(facts) * len(CONTEXTS)
    assert (len(plain.residuals), len(found.residuals)) == (own, own + 3)
    torch.testing.assert_close(result.targets.deltas, before.targets.deltas, rtol=0, atol=0)  # the same search
    # two contexts, and two, none, one and no further prompts: squared errors have the weight of two rows in all
    weights = [2 / 4, 1.0, 2 / 3, 1.0]
    for row in range(own):
        assert_same_keys(found, row, plain, row, weights[row // len(CONTEXTS)])
    # a prompt that is edited by itself has the same keys
    texts = [(text, facts[number]) for number, prompts in enumerate(FURTHER) for text in prompts]
    alone, _ = edit(model, tokenizer, [replace(fact, prompt=text) for text, fact in texts], ("",))
    for number, (_, fact) in enumerate(texts):
        weight = weights[facts.index(fact)]
        assert_same_keys(found, own + number, alone, number, weight)
        # the lower of two layers takes half of the way, up to the rounding of hidden + δ − hidden
        half = weight**0.5 * result.targets.deltas[facts.index(fact)] / 2
        torch.testing.assert_close(found.residuals[own + number], half, rtol=1e-4, atol=1e-5)
    assert {key: goal.shape for key, goal in result.goals.items()} == {
        key: goal.shape for key, goal in before.goals.items()
    }
    for key, goal in result.goals.items():  # the way to them begins at the unedited states in both
        torch.testing.assert_close(goal, before.goals[key], rtol=1e-4, atol=1e-5)


def test_each_token_of_a_target_has_its_vector(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], given: list[int]
) -> None:
    facts = [replace(facts[0], target_new="northern Peru and Spain"), *facts[1:]]
    found, result = edit(model, tokenizer, facts, phrasings=2, target_tokens="every")
    vectors = result.targets.deltas[result.targets.edit == 0]
    assert len(vectors) > 1
    start = sum(len(goal) for goal in result.goals.values())
    for prompt in range(2):
        rows = slice(start + prompt * len(vectors), start + (prompt + 1) * len(vectors))
        # as above; two contexts and two further prompts
        torch.testing.assert_close(found.residuals[rows], 0.5**0.5 * vectors / 2, rtol=1e-4, atol=1e-5)


def test_facts_with_known_goals_and_the_memory_have_none(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], given: list[int]
) -> None:
    memory = EditMemory()
    _, result = edit(model, tokenizer, facts, phrasings=2, memory=memory)
    assert len(held(memory).row.unique()) == len(facts) * len(CONTEXTS)
    again, _ = edit(model, tokenizer, facts, phrasings=2, goals={**result.goals, facts[3].key: None})
    assert given == [4, 0] and len(again.residuals) == len(facts) * len(CONTEXTS)


def _on_a_rank() -> tuple[list[torch.Tensor], list[list[str]]]:
    from tests.sharding.small_edits import FACTS, TEXTS, editor, tokenizer
    from tests.sharding.small_edits import model as small

    whole, words = small(), tokenizer()
    (token,) = words(" bread", add_special_tokens=False)["input_ids"]
    asked = [replace(fact, target_true="bread") for fact in FACTS]
    forced = whole.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor(token), 9.0)
    )
    found = further_prompts(whole, words, asked, 1, "last", ranks=Ranks())
    forced.remove()
    with mock.patch("lit_moeedit.editing.editor.further_prompts", lambda *args: found):
        editor(token="last", phrasings=1).edit(whole, words, asked, TEXTS, ranks=Ranks())
    return [*edited_weights(whole).values()], found


@pytest.mark.slow
def test_two_processes_find_and_edit_the_same() -> None:
    (first, found), (second, other) = run_ranks(_on_a_rank, 2)
    alone, whole = _on_a_rank()
    assert found == other == whole and all(whole)
    for mine, theirs, one in zip(first, second, alone, strict=True):
        assert torch.equal(mine, theirs)
        # prompts in other batches, then Adam, whose first steps are of the size of the learning rate
        torch.testing.assert_close(mine, one, rtol=1e-3, atol=1e-3)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="phrasings must be at least 0, got -1"):
        Editor([0], phrasings=-1)
