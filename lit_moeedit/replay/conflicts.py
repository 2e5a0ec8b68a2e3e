"""Rows of token ids that contradict an edit, and the tokens of the old answer in them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lit_moeedit.data.conflicts import Conflict, ConflictFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
_MAX_PENDING = 32
"""Maximum number of tokens that wait for the end of a character; bytes that never make one must not cost more."""


def documents(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[range]:
    """Split a row into the documents that are packed in it, which are texts of their own.

    They are separated by the tokenizer's BOS and EOS tokens. With a chat template a row is one text, because an EOS
    token may end a turn: the subject is in the question then, and the old answer in the next turn.

    Args:
        tokenizer: the model's tokenizer.
        ids: token ids of the row without padding.

    Returns:
        Positions of each document, without the tokens that separate them; none is empty.
    """
    marks: set[int | None] = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if tokenizer.chat_template:
        marks = set()
    cuts = [-1, *(i for i, token in enumerate(ids) if token in marks), len(ids)]
    return [range(a + 1, b) for a, b in pairwise(cuts) if b > a + 1]


def texts_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decode rows of token ids as they are: special tokens are kept, because they separate words."""
    texts: list[str] = tokenizer.backend_tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=False)
    return texts


def text_with_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Decode a row, and find the characters of each token from the ids alone.

    Tokens are decoded one after the other with those just before them, because the text of a token may depend on these:
    SentencePiece drops the space at the beginning, and a token may be a part of a character. The tokens of one
    character all get its offsets. The time is linear in the length of the row.

    Args:
        tokenizer: a fast tokenizer of any kind.
        ids: token ids of the row.

    Returns:
        The text, and for each token the characters ``(start, end)`` that it is a part of.
    """
    decode = tokenizer.backend_tokenizer.decode
    parts: list[str] = []
    offsets: list[tuple[int, int]] = []
    begin = done = length = 0
    known = ""
    for end in range(1, len(ids) + 1):
        text = decode(list(ids[begin:end]), skip_special_tokens=False)
        is_complete = text.startswith(known) and not text.endswith(_INCOMPLETE)
        if not is_complete and end < min(len(ids), done + _MAX_PENDING):
            continue
        part = text[len(known) :]
        offsets += [(length, length + len(part))] * (end - done)
        parts.append(part)
        length += len(part)
        begin, done = done, end
        known = decode(list(ids[begin:end]), skip_special_tokens=False)
    return "".join(parts), offsets


def old_answer_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], finder: ConflictFinder
) -> list[tuple[Conflict, list[int]]]:
    """Find the conflicts of one text given as token ids, and the tokens of the old answer of each.

    A token belongs to the old answer if it has at least one of its characters, even if it also has others: ``' Paris'``
    or ``'Paris.'`` as one token.

    Args:
        tokenizer: a fast tokenizer.
        ids: token ids of the text.
        finder: the facts.

    Returns:
        Each conflict, with positions in ``ids`` in ascending order.
    """
    text, offsets = text_with_offsets(tokenizer, ids)
    # both ascend, though several tokens may share one character
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    found = []
    for conflict in finder.find(text):
        places = {i for a, b in conflict.spans for i in range(bisect_right(ends, a), bisect_left(starts, b))}
        found.append((conflict, sorted(places)))
    return found
