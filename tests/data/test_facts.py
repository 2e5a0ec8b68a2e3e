"""Tests of facts made in memory: checks, keys, errors, and their JSON form."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.data.facts import (
    CheckedFacts,
    Checker,
    Fact,
    FactError,
    FactsError,
    Neighbour,
    Probe,
    read_facts,
    validate_facts,
)
from lit_moeedit.data.probes import PROBE_KINDS

neighbours = st.builds(Neighbour, st.text(), st.text(), st.text())
any_fact = st.builds(
    Fact,
    subject=st.text(),
    prompt=st.text(),
    target_new=st.text(),
    target_true=st.none() | st.text(),
    paraphrases=st.lists(st.text(), max_size=3).map(tuple),
    neighbours=st.lists(neighbours, max_size=3).map(tuple),
    probes=st.lists(
        st.builds(
            Probe, st.sampled_from(PROBE_KINDS), st.text(), st.lists(st.text(), min_size=1, max_size=3).map(tuple)
        ),
        max_size=2,
    ).map(tuple),
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


FACTS = [
    Fact("Rome", "Rome lies in", "Spain"),
    Fact("Oslo", "Oslo lies in", "Peru"),
    Fact("Lima", "Lima is in", "Asia"),
]


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [*range(len(text.split()))]}


def other_tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    """Return no token for "Peru"."""
    return {"input_ids": [] if text == " Peru" else [1]}


def test_facts_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([fact.to_dict() for fact in FACTS]), encoding="utf-8")
    read = read_facts(path, tokenizer=tokenizer)
    validated = validate_facts(FACTS, tokenizer=tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(Checker, "check", lambda *_: pytest.fail("checked again"))
        for facts in (read, validated):
            for kept in (facts, facts[1:], facts[::2], facts.select(lambda fact: fact.subject != "Rome")):
                assert kept
                assert isinstance(kept, CheckedFacts)
                assert validate_facts(kept, tokenizer=tokenizer) is kept
                assert validate_facts(kept) is kept
    assert read == validated == FACTS


def test_facts_are_checked_again_with_another_tokenizer_or_after_a_change() -> None:
    facts = validate_facts(FACTS)
    assert validate_facts(facts, tokenizer=tokenizer) is not facts
    for checked in (facts, validate_facts(facts, tokenizer=tokenizer)):
        with pytest.raises(
            FactsError, match="row 2, field 'target_new': is 'Peru', for which the tokenizer returns no token"
        ):
            validate_facts(checked, tokenizer=other_tokenizer)
    bad = Fact("Rome", "Oslo lies in", "Spain")
    for changed in ([*facts, bad], facts + tuple(FACTS)):
        assert not isinstance(changed, CheckedFacts)
        with pytest.raises(FactsError):
            validate_facts(changed)
    with pytest.raises(FactError, match="facts: holds no facts"):
        validate_facts(facts.select(lambda _: False))


def test_checked_facts_are_used_like_a_list() -> None:
    facts = validate_facts(FACTS, tokenizer=tokenizer)
    assert facts == FACTS
    assert facts == FACTS
    assert facts == tuple(FACTS)
    assert facts != FACTS[:2]
    assert not facts == FACTS[:2]  # noqa: SIM201 - another operator
    assert facts[0] == facts[-3] == FACTS[0]
    assert (len(facts), FACTS[1] in facts, facts.index(FACTS[2])) == (3, True, 2)
    assert hash(facts) == hash(tuple(FACTS))
    for copied in (pickle.loads(pickle.dumps(facts)), copy.copy(facts), copy.deepcopy(facts)):
        assert type(copied) is list
        assert copied == FACTS


def test_wrong_types_in_memory_are_refused() -> None:
    fact = Fact("Rome", "Rome lies in", {}, paraphrases="one")  # type: ignore[arg-type]
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
    assert fact.prompt_key == Fact("other", fact.prompt, "Peru").prompt_key == "9572d37d7086e534"
    assert fact.prompt_key != Fact("Rome", "Rome is", "Spain").prompt_key
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
