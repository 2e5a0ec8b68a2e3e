"""Further neutral prompts of a fact: which ones are taken, and what they do to the search for its target vector."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Editor, TargetOptimizer, evaluate
from lit_moeedit.editing.evaluation import Scores, score
from lit_moeedit.editing.locating.trials import Trials
from lit_moeedit.editing.phrasings import candidate_prompts, further_prompts, neutral_prompts
from lit_moeedit.editing.place import Place
from lit_moeedit.editing.target_rows import TargetRow
from lit_moeedit.sharding.ranks import Ranks
from tests.editing.recording import edited_weights
from tests.editing.test_targets import STEPS, norms, plain_logits, plain_target
from tests.processes import run_ranks


class Searching(TargetOptimizer):
    """A search of a few steps that keeps the rows it was given."""

    def __init__(self, steps: int = 2, **settings: Any) -> None:
        super().__init__(steps, stop=0.0, **settings)
        self.rows: list[TargetRow] = []

    def optimize(self, model: Any, layer: Any, rows: Sequence[TargetRow], *args: Any, **kwargs: Any) -> Any:
        self.rows[:] = rows
        return super().optimize(model, layer, rows, *args, **kwargs)


def editor(targets: TargetOptimizer, **changes: Any) -> Editor:
    return Editor([0, 1], targets=targets, preserve="none", ridge=0.1, contexts=("", "Note:"), **changes)


def texts_of(tokenizer: Any, rows: Sequence[TargetRow]) -> dict[int, list[str]]:
    """The neutral prompts of each edit, in their order."""
    found: dict[int, list[str]] = {}
    for row in rows:
        if row.is_neutral:
            found.setdefault(row.edit, []).append(tokenizer.decode(row.encoding.ids, skip_special_tokens=True).strip())
    return found


def answering(model: PreTrainedModel, tokenizer: Any, text: str) -> Any:
    """Let the model give one answer to everything."""
    (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor(token), 99.0)
    )


def knowing(facts: Sequence[Fact]) -> Any:
    """Let a random model pass for one that gives the truth to the prompts of facts, and to nothing else."""
    prompts = {fact.prompt for fact in facts}

    def scored(model: Any, tokenizer: Any, texts: Sequence[str], *args: Any) -> Scores:
        found = score(model, tokenizer, texts, *args)
        own = torch.tensor([text in prompts for text in texts], dtype=torch.bool)
        return replace(found, exact=found.exact | own)

    return mock.patch("lit_moeedit.editing.phrasings.score", scored)


@pytest.fixture
def known(facts: list[Fact]) -> list[Fact]:
    """The facts with a truth each; the last one has none."""
    return [
        replace(fact, target_true=truth) for fact, truth in zip(facts, ("bread", "Russia", "bread", None), strict=True)
    ]


@pytest.fixture
def knows(known: list[Fact]) -> Iterator[None]:
    with knowing(known):
        yield


def test_they_are_what_the_model_answers_otherwise(model: PreTrainedModel, tokenizer: Any, known: list[Fact]) -> None:
    with knowing(known):
        found = neutral_prompts(model, tokenizer, known, 2)
        assert [len(own) for own in found] == [2, 2, 2, 0]
    for index, fact in enumerate(known[:3]):
        # of all candidates, one after another, those that make the truth least likely
        alone = []
        for text in candidate_prompts(known, 8)[index]:
            probe = Fact(fact.subject, text, str(fact.target_true), fact.target_true)
            alone.append((float(evaluate(model, tokenizer, [probe]).log_new), text))
        assert len(alone) > 2
        assert found[index] == [text for _, text in sorted(alone)[:2]]
    # where the model gives another answer to the fact's own prompt, or the truth to all, nothing can be told
    assert neutral_prompts(model, tokenizer, known, 2) == [[], [], [], []]
    forced = answering(model, tokenizer, " bread")
    assert neutral_prompts(model, tokenizer, known, 2) == [[], [], [], []]
    assert [len(own) for own in further_prompts(model, tokenizer, known, 2)] == [2, 0, 2, 0]
    forced.remove()


@pytest.mark.usefixtures("knows")
def test_the_search_gets_those_of_the_facts_that_it_searches_for(
    model: PreTrainedModel, tokenizer: Any, known: list[Fact]
) -> None:
    targets = Searching()
    result = editor(targets, neutral_prompts=2).edit(copy.deepcopy(model), tokenizer, known)
    expected = neutral_prompts(model, tokenizer, known, 2, measured=known)
    assert texts_of(tokenizer, targets.rows) == {
        number: [f"{fact.subject} is a", *own] for number, (fact, own) in enumerate(zip(known, expected, strict=True))
    }
    for row in targets.rows:  # where the fact itself is edited
        ids, place = row.encoding.ids, row.encoding.edit_token
        assert place is not None and known[row.edit].subject.endswith(tokenizer.decode(ids[place]).strip())
    assert [row.edit for row in targets.rows] == sorted(row.edit for row in targets.rows)
    # without the prompt of the setting `neutral`, and where a fact has a known goal
    own = editor(targets, neutral="", neutral_prompts=1)
    own.edit(copy.deepcopy(model), tokenizer, known, goals={known[0].key: result.goals[known[0].key]})
    left = neutral_prompts(model, tokenizer, known[1:], 1, measured=known)
    assert texts_of(tokenizer, targets.rows) == {1: left[0], 2: left[1]}


def test_what_measures_a_fact_is_none(
    model: PreTrainedModel, tokenizer: Any, known: list[Fact], asked: list[str]
) -> None:
    def edit(facts: Sequence[Fact], **settings: Any) -> None:
        asked.clear()
        editor(Searching(), neutral_prompts=2).edit(copy.deepcopy(model), tokenizer, facts, **settings)

    edit(known)
    text = next(text for text in asked if known[0].subject in text and text != known[0].prompt)
    # of another edit, or of a fact with a known goal
    other = replace(known[3], paraphrases=(text,))
    for facts, settings in ((known, {"measured": [other]}), ([*known[:3], other], {"goals": {other.key: None}})):
        edit(facts, **settings)
        assert asked and text not in asked


def test_a_subject_is_put_in_the_place_of_a_whole_one() -> None:
    asked = [Fact("al", "al is the capital of", "Peru"), Fact("Rome", "Rome, unlike Oslo, is in", "Spain")]
    _, rome, oslo = candidate_prompts([*asked, Fact("Oslo", "Oslo lies in", "Peru")], 3)
    assert sorted(rome) == ["Rome is the capital of", "Rome lies in"]
    assert oslo == ["Oslo is the capital of"]  # not “Oslo, unlike Oslo”


@pytest.mark.usefixtures("knows")
def test_the_prompt_of_the_setting_is_none_of_the_further_ones(
    model: PreTrainedModel, tokenizer: Any, known: list[Fact]
) -> None:
    targets = Searching()
    own = editor(targets, neutral="{} is found in", neutral_prompts=3)
    own.edit(copy.deepcopy(model), tokenizer, known)
    texts = texts_of(tokenizer, targets.rows)
    assert "Rome is found in" in neutral_prompts(model, tokenizer, known, 3)[0]
    assert texts[0].count("Rome is found in") == 1 and len(texts[0]) == 3


@pytest.mark.usefixtures("knows")
def test_the_vectors_are_those_of_a_plain_search(
    model: PreTrainedModel, tokenizer: Any, plain_hidden: Any, known: list[Fact]
) -> None:
    targets = Searching(steps=5, kl=5.0)
    result = editor(targets, neutral_prompts=2).edit(copy.deepcopy(model), tokenizer, known)
    plain = editor(Searching(steps=5, kl=5.0)).edit(copy.deepcopy(model), tokenizer, known)
    model.eval().requires_grad_(False)
    for number, norm in enumerate(norms(model, plain_hidden, 1, targets.rows).tolist()):
        own = [row for row in targets.rows if row.edit == number]
        delta, nll, _ = plain_target(model, 1, own, targets, norm)
        torch.testing.assert_close(result.targets.deltas[number], delta, **STEPS)
        assert float(result.targets.nll[number]) == pytest.approx(nll, rel=1e-3)
        # with others they are others, by more than the tolerance
        differs = not torch.allclose(result.targets.deltas[number], plain.targets.deltas[number], rtol=1e-2, atol=1e-2)
        assert differs == (known[number].target_true is not None)


@pytest.mark.usefixtures("knows")
def test_other_answers_about_the_subject_change_less(model: PreTrainedModel, tokenizer: Any, known: list[Fact]) -> None:
    settings = {"steps": 12, "kl": 10.0, "learning_rate": 0.3}
    searches, vectors = [], []
    for count in (2, 0):
        searches.append(Searching(**settings))
        own = editor(searches[-1], neutral_prompts=count)
        vectors.append(own.edit(copy.deepcopy(model), tokenizer, known).targets.deltas)
    model.eval().requires_grad_(False)

    def divergence(row: TargetRow, delta: Tensor) -> float:
        before, now = (plain_logits(model, 1, row, d)[-1].log_softmax(-1) for d in (torch.zeros_like(delta), delta))
        return float(F.kl_div(now, before, log_target=True, reduction="sum"))

    for number in range(3):
        rows = [row for row in searches[0].rows if row.is_neutral and row.edit == number][1:]
        assert len(rows) == 2
        held, free = (sum(divergence(row, found[number]) for row in rows) for found in vectors)
        assert held < 0.75 * free  # a random model hardly reads its subjects, so that there is little to hold


@pytest.mark.usefixtures("knows")
def test_trials_of_places_search_with_them(model: PreTrainedModel, tokenizer: Any, known: list[Fact]) -> None:
    targets = Searching()
    own = editor(targets, neutral_prompts=1)
    trials = Trials(model, tokenizer, known, [], own, 64, (), None, Ranks.current(), lambda *args: None)
    found = neutral_prompts(model, tokenizer, known, 1)
    with mock.patch("lit_moeedit.editing.editor.neutral_prompts", wraps=neutral_prompts) as asked:
        trials.run([Place((0, 1), "subject_last"), Place((1,), "subject_last")])
    assert asked.call_count == 1  # with the search that both share, and not with each edit
    assert [texts[1:] for texts in texts_of(tokenizer, targets.rows).values()] == found and found[0]


def _on_a_rank() -> list[Tensor]:
    from tests.sharding.small_edits import FACTS, TEXTS, tokenizer
    from tests.sharding.small_edits import editor as small_editor
    from tests.sharding.small_edits import model as small

    whole, words = small(), tokenizer()
    asked = [replace(fact, target_true="bread") for fact in FACTS]
    with knowing(asked):
        assert all(neutral_prompts(whole, words, asked, 2, ranks=Ranks()))
        small_editor(neutral_prompts=2).edit(whole, words, asked, TEXTS, ranks=Ranks())
    return [*edited_weights(whole).values()]


@pytest.mark.slow
def test_two_processes_edit_as_one() -> None:
    first, second = run_ranks(_on_a_rank, 2)
    for mine, theirs, alone in zip(first, second, _on_a_rank(), strict=True):
        assert torch.equal(mine, theirs)
        # prompts in other batches, then Adam, whose first steps are of the size of the learning rate
        torch.testing.assert_close(mine, alone, rtol=1e-3, atol=1e-3)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="neutral_prompts must be at least 0, got -1"):
        Editor([0], neutral_prompts=-1)
