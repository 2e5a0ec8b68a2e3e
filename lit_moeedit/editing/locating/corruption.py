"""Prompts whose subject is replaced by another one, as causal tracing needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lit_moeedit.data.encoding import Encoding, encode, subject_span
from lit_moeedit.data.facts import Fact


@dataclass(frozen=True)
class TracedFact:
    """A prompt with an answer, as it is and with a corrupted subject.

    Attributes:
        clean: the prompt and the answer; its edit token is the last one of the subject.
        corrupted: the same with the tokens of another subject. It equals ``clean`` if none has the same number of
            tokens; then noise is added to the embeddings of the subject.
    """

    clean: Encoding
    corrupted: Encoding

    @property
    def needs_noise(self) -> bool:
        """``True`` if no other subject has the same number of tokens."""
        return self.corrupted.ids == self.clean.ids

    @property
    def subject(self) -> range:
        """Indices of the subject's tokens."""
        assert self.clean.subject_start is not None and self.clean.edit_token is not None
        return range(self.clean.subject_start, self.clean.edit_token + 1)

    @property
    def places(self) -> tuple[int, int]:
        """Indices of the last token of the subject, and of the last token of the prompt."""
        assert self.clean.edit_token is not None
        return self.clean.edit_token, self.clean.target_start - 1

    def answered(self, token: int) -> TracedFact:
        """Return the same prompts with one token as the answer."""
        clean, corrupted = (
            replace(row, ids=[*row.ids[: row.target_start], token]) for row in (self.clean, self.corrupted)
        )
        return TracedFact(clean, corrupted)


def corrupt(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[TracedFact]:
    """Encode facts with their true answers (without one, if it is not known), as they are and with other subjects.

    The other subject is that of the next fact for which nothing but the subject's tokens changes. Its answer is
    another one, if answers are known.

    Raises:
        ValueError: if a prompt cannot be encoded, see :func:`~lit_moeedit.data.encoding.encode`.
    """
    prompts, subjects = [fact.prompt for fact in facts], [fact.subject for fact in facts]
    rows = encode(tokenizer, prompts, [fact.target_true or "" for fact in facts], subjects)
    found = []
    for number, (fact, row) in enumerate(zip(facts, rows, strict=True)):
        traced = TracedFact(row, row)
        for subject in _others(facts, number):
            ids = _replaced(tokenizer, fact, row, traced.subject, subject)
            if ids is not None:
                traced = replace(traced, corrupted=replace(row, ids=ids))
                break
        found.append(traced)
    return found


def _others(facts: Sequence[Fact], number: int) -> Iterator[str]:
    """Yield the subjects of the facts after one, then of those before it."""
    own = facts[number]
    for other in (*facts[number + 1 :], *facts[:number]):
        if other.subject != own.subject and (own.target_true is None or other.target_true != own.target_true):
            yield other.subject


def _replaced(
    tokenizer: PreTrainedTokenizerBase, fact: Fact, row: Encoding, inside: range, subject: str
) -> list[int] | None:
    """Return the tokens of a row with another subject; ``None`` if more than the subject's tokens would change."""
    start, end = subject_span(fact.prompt, fact.subject)
    prompt = f"{fact.prompt[:start]}{subject}{fact.prompt[end:]}"
    ids = encode(tokenizer, [prompt], [""])[0].ids
    own, count = row.ids[: row.target_start], inside.stop
    is_same = len(ids) == len(own) and ids[: inside.start] == own[: inside.start] and ids[count:] == own[count:]
    return [*ids, *row.ids[row.target_start :]] if is_same and ids != own else None
