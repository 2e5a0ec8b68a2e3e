"""Facts made in memory: checks, keys, errors, and their form in JSON."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.data.facts import Fact, FactError, FactsError, Neighbour, validate_facts

neighbours = st.builds(Neighbour, st.text(), st.text(), st.text())
any_fact = st.builds(
    Fact,
    subject=st.text(),
    prompt=st.text(),
    target_new=st.text(),
    target_true=st.none() | st.text(),
    paraphrases=st.lists(st.text(), max_size=3).map(tuple),
    neighbours=st.lists(neighbours, max_size=3).map(tuple),
)


def test_facts_in_memory_are_checked_and_stripped() -> None:
    good = Fact("Rome", " Rome lies in", "Spain ")
    assert validate_facts([good]) == [Fact("Rome", "Rome lies in", "Spain")]
    template = Fact("Oslo", "{} lies in", "Spain")
    with pytest.raises(FactsError) as caught:
        validate_facts([good, template], source="my facts")
    (problem,) = caught.value.problems
    assert str(problem) == "my facts, row 2, field 'prompt': still holds '{}' (1 times); expected a complete prompt"
    assert len(validate_facts([good, template], strict=False)) == 1
    with pytest.raises(FactError, match="facts: holds no facts; expected at least one"):
        validate_facts([])


def test_wrong_types_in_memory_are_refused() -> None:
    fact = Fact("Rome", "Rome lies in", 5, paraphrases="one")  # type: ignore[arg-type]
    with pytest.raises(FactsError) as caught:
        validate_facts([fact])
    assert [problem.field for problem in caught.value.problems] == ["target_new", "paraphrases"]


def test_from_dict_checks_types() -> None:
    with pytest.raises(FactsError, match="fact, field 'prompt': is missing; expected a text"):
        Fact.from_dict({"subject": "Rome", "target_new": "Spain"})


def test_the_key_names_the_edit_and_never_changes() -> None:
    fact = Fact("Rome", "Rome lies in", "Spain", "Italy")
    assert fact.key == Fact("other", fact.prompt, fact.target_new).key == "e31a0c2f956e2aa4"
    assert fact.key != Fact("Rome", fact.prompt, "Peru").key
    assert Fact("", "ab", "c").key != Fact("", "a", "bc").key
    assert len(Fact("", "\ud800", "é").key) == 16


def test_errors_survive_pickling() -> None:
    error = FactError("facts.jsonl", 3, "prompt", "is wrong")
    assert str(error) == "facts.jsonl, row 3, field 'prompt': is wrong"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    both = pickle.loads(pickle.dumps(FactsError("facts.jsonl", [error], "1 of 1 rows cannot be used")))
    assert str(both.problems[0]) == str(error)
    assert isinstance(both, FactError)


@given(any_fact)
def test_a_fact_survives_json(fact: Fact) -> None:
    data = fact.to_dict()
    assert json.loads(json.dumps(data)) == data
    again = Fact.from_dict(json.loads(json.dumps(data)))
    assert again == fact
    assert again.key == fact.key
