"""Statements of facts."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from lit_moeedit.data import Fact
from lit_moeedit.replay import Statements, statements
from tests.data import tokenizers

FACTS = [
    Fact("France", "The capital of France is", "Oslo", "Paris", ("France is governed from", "In France rules")),
    Fact("Norway", "The capital of Norway is", "Paris"),
]


@pytest.fixture(params=["byte level", "metaspace", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizers.tokenizer(request.param)


def test_prompts_behind_contexts_with_the_new_target(tokenizer: Any) -> None:
    own = Statements(tokenizer, ("", "People speak."), 1, FACTS)
    assert list(own) == [fact.key for fact in FACTS] and len(own) == 2
    assert [len(own[fact.key]) for fact in FACTS] == [4, 2]
    texts = [tokenizer.decode(row.ids, skip_special_tokens=True).strip() for row in own[FACTS[0].key]]
    assert texts[1] == "People speak. The capital of France is Oslo"
    assert texts[2] == "France is governed from Oslo"
    for row in own[FACTS[0].key]:
        assert tokenizer.decode(row.ids[row.target_start :]).strip() == "Oslo"
    assert own.longest == max(len(row.ids) for rows in own.values() for row in rows)


def test_known_facts_are_not_tokenized_again(tokenizer: Any) -> None:
    own = Statements(tokenizer, facts=FACTS[:1])
    with mock.patch.object(statements, "encode", wraps=statements.encode) as encode:
        other = own.of(FACTS)
    assert encode.call_args.args[1] == [FACTS[1].prompt]
    assert dict(other) == dict(Statements(tokenizer, facts=FACTS)) and list(own) == [FACTS[0].key]
    assert len(own.of([])) == 0 and own.of([]).longest == 0


def test_the_later_fact_of_two_with_a_prompt_is_stated(tokenizer: Any) -> None:
    later = Fact("France", FACTS[0].prompt, "Japan")
    assert list(Statements(tokenizer, facts=[*FACTS, later])) == [later.key, FACTS[1].key]


def test_numbers(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="paraphrases must be at least 0, got -1"):
        Statements(tokenizer, paraphrases=-1)
    with pytest.raises(ValueError, match="contexts needs at least one text"):
        Statements(tokenizer, ())
