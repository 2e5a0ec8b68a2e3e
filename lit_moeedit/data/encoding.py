"""Tokenization: the token ids of a prompt with its target, the place of the target, and the edit token."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_moeedit.data.errors import short

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EditToken = Literal["subject_last", "last"]
IGNORED_LABEL = -100
"""Label of a position that losses and perplexities ignore, as in transformers."""
ZERO_WIDTH_JOINER = "\u200d"
"""A character that joins several emoji into one."""
TEXTS_AT_ONCE = 512
"""Number of texts that are tokenized together."""
_FAST = "a fast tokenizer is needed (AutoTokenizer.from_pretrained(..., use_fast=True))"


@dataclass(frozen=True, slots=True)
class Encoding:
    """A prompt and its target as one token sequence.

    Attributes:
        ids: token ids of the prompt (with the tokenizer's special tokens) followed by the target.
        target_start: index in ``ids`` of the first token of the target.
        edit_token: index in ``ids`` of the edit token, or ``None`` if no subject was given.
        subject_start: index in ``ids`` of the first token of the subject whose last token is the edit token; ``None``
            for another edit token.
        further: indices in ``ids`` of tokens of the target that are edit tokens, too, ascending.
    """

    ids: list[int]
    target_start: int
    edit_token: int | None = None
    subject_start: int | None = field(default=None, compare=False)
    further: tuple[int, ...] = ()

    @property
    def edit_tokens(self) -> tuple[int, ...]:
        """Indices in ``ids`` of all edit tokens, ascending."""
        return self.further if self.edit_token is None else (self.edit_token, *self.further)

    def with_every_token(self) -> Encoding:
        """Make each token of the target, but for the last one, an edit token, because the next one is read from it."""
        return replace(self, further=tuple(range(self.target_start, len(self.ids) - 1)))

    def up_to_edits(self) -> Encoding:
        """Return the prompt, and the target up to its last edit token."""
        return replace(self, ids=self.ids[: self.target_start + len(self.further)])


def join(prompt: str, target: str) -> str:
    """Join a prompt and a target, with one space between them unless the prompt ends with white space.

    Example:
        >>> join("The capital of France is", "Paris")
        'The capital of France is Paris'
    """
    if not target:
        return prompt
    return prompt + target if prompt[-1:].isspace() else f"{prompt} {target}"


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Find the occurrence of ``subject`` in ``prompt`` whose last token is edited.

    It is the last occurrence as a whole word, because in a causal model later tokens read all earlier ones. If there is
    none, as in scripts without spaces, it is the last occurrence of all. ROME and MEMIT take the place of ``{}`` in a
    template, which is the same unless the template repeats the subject after it.

    Returns:
        The character span ``[start, end)``.

    Raises:
        ValueError: the subject is empty or does not occur in the prompt.

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
    """Return true if ``cut``, a position between two characters, lies within a word or before a combining mark."""
    if not 0 < cut < len(text):
        return False
    before, after = text[cut - 1], text[cut]
    if unicodedata.category(after).startswith("M") or ZERO_WIDTH_JOINER in (before, after):
        return True
    return before.isalnum() and after.isalnum()


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer returns the character offsets by which :func:`encode` finds targets and edit tokens.

    Raises:
        ValueError: it is a slow one, or returns no offsets, or empty ones.
    """
    encode(tokenizer, [], [])
    name, text = type(tokenizer).__name__, "A text with offsets."
    try:
        spans = _tokenized(tokenizer, [text], return_offsets_mapping=True)["offset_mapping"][0]
    except (KeyError, NotImplementedError, TypeError) as error:
        raise ValueError(f"{name} returns no character offsets ({type(error).__name__}: {error}); {_FAST}") from error
    if spans and not any(0 <= start < end <= len(text) for start, end in spans):
        raise ValueError(f"{name} returns empty character offsets; {_FAST}")


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    subjects: Sequence[str] | None = None,
    token: EditToken = "subject_last",
) -> list[Encoding]:
    """Tokenize prompts with their targets, and find the edit token of each by character offsets.

    The text is tokenized as a whole, so that the target has the tokens that a model would have to generate. A token
    belongs to the target if it ends after the prompt. The edit token is the last token that covers a part of the
    subject, even if it also covers letters after the subject, or if the subject's last character is several tokens. A
    prompt that begins with the tokenizer's BOS token, as a chat template may, gets no second one.

    Args:
        tokenizer: a fast tokenizer, which has character offsets.
        prompts: ``n`` prompts.
        targets: ``n`` targets; an empty string encodes the prompt alone.
        subjects: ``n`` subjects, each in its prompt; ``None`` for encodings without an edit token.
        token: the token to edit, the last one of the subject or the last one of the prompt.

    Raises:
        ValueError: the tokenizer has no offsets, a subject is not in its prompt, or a target has no token of its own.
            In a tokenizer that does not split texts into words, its first token may belong to the prompt, too.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no character offsets; {_FAST}")
    if token not in ("subject_last", "last"):
        raise ValueError(f"token must be 'subject_last' or 'last', got {token!r}")
    texts = [join(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    encodings = []
    for row, (ids, offsets) in enumerate(_ids_and_offsets(tokenizer, texts)):
        prompt, target = prompts[row], targets[row]
        offsets = _offsets_of_bytes(tokenizer, texts[row], offsets)
        # the space between them belongs to the target, but not in a token with the last letter of the prompt
        prompt_end, target_begin = len(prompt.rstrip()), len(texts[row]) - len(target)
        starts = (i for i, (a, b) in enumerate(offsets) if b > len(prompt) and (a >= prompt_end or b > target_begin))
        target_start = next(starts, len(ids))
        if target and target_start >= len(ids):
            raise ValueError(f"the target {short(target)} after the prompt {short(prompt)} has no token of its own")
        if target and offsets[target_start][0] < prompt_end:
            raise ValueError(f"one token holds the end of the prompt {short(prompt)} and the start of {short(target)}")
        edit_token = subject_start = None
        if subjects is not None:
            start, end = subject_span(prompt, subjects[row]) if token == "subject_last" else (0, len(prompt))
            inside = [i for i, (a, b) in enumerate(offsets[:target_start]) if a < end and b > start]
            if not inside:
                raise ValueError(f"no token of the prompt {short(prompt)} covers the subject {short(subjects[row])}")
            if offsets[inside[-1]][1] > end and len(inside) > 1 and offsets[inside[-2]] == offsets[inside[-1]]:
                which = f"{short(subjects[row])} in the prompt {short(prompt)}"
                raise ValueError(f"the tokenizer does not separate the last token of {which} from the text after it")
            edit_token = inside[-1]
            subject_start = inside[0] if token == "subject_last" else None
        encodings.append(Encoding(list(ids), target_start, edit_token, subject_start))
    return encodings


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize whole texts as :func:`encode` does, without looking for targets and edit tokens."""
    return _tokenized(tokenizer, texts)["input_ids"]


