"""Text to token ids, and the one place that decides which tokens are the target and which is the edit token."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_moeedit.data.errors import short

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EditToken = Literal["subject_last", "last"]
IGNORED_LABEL = -100
"""Label of a position that no loss and no perplexity counts, as in transformers."""
ZERO_WIDTH_JOINER = "\u200d"
"""Makes one emoji of several."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """A prompt and its target as one token sequence.

    Attributes:
        ids: token ids of the prompt (with the tokenizer's special tokens) followed by the target.
        target_start: index in ``ids`` of the first token of the target.
        edit_token: index in ``ids`` of the edit token, or ``None`` if no subject was given.
    """

    ids: list[int]
    target_start: int
    edit_token: int | None = None


def join(prompt: str, target: str) -> str:
    """The text of a prompt continued by a target: one space between them, unless the prompt ends with white space.

    Example:
        >>> join("The capital of France is", "Paris")
        'The capital of France is Paris'
    """
    if not target:
        return prompt
    return prompt + target if prompt[-1:].isspace() else f"{prompt} {target}"


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Character span ``[start, end)`` of the occurrence of ``subject`` in ``prompt`` whose last token is edited.

    The last one that stands as a word of its own, because in a causal model only it can read everything that was said
    of the subject before; if there is none (or in scripts without spaces), the last one of all. ROME and MEMIT take
    the place of ``{}`` in a template, which is the same unless the template names the subject again behind it.

    Raises:
        ValueError: if the subject is empty or not in the prompt.

    Example:
        >>> subject_span("al is the capital of", "al")
        (0, 2)
        >>> subject_span("Rome, I say, Rome lies in", "Rome")
        (13, 17)
    """
    end = len(prompt)
    while subject and (start := prompt.rfind(subject, 0, end)) >= 0:
        end = start + len(subject)
        if not (is_within_word(prompt, start) or is_within_word(prompt, end)):
            return start, end
        end -= 1  # occurrences may overlap
    start = prompt.rfind(subject) if subject else -1
    if start < 0:
        raise ValueError(f"the subject {short(subject)} does not occur in the prompt {short(prompt)}")
    return start, start + len(subject)


def is_within_word(text: str, cut: int) -> bool:
    """Whether ``cut``, a position between two characters, lies within a word, or before a mark on the last letter."""
    if not 0 < cut < len(text):
        return False
    before, behind = text[cut - 1], text[cut]
    if unicodedata.category(behind).startswith("M") or ZERO_WIDTH_JOINER in (before, behind):
        return True
    return before.isalnum() and behind.isalnum()


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    subjects: Sequence[str] | None = None,
    token: EditToken = "subject_last",
) -> list[Encoding]:
    """Tokenize prompts with their targets, and find the edit token of each by character offsets.

    The text is tokenized as a whole, so that a target's tokens are the ones a model would have to say; a token belongs
    to the target if it ends behind the prompt. The edit token of a subject is the last one that holds a part of it,
    also where that token holds letters behind the subject, or the subject's last character is several tokens. A prompt
    that begins with the tokenizer's BOS token, as the template of a chat may, gets no second one.

    Args:
        tokenizer: a fast tokenizer (one that knows character offsets).
        prompts: ``n`` prompts.
        targets: ``n`` targets; an empty string encodes the prompt alone.
        subjects: ``n`` subjects, each in its prompt; ``None`` if no edit token is wanted.
        token: which token to edit, the last one of the subject or the last one of the prompt.

    Raises:
        ValueError: if the tokenizer has no offsets, a subject is not in its prompt, or a target has no token (or shares
            its first one with the prompt, in a tokenizer that does not split texts into words).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell character offsets; a fast tokenizer is needed "
            "(AutoTokenizer.from_pretrained(..., use_fast=True))"
        )
    if token not in ("subject_last", "last"):
        raise ValueError(f"token must be 'subject_last' or 'last', got {token!r}")
    texts = [join(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    if not texts:
        return []
    batch = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
    bos = getattr(tokenizer, "bos_token_id", None)
    encodings = []
    for row, (ids, offsets) in enumerate(zip(batch["input_ids"], batch["offset_mapping"], strict=True)):
        prompt, target = prompts[row], targets[row]
        if len(ids) > 1 and ids[0] == ids[1] == bos and tuple(offsets[0]) == (0, 0):
            ids, offsets = ids[1:], offsets[1:]
        # a special token that the tokenizer puts at the end has the offset (0, 0); nothing could be said after it
        while len(ids) > 1 and tuple(offsets[len(ids) - 1]) == (0, 0):
            ids = ids[:-1]
        offsets = _offsets_of_bytes(tokenizer, texts[row], offsets[: len(ids)])
        # the space between belongs to the target, but not in a token with the prompt's last letter
        said, behind = len(prompt.rstrip()), len(texts[row]) - len(target)
        starts = (i for i, (a, b) in enumerate(offsets) if b > len(prompt) and (a >= said or b > behind))
        target_start = next(starts, len(ids))
        if target and target_start >= len(ids):
            raise ValueError(f"the target {short(target)} after the prompt {short(prompt)} has no token of its own")
        if target and offsets[target_start][0] < said:
            raise ValueError(f"one token holds the end of the prompt {short(prompt)} and the start of {short(target)}")
        edit_token = None
        if subjects is not None:
            start, end = subject_span(prompt, subjects[row]) if token == "subject_last" else (0, len(prompt))
            inside = [i for i, (a, b) in enumerate(offsets[:target_start]) if a < end and b > start]
            if not inside:
                raise ValueError(f"no token of the prompt {short(prompt)} covers the subject {short(subjects[row])}")
            if offsets[inside[-1]][1] > end and len(inside) > 1 and offsets[inside[-2]] == offsets[inside[-1]]:
                which = f"{short(subjects[row])} in the prompt {short(prompt)}"
                raise ValueError(f"the tokenizer does not tell the last token of {which} from the text behind it")
            edit_token = inside[-1]
        encodings.append(Encoding(list(ids), target_start, edit_token))
    return encodings


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of whole texts, as :func:`encode` gives them, without the work of finding places in them."""
    batch = tokenizer(list(texts), return_attention_mask=False, return_special_tokens_mask=True)
    bos = getattr(tokenizer, "bos_token_id", None)
    rows = []
    for ids, added in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        start = len(ids) > 1 and ids[0] == ids[1] == bos and added[0]
        end = len(ids)
        while end > 1 and added[end - 1]:
            end -= 1
        rows.append(ids[int(start) : end])
    return rows


