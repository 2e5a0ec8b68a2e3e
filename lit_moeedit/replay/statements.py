"""Statements of facts, tokenized: each prompt of a fact after each context, with the new target after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from lit_moeedit.data.encoding import Encoding, encode, join
from lit_moeedit.data.facts import Fact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Statements(Mapping[str, Sequence[Encoding]]):
    """The statements of facts, by the key of their fact.

    Args:
        tokenizer: a fast tokenizer.
        contexts: texts put before the prompts.
        paraphrases: maximum number of paraphrases of a fact that are stated besides its prompt.
        facts: the facts; of two with the same prompt the later one counts.

    Raises:
        ValueError: if there is no context, ``paraphrases`` is negative, or a fact cannot be encoded.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        contexts: Sequence[str] = ("",),
        paraphrases: int = 0,
        facts: Iterable[Fact] = (),
    ) -> None:
        if not contexts:
            raise ValueError("contexts needs at least one text (an empty one for the prompt alone)")
        if paraphrases < 0:
            raise ValueError(f"paraphrases must be at least 0, got {paraphrases}")
        self.tokenizer, self.contexts, self.paraphrases = tokenizer, tuple(contexts), paraphrases
        self.facts = tuple({fact.prompt: fact for fact in facts}.values())
        self._encodings = self._encode(self.facts)

    def of(self, facts: Iterable[Fact]) -> Self:
        """Return the statements of other facts. Those of facts that are stated here are not tokenized again."""
        other = type(self)(self.tokenizer, self.contexts, self.paraphrases)
        other.facts = tuple({fact.prompt: fact for fact in facts}.values())
        known = {fact.key: self[fact.key] for fact in other.facts if fact.key in self}
        found = known | self._encode([fact for fact in other.facts if fact.key not in known])
        other._encodings = {fact.key: found[fact.key] for fact in other.facts}
        return other

    def __getitem__(self, key: str) -> Sequence[Encoding]:
        return self._encodings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._encodings)

    def __len__(self) -> int:
        return len(self._encodings)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest statement; 0 without facts."""
        return max((len(encoding.ids) for own in self._encodings.values() for encoding in own), default=0)

    def _encode(self, facts: Sequence[Fact]) -> dict[str, Sequence[Encoding]]:
        asked = [(fact, prompt) for fact in facts for prompt in (fact.prompt, *fact.paraphrases[: self.paraphrases])]
        texts = [join(context, prompt) if context else prompt for _, prompt in asked for context in self.contexts]
        targets = [fact.target_new for fact, _ in asked for _ in self.contexts]
        owners = [fact.key for fact, _ in asked for _ in self.contexts]
        found: dict[str, list[Encoding]] = {}
        for key, encoding in zip(owners, encode(self.tokenizer, texts, targets), strict=True):
            found.setdefault(key, []).append(encoding)
        return dict(found)
