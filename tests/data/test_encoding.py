"""Tests of tokenization: the start of the target and the edit token, for prompts of many forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lit_moeedit.data import Atlas
from lit_moeedit.data.corpus import train_tokenizer
from lit_moeedit.data.encoding import encode, join, pad, pad_id, position_ids, subject_span

TEXTS = [f"{s.prompt} {s.target}." for s in Atlas(edits=0).train]
SMALL = train_tokenizer(TEXTS, 300)
"""Almost only bytes, so that every word and every accented letter is several tokens."""
LARGE = train_tokenizer(TEXTS, 6000)

tokenizers = pytest.mark.parametrize("tokenizer", [SMALL, LARGE], ids=["bytes", "words"])
words = st.lists(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6), min_size=1, max_size=3)
phrases = words.map(" ".join)


def with_end(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which also puts ``</s>`` after every text."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    special = [("<s>", backend.token_to_id("<s>")), ("</s>", backend.token_to_id("</s>"))]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ")


@tokenizers
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Kenya has its seat of government in", "Kenya"),
        ("The capital of Kenya is", "Kenya"),
        ("People pay with shillings in Kenya", "Kenya"),
        ("In Kenya, the capital is", "Kenya"),
        ("Saint Kitts and Nevis lies on the continent of", "Saint Kitts and Nevis"),
        ("The capital of Saint Kitts and Nevis is", "Saint Kitts and Nevis"),
        ("Côte d'Ivoire is written with a hat, and Côte d'Ivoire is", "Côte d'Ivoire"),
        ("Mali borders Niger; the language of Mali is", "Mali"),
        ("U.S. or not, the capital of the U.S. is", "U.S."),
        ("東京 is the capital; who lives in 東京 speaks", "東京"),
    ],
)
def test_the_edit_token_is_the_last_one_of_the_subject(
    tokenizer: PreTrainedTokenizerFast, prompt: str, subject: str
) -> None:
    (encoding,) = encode(tokenizer, [prompt], ["Nairobi"], [subject])
    end = prompt.rindex(subject) + len(subject)
    assert encoding.edit_token is not None
    assert decode(tokenizer, encoding.ids[: encoding.edit_token + 1]) == prompt[:end]
    assert encoding.edit_token < encoding.target_start


@tokenizers
def test_the_last_token_is_the_one_before_the_target(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "The capital of Saint Kitts and Nevis is"
    (encoding,) = encode(tokenizer, [prompt], ["Basseterre"], ["Saint Kitts and Nevis"], token="last")
    assert encoding.edit_token == encoding.target_start - 1
    assert decode(tokenizer, encoding.ids[: encoding.target_start]) == prompt


@tokenizers
@settings(max_examples=100)
@given(before=phrases, subject=phrases, after=phrases, target=phrases, first=st.booleans(), twice=st.booleans())
def test_any_subject_and_target_are_found(
    tokenizer: PreTrainedTokenizerFast, before: str, subject: str, after: str, target: str, first: bool, twice: bool
) -> None:
    prompt = " ".join([subject if twice else before, after, subject] if not first else [subject, after])
    (encoding,) = encode(tokenizer, [prompt], [target], [subject])
    assert encoding.edit_token is not None
    end = subject_span(prompt, subject)[1]
    token_end = tokenizer(join(prompt, target), return_offsets_mapping=True)["offset_mapping"][encoding.edit_token][1]
    # a subject may also stand inside a longer word, whose token then reaches further
    assert token_end == end if prompt[end : end + 1] in ("", " ") else token_end >= end
    if token_end == end:
        assert decode(tokenizer, encoding.ids[: encoding.edit_token + 1]).endswith(subject)
    assert decode(tokenizer, encoding.ids[: encoding.target_start]) == prompt
    assert decode(tokenizer, encoding.ids[encoding.target_start :]) == target
    assert encoding.ids[0] == tokenizer.bos_token_id


@tokenizers
def test_the_atlas_encodes(tokenizer: PreTrainedTokenizerFast) -> None:
    edits = Atlas(edits=60, seed=2).edits
    prompts = [prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)]
    subjects = [edit.subject for edit in edits for _ in range(1 + len(edit.paraphrases))]
    targets = [edit.target_new for edit in edits for _ in range(1 + len(edit.paraphrases))]
    for prompt, subject, target, encoding in zip(
        prompts, subjects, targets, encode(tokenizer, prompts, targets, subjects), strict=True
    ):
        assert encoding.edit_token is not None
        assert decode(tokenizer, encoding.ids[: encoding.edit_token + 1]).endswith(subject)
        assert decode(tokenizer, encoding.ids[: encoding.target_start]) == prompt
        assert decode(tokenizer, encoding.ids[encoding.target_start :]) == target


def test_many_prompts_encode_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_moeedit.data.encoding.TEXTS_AT_ONCE", 4)  # the last part is shorter
    edits = Atlas(edits=10).edits
    columns = [[e.prompt for e in edits], [e.target_new for e in edits], [e.subject for e in edits]]
    together = encode(LARGE, *columns)
    assert together == [encode(LARGE, *([cell] for cell in row))[0] for row in zip(*columns, strict=True)]


def test_offsets_may_be_lists() -> None:
    class OfLists(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **options: Any) -> Any:
            batch = super().__call__(*args, **options)
            batch["offset_mapping"] = [[list(span) for span in row] for row in batch["offset_mapping"]]
            return batch

    row = ["The capital of Malí is"], ["Bamako"], ["Malí"]
    for tokenizer in (SMALL, LARGE):
        assert encode(OfLists(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>"), *row) == encode(
            tokenizer, *row
        )


def test_a_prompt_that_ends_with_a_space_gets_no_second_one() -> None:
    spaced, plain = encode(LARGE, ["The capital of Mali is ", "The capital of Mali is"], ["Bamako", "Bamako"])
    assert spaced.ids == plain.ids
    assert spaced.target_start == plain.target_start


def test_without_a_target_everything_is_prompt() -> None:
    (encoding,) = encode(LARGE, ["The capital of Mali is"], [""], ["Mali"], token="last")
    assert encoding.target_start == len(encoding.ids)
    assert encoding.edit_token == len(encoding.ids) - 1


@pytest.mark.parametrize("target", ["Bamako", ""])
@pytest.mark.parametrize("token", ["subject_last", "last"])
def test_an_end_token_of_the_tokenizer_is_left_out(target: str, token: Any) -> None:
    arguments: Any = (["The capital of Mali is"], [target], ["Mali"], token)
    assert encode(with_end(LARGE), *arguments) == encode(LARGE, *arguments)


def test_nothing_encodes_to_nothing() -> None:
    assert encode(LARGE, [], []) == []


@pytest.mark.parametrize(
    ("prompt", "target", "subject", "message"),
    [
        ("The capital of Mali is", "Bamako", "Peru", "the subject 'Peru' does not occur in the prompt"),
        ("The capital of Mali is", "Bamako", "", "the subject '' does not occur"),
        ("The capital of Mali is", " ", "Mali", "the target ' ' after the prompt .* has no token of its own"),
    ],
)
def test_what_cannot_be_encoded_is_refused(prompt: str, target: str, subject: str, message: str) -> None:
    class NoSpaces:
        """A tokenizer that drops white space at the end."""

        is_fast = True

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return LARGE([text.rstrip() for text in texts], **options)

    with pytest.raises(ValueError, match=message):
        encode(NoSpaces(), [prompt], [target], [subject])  # type: ignore[arg-type]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow has no character offsets; a fast tokenizer is needed"):
        encode(Slow(), ["a"], ["b"])  # type: ignore[arg-type]


def test_an_unknown_edit_token_is_refused() -> None:
    with pytest.raises(ValueError, match="token must be 'subject_last' or 'last', got 'first'"):
        encode(LARGE, ["a b"], ["c"], ["a"], token="first")  # type: ignore[arg-type]


@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=4), side=st.sampled_from(["left", "right"]))
def test_padding_keeps_every_row(rows: list[list[int]], side: Any) -> None:
    ids, mask = pad(rows, pad_id=0, side=side)
    length = max(map(len, rows), default=0)
    assert ids.shape == mask.shape == (len(rows), length)
    assert ids.dtype == mask.dtype == torch.int64
    for row, row_ids, row_mask in zip(rows, ids.tolist(), mask.tolist(), strict=True):
        rest = length - len(row)
        assert row_ids == ([0] * rest + row if side == "left" else row + [0] * rest)
        assert row_mask == ([0] * rest + [1] * len(row) if side == "left" else [1] * len(row) + [0] * rest)


def test_positions_count_from_the_first_token() -> None:
    for side, expected in (("right", [0, 1, 1]), ("left", [0, 0, 1])):
        _, mask = pad([[5, 6, 7], [8, 9]], pad_id=0, side=side)  # type: ignore[arg-type]
        assert position_ids(mask).tolist() == [[0, 1, 2], expected]


def test_the_padding_id_is_one_the_tokenizer_has() -> None:
    class Bare:
        pad_token_id, eos_token_id, bos_token_id = None, 0, 7

    assert pad_id(LARGE) == LARGE.pad_token_id
    assert pad_id(Bare()) == 0  # type: ignore[arg-type]
