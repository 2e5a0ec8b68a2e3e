"""A fact to edit, and the sequence of facts that passed all checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self, SupportsIndex, overload

from typing_extensions import override

from lit_moeedit.data.errors import FactError, FactsError
from lit_moeedit.data.formats import read_complete
from lit_moeedit.data.probes import Probe
from lit_moeedit.data.rows import Row

Tokenizer = Callable[..., Mapping[str, Any]]
"""Called as ``tokenizer(text, add_special_tokens=False)["input_ids"]``, as every tokenizer of transformers can be."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A prompt whose answer an edit must not change.

    Args:
        prompt: The complete prompt.
        target: Its true answer.
        group: The relation of the prompt to the fact, e.g. `same_subject`, `same_relation` or `unrelated`.
    """

    prompt: str
    target: str
    group: str = "neighbour"


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact to edit.

    The constructor checks nothing: `read_facts` checks the facts of a file, `validate_facts` those made in memory.

    Args:
        subject: The subject of the fact; the prompt contains it letter by letter.
        prompt: The complete prompt, without placeholders.
        target_new: The text that the model should generate after the edit.
        target_true: The text that it generates before the edit, if known.
        paraphrases: Other prompts that ask for the same fact.
        neighbours: Prompts whose answers must not change.
        probes: Questions about what follows from the edit.

    Example:
        >>> fact = Fact(subject="Rome", prompt="Rome lies in", target_new="Spain", target_true="Italy")
        >>> fact.key
        'e31a0c2f956e2aa4'
        >>> Fact.from_dict(fact.to_dict()) == fact
        True
    """

    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    # not part of the repr, because state keys of callbacks are digests of it
    probes: tuple[Probe, ...] = field(default=(), repr=False)

    @property
    def key(self) -> str:
        """16 hex digits that identify prompt and `target_new`, the same in every process and after a resume."""
        return _digest(self.prompt, self.target_new)

    @property
    def prompt_key(self) -> str:
        """16 hex digits that identify the prompt: of two edits with the same one, the later replaces the earlier."""
        return _digest(self.prompt)

    def to_dict(self) -> dict[str, Any]:
        """Convert the fact to the native format, made of JSON types only."""
        data = asdict(self)
        probes = [{**probe, "answers": list(probe["answers"])} for probe in data.pop("probes")]
        data = {**data, "paraphrases": list(data["paraphrases"]), "neighbours": list(data["neighbours"])}
        # no key without probes: digests of edits without them are as before there were any
        return data | ({"probes": probes} if probes else {})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a fact from the result of `to_dict`. Types are checked; texts are not changed.

        Raises:
            FactsError: A field is missing or has the wrong type.
        """
        row = Row(data, clean=False)
        fact = cls.from_fields(read_complete(row))
        if row.problems:
            problems = [FactError("fact", None, field, message) for field, message in row.problems]
            raise FactsError("fact", problems, "the dictionary is not a fact")
        return fact

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Make a fact from the fields that a `Format` has read."""
        neighbours = tuple(Neighbour(*neighbour) for neighbour in fields.get("neighbours", ()))
        probes = tuple(Probe(*probe) for probe in fields.get("probes", ()))
        return cls(**{**fields, "neighbours": neighbours, "probes": probes})


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode("ascii")).hexdigest()[:16]


class CheckedFacts(tuple[Fact, ...]):
    """Facts that `read_facts` or `validate_facts` has accepted; they are not checked again.

    The sequence is immutable and equals a list of the same facts. Its slices and selections count as checked. A list,
    a sum or a copy of it does not.

    Args:
        facts: Facts that have passed all checks together.
        tokenizer: The tokenizer that they were checked with, if any.

    Example:
        >>> from lit_moeedit.data import validate_facts
        >>> facts = validate_facts([Fact("Rome", "Rome lies in", "Spain"), Fact("Oslo", "Oslo lies in", "Peru")])
        >>> validate_facts(facts[1:]) == [Fact("Oslo", "Oslo lies in", "Peru")]
        True
        >>> facts.select(lambda fact: fact.subject == "Rome") == facts[:1]
        True
    """

    tokenizer: Tokenizer | None

    def __new__(cls, facts: Iterable[Fact], tokenizer: Tokenizer | None = None) -> Self:
        """Mark facts as checked."""
        checked = super().__new__(cls, facts)
        checked.tokenizer = tokenizer
        return checked

    @overload
    def __getitem__(self, index: SupportsIndex) -> Fact: ...

    @overload
    def __getitem__(self, index: slice) -> CheckedFacts: ...

    @override
    def __getitem__(self, index: SupportsIndex | slice) -> Fact | CheckedFacts:
        found = super().__getitem__(index)
        return found if isinstance(found, Fact) else CheckedFacts(found, self.tokenizer)

    def select(self, keep: Callable[[Fact], bool]) -> CheckedFacts:
        """Return the facts for which ``keep`` is true."""
        return CheckedFacts(filter(keep, self), self.tokenizer)

    @override
    def __eq__(self, other: object) -> bool:
        return super().__eq__(tuple(other) if isinstance(other, list) else other)

    @override
    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    @override
    def __reduce__(self) -> tuple[type[list[Fact]], tuple[tuple[Fact, ...]]]:
        # a pickle is untrusted, and a tokenizer need not be picklable
        return list, (tuple(self),)
