"""Tests of long texts, whose tokens that are used do not change by a cut, and of facts beyond the context window."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lit_moeedit.data.encoding import token_ids
from lit_moeedit.data.facts import Fact, Neighbour
from lit_moeedit.data.lengths import CHARACTERS, MARGIN, beginning, cut_texts, remark_long_facts
from tests.data.tokenizers import KINDS, TEXTS, tokenizer

TOKENS = 40
draw = random.Random(0)
LONG = {
    "prose": " ".join(draw.choice(TEXTS) for _ in range(100)),
    "no spaces": "".join(draw.choice("abcdefgh") for _ in range(5000)),
    "one letter": "a" * 5000,
    "letters of several bytes": "東京Москва" * 500,
    "white space": "Oslo" + " \n" * 3000 + "Rome " * 500,
    "accents": "é" * 3000,
    "marks": "e\u0301\u0302" * 2000,
}


@pytest.mark.parametrize("special", ["$A", "<s> $A </s>"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LONG)
def test_the_tokens_that_are_used_stay(kind: str, special: str, name: str) -> None:
    found, text = tokenizer(kind, special), LONG[name]
    cut = beginning(found, text, TOKENS)
    assert text.startswith(cut)
    whole = token_ids(found, [text])[0]
    assert token_ids(found, [cut])[0][:TOKENS] == whole[:TOKENS]
    assert cut == text or len(token_ids(found, [cut])[0]) >= TOKENS + MARGIN
    assert beginning(found, cut, TOKENS) == cut


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_texts_that_are_not_too_long_are_not_touched(tokens: int) -> None:
    class Refusing:
        def __call__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("tokenized")

    text = "a" * (CHARACTERS * tokens)
    assert beginning(Refusing(), text, tokens) is text  # type: ignore[arg-type]


def test_a_huge_line_is_never_tokenized_whole(caplog: pytest.LogCaptureFixture) -> None:
    lengths: list[int] = []
    found = tokenizer("byte level")

    class Watched:
        bos_token_id = None

        def __call__(self, texts: list[str], **options: Any) -> Any:
            lengths.extend(map(len, texts))
            return found(texts, **options)

    huge = LONG["prose"] * 1600
    assert len(huge) > 10 * 2**20
    short, *cut = cut_texts(Watched(), ["Oslo", huge, huge], TOKENS)  # type: ignore[arg-type]
    assert short == "Oslo" and cut[0] == cut[1]
    assert max(lengths) <= 4 * CHARACTERS * TOKENS
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"2 of 3 texts are cut before they are tokenized (the longest has {len(huge):,}"
    )
    assert cut_texts(Watched(), [short, *cut], TOKENS) == [short, *cut]  # type: ignore[arg-type]
    assert len(caplog.records) == 1


LONG_PROMPT = "Rome " * 60 + "lies in"


@pytest.mark.parametrize(
    "fact",
    [
        Fact("Rome", LONG_PROMPT, "Spain"),
        Fact("Rome", "Rome lies in", "Spain " * 60),
        Fact("Rome", "Rome lies in", "Spain", None, (LONG_PROMPT,)),
        Fact("Rome", "Rome lies in", "Spain", None, (), (Neighbour(LONG_PROMPT, "Italy"),)),
    ],
)
def test_facts_beyond_the_window_are_remarked(fact: Fact, caplog: pytest.LogCaptureFixture) -> None:
    found = tokenizer("byte level, split")
    texts = [f"{fact.prompt} {fact.target_new}", *(f"{text} {fact.target_new}" for text in fact.paraphrases)]
    texts += [f"{neighbour.prompt} {neighbour.target}" for neighbour in fact.neighbours]
    longest = max(map(len, token_ids(found, texts)))
    other = Fact("Oslo", "Oslo lies in", "Peru")
    remark_long_facts(found, [other, fact], longest)
    remark_long_facts(found, [other, fact], None)
    assert not caplog.records
    remark_long_facts(found, [other, fact], longest - 1)
    (record,) = caplog.records
    expected = (
        f"1 of 2 facts have texts beyond the {longest - 1} tokens of the model's context window (up to {longest})"
    )
    assert record.getMessage().startswith(expected)


def test_contexts_count(caplog: pytest.LogCaptureFixture) -> None:
    found, fact = tokenizer("byte level"), Fact("Rome", "Rome lies in", "Spain")
    window = len(token_ids(found, ["Rome lies in Spain"])[0])
    remark_long_facts(found, [fact], window, ["", "As they say:"])
    assert len(caplog.records) == 1
