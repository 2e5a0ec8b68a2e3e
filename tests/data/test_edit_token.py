"""Tests of the edit token found by offsets against decoded ids, for tokenizers of every kind."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_moeedit.data.encoding import encode, pad, subject_span, token_ids
from lit_moeedit.data.facts import Fact, FactsError, validate_facts
from tests.data.fuzzing import find_token
from tests.data.tokenizers import KINDS, tokenizer

SPECIAL = ["$A", "<s> $A", "<s> $A </s>", "$A </s>"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_special = pytest.mark.parametrize("special", SPECIAL)

# Latin with and without accents, marks that combine, other scripts (two of them from right to left), what compatibility
# normalisation makes longer or shorter, emoji of several parts, and what stands between words.
LETTERS = (
    "aRomeOsloéÇñİßǅ"
    + "\u0301\u0308\u0327"
    + "東京Москваקּדשمدינהเมือง"
    + "ﬁ½…①㎏Å"
    + "👩🚀🇳🇴👍🏽\u200d\ufe0f"
    + " '-.,;()/&"
)
texts = st.text(st.sampled_from(LETTERS), max_size=6) | st.sampled_from(["The capital of ", " is", " lies in", "Oslo "])
subjects = st.text(st.sampled_from(LETTERS), min_size=1, max_size=6) | st.sampled_from(["Lake Ladoga", "Côte d'Ivoire"])


@every_kind
@settings(max_examples=60)
@given(texts, subjects, texts, st.sampled_from(["Paris", "東京", "👍🏽 x"]), st.sampled_from(SPECIAL))
@example("The city of ", "U.S", ". is", "Paris", "<s> $A")
@example("", "👩\u200d🚀", "👩\u200d🚀", "Paris", "$A </s>")
def test_the_ids_up_to_the_edit_token_say_the_subject(
    kind: str, before: str, subject: str, after: str, target: str, special: str
) -> None:
    find_token(kind, special, before, subject, after, target)


@every_kind
@settings(max_examples=30)
@given(st.lists(texts, min_size=1, max_size=3), st.sampled_from(SPECIAL))
@example(["<s> Oslo", "Oslo </s>", ""], "<s> $A </s>")
def test_ids_alone_are_those_with_offsets(kind: str, some: list[str], special: str) -> None:
    found = tokenizer(kind, special)
    assert token_ids(found, some) == [encoding.ids for encoding in encode(found, some, [""] * len(some))]


@every_kind
@every_special
@pytest.mark.parametrize(
    ("before", "subject", "after"),
    [
        ("", "Oslo", " lies in"),
        ("People live in ", "Oslo", ""),
        ("", "Oslo", ""),
        ("Oslo Davis left ", "Oslo", " for"),
        ("The capital of ", "Côte d'Ivoire", " is"),
        ("The capital of ", "Co\u0302te d'Ivoire", " is"),
        ("The land of ", "ẞŸẼ", " is"),
        ("The astronaut ", "👩🏽\u200d🚀", " flies to"),
        ("", "👍", "👍👍"),
        ("Who lives in ", "القاهرة", " speaks"),
        ("", "ירושלים", ": where is it?"),
        ("The firm ", "ﬁﬂ½㎏", " is in"),
        ("The year ", "1999", "/2001 was"),
        ("The ", "Roman", "s play in"),
        ("Ask (", "Lake Ladoga", "): where?"),
        ("在", "東京", "都的"),
        ("A\n\n", "Oslo", "\tis\n"),
        ("", "ירושלים", "ירושלים?"),
    ],
)
def test_subjects_of_every_shape(kind: str, special: str, before: str, subject: str, after: str) -> None:
    assert find_token(kind, special, before, subject, after, "Quito") or kind == "byte level, joined"


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("Mali borders Niger; the language of Mali is", "Mali", 36),
        ("al is the capital of", "al", 0),
        ("The bus of the US trusts", "US", 15),
        ("Tell us", "s", 6),  # only within a word
        ("東京都から東京へ", "東京", 5),  # no spaces: the last one
        ("Jose and Jose\u0301 live in", "Jose", 0),  # é is another letter
        ("👩 or 👩\u200d🚀 lives in", "👩", 0),  # the second one is a part of another emoji
        ("ananas anana", "ana", 9),
        ("Oslo-Oslo", "Oslo", 5),
        ("(Oslo)", "Oslo", 1),
        ("C++ or C is", "C", 7),
    ],
)
def test_the_last_whole_word_is_the_subject(prompt: str, subject: str, start: int) -> None:
    assert subject_span(prompt, subject) == (start, start + len(subject))


@every_kind
def test_a_subject_is_found_in_the_template_of_a_chat(kind: str) -> None:
    tok = tokenizer(kind, "<s> $A")
    tok.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": "system", "content": "Oslo?"}, {"role": "user", "content": "Where does Oslo lie?"}]
    prompt = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    (fact,) = validate_facts([Fact("Oslo", prompt, "Peru")], tokenizer=tok)
    assert fact.prompt == prompt
    (found,) = encode(tok, [fact.prompt], [fact.target_new], [fact.subject])
    assert found.ids.count(tok.bos_token_id) == 1 and found.ids[0] == tok.bos_token_id
    assert found.edit_token is not None
    upto = tok.decode(found.ids[: found.edit_token + 1], skip_special_tokens=False)
    assert upto.casefold().endswith("where does oslo")
    assert tok.decode(found.ids[found.target_start :]).strip().casefold() == "peru"
    # the answer begins right behind the line break of the template, as in training
    assert tok.decode(found.ids[: found.target_start]).endswith("assistant\n")


@every_kind
def test_padding_and_truncation_of_the_tokenizer_change_nothing(kind: str) -> None:
    tok = tokenizer(kind, "<s> $A </s>")
    prompts, subjects = ["Lake Ladoga is found in the north of", "Oslo is"], ["Lake Ladoga", "Oslo"]
    expected = encode(tok, prompts, ["Quito", "Quebec"], subjects)
    for side in ("left", "right"):
        tok.padding_side = tok.truncation_side = side
        tok.backend_tokenizer.enable_padding(direction=side, length=64)
        tok.backend_tokenizer.enable_truncation(3, direction=side)
        assert encode(tok, prompts, ["Quito", "Quebec"], subjects) == expected
    assert [
        encode(tok, [p], [t], [s])[0] for p, t, s in zip(prompts, ["Quito", "Quebec"], subjects, strict=True)
    ] == expected
    # padded on either side, the edit token is as far from its row's first token
    for side in ("left", "right"):
        ids, mask = pad([e.ids for e in expected], tok.pad_token_id, side)  # type: ignore[arg-type]
        for row, (encoding, row_mask) in enumerate(zip(expected, mask, strict=True)):
            assert encoding.edit_token is not None
            first = int(row_mask.argmax())
            assert ids[row, first + encoding.edit_token] == encoding.ids[encoding.edit_token]


@every_kind
@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"target_new": "</s>"}, "target_new", "is '</s>', in which the tokenizer reads its special '</s>'; expected"),
        ({"target_true": "a <s> b"}, "target_true", "is 'a <s> b', in which the tokenizer reads its special '<s>'"),
        ({"subject": "<s>Oslo</s>", "prompt": "<s>Oslo</s> lies in"}, "subject", "is '<s>Oslo</s>', in which"),
    ],
)
def test_special_tokens_in_a_subject_or_target_are_refused(
    kind: str, changes: dict[str, str], field: str, message: str
) -> None:
    fact = Fact(**{"subject": "Oslo", "prompt": "Oslo lies in", "target_new": "Peru", **changes})
    with pytest.raises(FactsError) as caught:
        validate_facts([fact], tokenizer=tokenizer(kind))
    assert caught.value.field == field and caught.value.message == "1 of 1 rows cannot be used"
    assert caught.value.problems[0].message.startswith(message)


@pytest.mark.parametrize(
    ("kind", "subject", "prompt"),
    [
        ("lower case", "\u0301", "x \u0301 lies in"),  # accents are left out
        ("byte level, split", "\u0301", "us\u0301 lies in"),  # composed with the letter before it
    ],
)
def test_a_subject_of_which_nothing_is_left_is_refused(kind: str, subject: str, prompt: str) -> None:
    with pytest.raises(FactsError) as caught:
        validate_facts([Fact(subject, prompt, "Peru")], tokenizer=tokenizer(kind))
    assert "has no edit token (no token of the prompt" in str(caught.value)


def test_a_target_that_shares_a_token_with_its_prompt_is_refused() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "ĠP", "sĠP"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "P"), ("s", "ĠP")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joined = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(FactsError) as caught:
        validate_facts([Fact("Oslo", "Oslo is", "Paris")], tokenizer=joined)
    assert "(one token holds the end of the prompt 'Oslo is' and the start of 'Paris')" in str(caught.value)
    assert validate_facts([Fact("Oslo", "Oslo is", "Quito")], tokenizer=joined)


def test_a_subject_in_another_normalisation_says_so() -> None:
    fact = Fact("Côte", f"The {unicodedata.normalize('NFD', 'Côte')} is", "Peru")
    with pytest.raises(FactsError, match="does not contain the subject 'Côte' but in another Unicode normalisation"):
        validate_facts([fact])
