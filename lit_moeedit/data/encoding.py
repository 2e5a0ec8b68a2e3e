"""Text to token ids, and the one place that decides which tokens are the target and which is the edit token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

EditToken = Literal["subject_last", "last"]
IGNORED_LABEL = -100
"""Label of a position that no loss and no perplexity counts, as in transformers."""


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
    """Character span ``[start, end)`` of the last occurrence of ``subject`` in ``prompt``.

    The last one, because in a causal model only it can read everything that was said of the subject before.

    Raises:
        ValueError: if the subject is empty or not in the prompt.
    """
    start = prompt.rfind(subject) if subject else -1
    if start < 0:
        raise ValueError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
    return start, start + len(subject)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    subjects: Sequence[str] | None = None,
    token: EditToken = "subject_last",
) -> list[Encoding]:
    """Tokenize prompts with their targets, and find the edit token of each by character offsets.

    The text is tokenized as a whole, so that a target's tokens are the ones a model would have to say; a token belongs
    to the target if it ends behind the prompt.

    Args:
        tokenizer: a fast tokenizer (one that knows character offsets).
        prompts: ``n`` prompts.
        targets: ``n`` targets; an empty string encodes the prompt alone.
        subjects: ``n`` subjects, each in its prompt; ``None`` if no edit token is wanted.
        token: which token to edit, the last one of the subject or the last one of the prompt.

    Raises:
        ValueError: if the tokenizer has no offsets, a subject is not in its prompt, or a target has no token.
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
    encodings = []
    for row, (ids, offsets) in enumerate(zip(batch["input_ids"], batch["offset_mapping"], strict=True)):
        prompt, target = prompts[row], targets[row]
        # a special token that the tokenizer puts at the end has the offset (0, 0); nothing could be said after it
        while len(ids) > 1 and tuple(offsets[len(ids) - 1]) == (0, 0):
            ids = ids[:-1]
        target_start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        if target and target_start >= len(ids):
            raise ValueError(f"the target {target!r} after the prompt {prompt!r} has no token of its own")
        edit_token = None
        if subjects is not None:
            start, end = subject_span(prompt, subjects[row]) if token == "subject_last" else (0, len(prompt))
            inside = [i for i, (a, b) in enumerate(offsets[:target_start]) if a < end and b > start]
            if not inside:
                raise ValueError(f"no token of the prompt {prompt!r} covers the subject {subjects[row]!r}")
            edit_token = inside[-1]
        encodings.append(Encoding(list(ids), target_start, edit_token))
    return encodings


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