def _offsets_of_bytes(
    tokenizer: PreTrainedTokenizerBase, text: str, offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Offsets in which tokens that are single bytes have those of their letter (with the marks on it).

    A Unigram model that falls back to bytes takes unknown letters that stand together for one piece, and gives each of
    its bytes the offsets of all of it: by them, the last byte of a subject could not be told from what follows.
    """
    found: list[tuple[int, int]] = []
    for (start, end), run in itertools.groupby(map(tuple, offsets)):
        length = len(list(run))
        if length > 1 and end - start > 1:
            cuts = [i for i in range(start + 1, end) if not unicodedata.category(text[i]).startswith("M")]
            letters = list(itertools.pairwise([start, *cuts, end]))
            sizes = [len(_normalized(tokenizer, text[i:j]).encode("utf-8", "replace")) for i, j in letters]
            if sum(sizes) == length:
                found += [letter for letter, size in zip(letters, sizes, strict=True) for _ in range(size)]
                continue
        found += [(start, end)] * length
    return found


def _normalized(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Stack token sequences into ``input_ids [n, length]`` and ``attention_mask [n, length]`` (both int64).

    Example:
        >>> pad([[5, 6], [7]], pad_id=0, side="left")[0].tolist()
        [[5, 6], [0, 7]]
    """
    length = max(map(len, rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def token_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group rows of similar length so that each padded batch has at most ``token_budget`` tokens, or one row.

    Args:
        lengths: length of each row, in tokens.
        token_budget: largest number of tokens (with padding) in a batch.

    Returns:
        The rows' indices, batch by batch, from short to long rows.

    Example:
        >>> list(token_batches([3, 9, 1, 2], token_budget=6))
        [[2, 3], [0], [1]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # sorted by length, so the row that joins is the longest of the batch
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; any id will do, since padding is masked out."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        value: Any = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions ``[n, length]`` that count from 0 at each row's first token, however it is padded."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)
