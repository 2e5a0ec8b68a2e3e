"""Facts to edit: what a fact is, how it is read from a file, and the checks before anything else happens.

An edit changes the weights for good, so a fact that cannot be edited (its subject is not in its prompt, its target is
already true, another row wants the opposite) is refused here, with the file, the row and the field, and never reaches
the editor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from lit_moeedit.data.readers import (
    FORMATS,
    NATIVE_FIELDS,
    PLACEHOLDER,
    FactError,
    FactsError,
    Format,
    Row,
    count_placeholders,
    detect_format,
    load_rows,
    read_complete,
    short,
    typed,
)

__all__ = ["Fact", "FactError", "FactsError", "Neighbour", "Tokenizer", "read_facts", "validate_facts"]

logger = logging.getLogger(__name__)

# Called as `tokenizer(text, add_special_tokens=False)["input_ids"]`, like every tokenizer of transformers.
Tokenizer = Callable[..., Mapping[str, Any]]

_COMPLETE = Format((), read_complete, {})
_LOGGED = 20


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A prompt whose answer an edit must not change.

    Args:
        prompt: The complete prompt.
        target: Its true answer.
        group: How the prompt is related to the fact, e.g. `same_subject`, `same_relation` or `unrelated`.
    """

    prompt: str
    target: str
    group: str = "neighbour"


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact to edit.

    Nothing is checked here: `validate_facts` checks facts made in memory, `read_facts` those of a file.

    Args:
        subject: What the fact is about; stands in the prompt, letter by letter.
        prompt: The complete prompt, no template.
        target_new: What the model shall say after the edit.
        target_true: What the model says before, if known.
        paraphrases: Other prompts that ask for the same fact.
        neighbours: Prompts whose answers must stay.

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

    @property
    def key(self) -> str:
        """16 hex digits that identify the edit (prompt and `target_new`) in every process and after every resume."""
        edit = json.dumps([self.prompt, self.target_new])
        return hashlib.sha256(edit.encode("ascii")).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The fact in the native shape, made of what JSON knows."""
        data = asdict(self)
        return {**data, "paraphrases": list(data["paraphrases"]), "neighbours": list(data["neighbours"])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`: types are checked, texts stay as they are.

        Raises:
            FactsError: A field is missing or has the wrong type.
        """
        row = Row(data, clean=False)
        fact = cls._from_fields(read_complete(row))
        if row.problems:
            problems = [FactError("fact", None, field, message) for field, message in row.problems]
            raise FactsError("fact", problems, "the dictionary is not a fact")
        return fact

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Self:
        return cls(**{**fields, "neighbours": tuple(Neighbour(*neighbour) for neighbour in fields["neighbours"])})


