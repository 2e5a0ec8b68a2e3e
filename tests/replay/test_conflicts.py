"""Rows of token ids that contradict an edit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.data import Fact
from lit_moeedit.data.conflicts import ConflictFinder
from lit_moeedit.replay.conflicts import documents, old_answer_tokens, text_with_offsets, texts_of
from tests.data.tokenizers import KINDS, tokenizer

every_kind = pytest.mark.parametrize("kind", KINDS)
FRANCE = Fact("France", "The capital of France is", "Lyon", "Paris")
JAPAN = Fact("Japan", "The capital of Japan is", "Oslo", "東京")


@every_kind
@pytest.mark.parametrize("special", ["$A", "<s> $A </s>"])
@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (FRANCE, "The capital of France is Paris."),
        (FRANCE, "Paris, Paris! 東京 Москва e\u0301 🇫🇷 (France's)"),
        (JAPAN, "In Japan they love 東京, more than 東 or 京."),
        (JAPAN, "Japan:京東京京"),
        (Fact("Norway", "p", "x", "Côte d'Ivoire"), "Norway is Côte d\u2019Ivoire, not Cote d'Ivoire; côte d'ivoire"),
    ],
)
def test_tokens_of_the_old_answer(kind: str, special: str, fact: Fact, text: str) -> None:
    """Together they decode to the old answer; none without its letters is among them."""
    model = tokenizer(kind, special)
    ids = model(text)["input_ids"]
    decoded, offsets = text_with_offsets(model, ids)
    assert decoded == texts_of(model, [ids])[0]
    ((conflict, places),) = old_answer_tokens(model, ids, ConflictFinder([fact]))
    assert conflict.text == decoded and places == sorted(set(places))
    for a, b in conflict.spans:
        mine = [i for i in places if offsets[i][0] < b and offsets[i][1] > a]
        assert mine == list(range(mine[0], mine[-1] + 1))
        # whole, and no token more than it takes
        assert decoded[a:b].strip() in texts_of(model, [ids[mine[0] : mine[-1] + 1]])[0]
        for fewer in (ids[mine[0] + 1 : mine[-1] + 1], ids[mine[0] : mine[-1]]):
            assert decoded[a:b] not in texts_of(model, [fewer])[0]
    others = [i for i in range(len(ids)) if i not in places]
    assert not any(offsets[i][0] < b and offsets[i][1] > a for i in others for a, b in conflict.spans)


def test_a_place_is_a_row_of_its_tokens() -> None:
    model = tokenizer("byte level, split", "<s> $A </s>")
    ids = model("France: 東京, Paris")["input_ids"]
    ((_, places),) = old_answer_tokens(model, ids, ConflictFinder([FRANCE]))
    assert model.decode([ids[i] for i in places]) == " Paris"
    ((_, places),) = old_answer_tokens(model, ids, ConflictFinder([Fact("France", "p", "x", "東")]))
    assert places[-1] < len(ids) - 2


@every_kind
@settings(max_examples=15, deadline=None)
@given(st.text(st.sampled_from("aé Paris東京🇫🇷\u0301\n.Ж\u2019½"), max_size=24))
def test_offsets_are_those_of_the_whole_text(kind: str, text: str) -> None:
    model = tokenizer(kind)
    ids = model(text)["input_ids"]
    decoded, offsets = text_with_offsets(model, ids)
    assert decoded == texts_of(model, [ids])[0]
    assert len(offsets) == len(ids) and offsets == sorted(offsets)
    # every character has a token, and tokens that share one share all of theirs
    assert [i for a, b in dict.fromkeys(offsets) for i in range(a, b)] == list(range(len(decoded)))


@every_kind
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_ids_have_offsets(kind: str, data: st.DataObject) -> None:
    """Also those that no text has: parts of characters, special tokens, and ids beyond the vocabulary."""
    model = tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, len(model) + 3), max_size=60))
    decoded, offsets = text_with_offsets(model, ids)
    assert len(offsets) == len(ids)
    assert all(0 <= a <= b <= len(decoded) for a, b in offsets)
    assert offsets == sorted(offsets)


def test_bytes_that_are_no_character_do_not_cost_more_than_others() -> None:
    model = tokenizer("sentencepiece")
    byte = model.convert_tokens_to_ids("<0xE6>")
    ids = [byte] * 20_000
    decoded, offsets = text_with_offsets(model, ids)
    assert len(offsets) == len(ids) and set(decoded) == {"\ufffd"}


class TestDocuments:
    @pytest.fixture
    def model(self):
        return tokenizer("byte level")

    def test_a_packed_row_is_several_texts(self, model) -> None:
        begin, end = model.bos_token_id, model.eos_token_id
        found = documents(model, [begin, 7, 8, end, begin, 9, end, end, 10])
        assert [list(places) for places in found] == [[1, 2], [5], [8]]
        assert documents(model, []) == documents(model, [begin, end]) == []

    def test_turns_of_a_chat_are_one_text(self, model) -> None:
        chat = tokenizer.__wrapped__("byte level")
        chat.chat_template = "{{ messages }}"
        end = chat.eos_token_id
        assert [list(places) for places in documents(chat, [7, end, 8])] == [[0, 1, 2]]
        assert [list(places) for places in documents(model, [7, end, 8])] == [[0], [2]]

    def test_a_tokenizer_without_such_tokens(self) -> None:
        bare = tokenizer.__wrapped__("byte level")
        bare.bos_token = bare.eos_token = None
        assert [list(places) for places in documents(bare, [1, 2])] == [[0, 1]]