def _ids_and_offsets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenize texts part by part, so that the offsets of all of them are not in memory at once."""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = _tokenized(tokenizer, texts[start : start + TEXTS_AT_ONCE], return_offsets_mapping=True)
        yield from zip(part["input_ids"], part["offset_mapping"], strict=True)


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: bool) -> dict[str, list[list[Any]]]:
    """Tokenize texts without a second BOS token, and without special tokens at the end, which would end the text."""
    batch = tokenizer(list(texts), return_attention_mask=False, return_special_tokens_mask=True, **options)
    bos = getattr(tokenizer, "bos_token_id", None)
    parts = []
    for ids, added in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        start = len(ids) > 1 and ids[0] == ids[1] == bos and added[0]
        end = len(ids)
        while end > 1 and added[end - 1]:
            end -= 1
        parts.append(slice(int(start), end))
    return {name: [row[part] for row, part in zip(rows, parts, strict=True)] for name, rows in batch.items()}


def _offsets_of_bytes(
    tokenizer: PreTrainedTokenizerBase, text: str, offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Correct offsets of tokens that are single bytes: each gets those of its letter with the marks on it.

    A Unigram model with byte fallback takes a run of unknown letters for one piece, and gives each of its bytes the
    offsets of the whole run. These do not separate the last byte of a subject from the text after it.
    """
    spans = [(start, end) for start, end in offsets]
    if len(set(spans)) == len(spans):
        return spans
    found: list[tuple[int, int]] = []
    for (start, end), run in itertools.groupby(spans):
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
    """Pad token sequences to ``input_ids`` and ``attention_mask``, both int64 ``[n, length]``.

    Example:
        >>> pad([[5, 6], [7]], pad_id=0, side="left")[0].tolist()
        [[5, 6], [0, 7]]
    """
    length = max(map(len, rows), default=0)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
    places = torch.arange(length)
    mask = places >= length - lengths if side == "left" else places < lengths
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    ids[mask] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.long)
    return ids, mask.long()


def token_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group rows of similar length into batches of at most ``token_budget`` tokens with padding.

    A longer row is a batch of its own.

    Args:
        lengths: length of each row, in tokens.
        token_budget: maximum number of tokens (with padding) in a batch.

    Yields:
        The indices of the rows of a batch, batches of short rows first.

    Example:
        >>> list(token_batches([3, 9, 1, 2], token_budget=6))
        [[2, 3], [0], [1]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # the rows are sorted, so this one is the longest of the batch
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of padding tokens; any id will do, because padding is masked."""
    found = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "bos"))
    return next((int(value) for value in found if value is not None), 0)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Compute position ids ``[n, length]`` that start at 0 at the first token of each row, with padding on any side."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)