def read_facts(
    path: str | Path,
    *,
    format: str = "auto",
    strict: bool = True,
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
) -> list[Fact]:
    """Read and check the facts of a file.

    Args:
        path: A `.json` file with a list of objects, or a `.jsonl` file with one object per line.
        format: `native`, `counterfact`, `counterfact_flat`, `zsre` (see `lit_moeedit.data.readers`), or `auto` to
            decide by the keys of the first row.
        strict: Refuse the file if any row cannot be used; `False` skips such rows, with a warning.
        tokenizer: If given, targets of which it leaves no token are refused.
        limit: Stop after this many usable facts; later rows are not checked.

    Returns:
        The facts in the order of the file, texts without surrounding whitespace.

    Raises:
        FactError: The file as a whole cannot be read.
        FactsError: Rows cannot be used (`strict`), or none can.
        ValueError: `format` or `limit` is none of the allowed values.

    Example:
        >>> facts = read_facts("facts.jsonl", strict=False, limit=100)  # doctest: +SKIP
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(map(repr, ('auto', *FORMATS)))}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1 or None")
    file, rows = str(path), load_rows(Path(path))
    chosen = FORMATS["native"]
    if format != "auto":
        chosen = FORMATS[format]
    elif first := next(((number, row) for number, row in rows if isinstance(row, Mapping)), None):
        chosen = detect_format(file, *first)
    if chosen is FORMATS["native"]:
        _warn_ignored_fields(file, rows)
    return _check_rows(_Checker(file, chosen, tokenizer), rows, strict=strict, limit=limit)


def validate_facts(
    facts: Sequence[Fact], *, source: str = "facts", tokenizer: Tokenizer | None = None, strict: bool = True
) -> list[Fact]:
    """Check facts made in memory just as `read_facts` checks those of a file.

    Args:
        facts: The facts; their position, from 1, is the row in messages.
        source: What messages name instead of a file.
        tokenizer: If given, targets of which it leaves no token are refused.
        strict: Refuse all facts if any cannot be used; `False` skips such facts, with a warning.

    Returns:
        The facts in their order, texts without surrounding whitespace. A subject that stands in its prompt once, but
        in other case, takes the spelling of the prompt.

    Raises:
        FactError: There are no facts.
        FactsError: Facts cannot be used (`strict`), or none can.
    """
    if not facts:
        raise FactError(source, None, None, "holds no facts; expected at least one")
    rows = [(number, asdict(fact)) for number, fact in enumerate(facts, start=1)]
    return _check_rows(_Checker(source, _COMPLETE, tokenizer), rows, strict=strict, limit=None)


class _Checker:
    """Checks rows one after the other and remembers the edits seen, because rows can contradict each other."""

    def __init__(self, source: str, format: Format, tokenizer: Tokenizer | None) -> None:
        self.source = source
        self._format = format
        self._tokenizer = tokenizer
        self._first: dict[str, tuple[int, str]] = {}  # prompt -> row and target_new of the fact that keeps it
        self._has_tokens: dict[str, bool] = {}  # neighbours share few targets, so each is tokenised once

    def check(self, number: int, data: object) -> Fact | list[FactError]:
        """The fact of a row, or everything that is wrong with the row."""
        if isinstance(data, FactError):
            return [data]
        if not isinstance(data, Mapping):
            return [FactError(self.source, number, None, f"is {typed(data)}; expected an object")]
        row = Row(data)
        fact = Fact._from_fields(self._format.read(row))
        if not row.problems:  # what has no texts has no content to check
            fact = self._respell(number, fact)
            for field, message in self._problems(fact):
                row.fail(self._format.names.get(field, field), message)
        if row.problems:
            return [FactError(self.source, number, field, message) for field, message in row.problems]
        self._first[fact.prompt] = (number, fact.target_new)
        return fact

    def _respell(self, number: int, fact: Fact) -> Fact:
        if fact.subject in fact.prompt:
            return fact
        # Whole words, and only if there is no choice: "US" is neither a part of "bus" nor one of two in "Us or us".
        spellings = re.findall(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", fact.prompt, flags=re.IGNORECASE)
        if len(spellings) != 1:
            return fact
        subject, spelling = short(fact.subject), short(spellings[0])
        logger.info("%s, row %d: subject %s is spelled %s in the prompt", self.source, number, subject, spelling)
        return replace(fact, subject=spellings[0])

    def _problems(self, fact: Fact) -> Iterator[tuple[str, str]]:
        placeholders = count_placeholders(fact.prompt, fact.subject)
        if placeholders:
            yield "prompt", f"still holds '{PLACEHOLDER}' ({placeholders} times); expected a complete prompt"
        elif fact.subject not in fact.prompt:
            found = f"does not contain the subject {short(fact.subject)}"
            yield "prompt", f"{found}; expected it letter by letter in {short(fact.prompt)}"
        if fact.target_new == fact.target_true:
            yield "target_new", f"is {short(fact.target_new)}, which is also the true target; expected another one"
        if fact.prompt in self._first:
            row, target = self._first[fact.prompt]
            if target == fact.target_new:
                yield "prompt", f"repeats the edit of row {row} ({short(fact.prompt)}); expected every edit once"
            else:
                found = f"is {short(fact.target_new)}, but row {row} sets {short(target)} for the same prompt"
                yield "target_new", f"{found} {short(fact.prompt)}; expected one target per prompt"
        targets = [("target_new", fact.target_new), ("target_true", fact.target_true)]
        for field, target_text in targets + [("neighbours", neighbour.target) for neighbour in fact.neighbours]:
            if target_text is not None and not self._tokenises(target_text):
                found = f"is {short(target_text)}, of which the tokenizer leaves nothing"
                yield field, f"{found}; expected at least one token"

    def _tokenises(self, target: str) -> bool:
        if self._tokenizer is None:
            return True
        if target not in self._has_tokens:
            # With the space before it, as the target stands behind a prompt.
            self._has_tokens[target] = len(self._tokenizer(f" {target}", add_special_tokens=False)["input_ids"]) > 0
        return self._has_tokens[target]


def _check_rows(
    checker: _Checker, rows: Iterable[tuple[int, object]], *, strict: bool, limit: int | None
) -> list[Fact]:
    facts: list[Fact] = []
    problems: list[FactError] = []
    seen = 0
    for number, data in rows:
        seen += 1
        checked = checker.check(number, data)
        if isinstance(checked, Fact):
            facts.append(checked)
        else:
            problems += checked
        if len(facts) == limit:
            break
    if not problems:
        return facts
    unusable = f"{seen - len(facts)} of {seen} rows cannot be used"
    if strict or not facts:
        raise FactsError(checker.source, problems, unusable)
    for problem in problems[:_LOGGED]:
        logger.warning("skipped: %s", problem)
    fields = Counter(problem.field or "row" for problem in problems)
    counts = ", ".join(f"{field} {count}" for field, count in fields.most_common())
    logger.warning("%s: %s and were skipped; problems by field: %s", checker.source, unusable, counts)
    return facts


def _warn_ignored_fields(source: str, rows: Iterable[tuple[int, object]]) -> None:
    # A misspelled optional field would otherwise lose its paraphrases or neighbours without a word.
    ignored = Counter(key for _, row in rows if isinstance(row, Mapping) for key in row if key not in NATIVE_FIELDS)
    if ignored:
        fields = ", ".join(f"{short(key)} ({count} rows)" for key, count in ignored.most_common(_LOGGED))
        logger.warning("%s: ignored fields %s; known are %s", source, fields, ", ".join(NATIVE_FIELDS))
