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
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from unicodedata import normalize

from lit_moeedit.data.encoding import encode
from lit_moeedit.data.errors import FactError, FactsError, short, typed, visible
from lit_moeedit.data.formats import (
    FORMATS,
    NATIVE_FIELDS,
    PLACEHOLDER,
    TABLE_FIELDS,
    Format,
    count_placeholders,
    detect_format,
    named_columns,
    read_complete,
)
from lit_moeedit.data.row_files import load_rows
from lit_moeedit.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Checker", "Fact", "FactError", "FactsError", "Neighbour", "Tokenizer", "read_facts", "validate_facts"]

logger = logging.getLogger(__name__)

# Called as `tokenizer(text, add_special_tokens=False)["input_ids"]`, like every tokenizer of transformers.
Tokenizer = Callable[..., Mapping[str, Any]]

_COMPLETE = Format("fact", (), read_complete)
SUBJECT_LIMIT = 1000
"""Characters of a subject: no name is as long, and the time to find its last place in a prompt grows with them."""
_LOGGED = 20
_KEPT = 1000
"""So many problems, or names of ignored fields, are remembered of a file that may have any number of them."""


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
        neighbours = tuple(Neighbour(*neighbour) for neighbour in fields.get("neighbours", ()))
        return cls(**{**fields, "neighbours": neighbours})


def read_facts(
    path: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str | Sequence[str]] | None = None,
    strict: bool = True,
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
) -> list[Fact]:
    """Read and check the facts of a file, row by row: the file may be larger than memory, its facts may not.

    Args:
        path: A `.json` file with a list of objects, a `.jsonl` file with one object per line, or a table (`.csv`,
            `.tsv`) whose first line has the names of the columns. UTF-8; at most 4 MiB in a row.
        format: A name in `lit_moeedit.data.formats.FORMATS`, or `auto` to decide by the keys of the first row.
        columns: Our name of a field to its name in the file, for a file in a format of its own; a list of names where
            the field is a list. Fields are `subject`, `prompt`, `target_new`, `target_true`, `paraphrases`,
            `neighbour_prompts`, `neighbour_targets`, `neighbour_groups`; those not given have their own names.
        strict: Refuse the file if any row cannot be used; `False` skips such rows, with a warning.
        tokenizer: If given, refused are targets of which it leaves no token, subjects and targets in which it reads
            special tokens (the unknown one among them), and subjects without an edit token.
        limit: Stop after this many usable facts; what stands behind them is not read.

    Returns:
        The facts in the order of the file, texts without surrounding whitespace (but prompts with the line ends behind
        them).

    Raises:
        FactError: The file as a whole cannot be read.
        FactsError: Rows cannot be used (`strict`), or none can.
        OSError: The file cannot be opened.
        ValueError: `format`, `columns` or `limit` is none of the allowed values.

    Example:
        >>> facts = read_facts("facts.jsonl", strict=False, limit=100)  # doctest: +SKIP
        >>> facts = read_facts("table.csv", columns={"target_new": "new"})  # doctest: +SKIP
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1 or None")
    checker = Checker(str(path), choose_format(format, columns), tokenizer)
    with closing(load_rows(Path(path))) as rows:
        facts = _check_rows(checker, rows, strict=strict, limit=limit)
    checker.warn_ignored_fields()
    return facts


def choose_format(format: str, columns: Mapping[str, str | Sequence[str]] | None) -> Format | None:
    """The format that these arguments of `read_facts` ask for; `None` leaves it to the first row.

    Raises:
        ValueError: They are none of the allowed values.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(map(repr, ('auto', *FORMATS)))}")
    if columns is None:
        return None if format == "auto" else FORMATS[format]
    if format not in ("auto", "native"):
        raise ValueError(f"format is {format!r}, which has names of its own; expected no columns with it")
    return named_columns(columns)


def validate_facts(
    facts: Sequence[Fact], *, source: str = "facts", tokenizer: Tokenizer | None = None, strict: bool = True
) -> list[Fact]:
    """Check facts made in memory just as `read_facts` checks those of a file.

    Args:
        facts: The facts; their position, from 1, is the row in messages.
        source: What messages name instead of a file.
        tokenizer: As for `read_facts`.
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
    return _check_rows(Checker(source, _COMPLETE, tokenizer), rows, strict=strict, limit=None)


class Checker:
    """Checks rows one after the other and remembers prompts and targets, because rows can contradict each other.

    Args:
        source: The file, or what messages name instead of one.
        format: How to read a row; `None` decides by the keys of the first one.
        tokenizer: As for `read_facts`.

    Attributes:
        format: The format, once it is known.
        repeats: Edits that were left out because an earlier row has them, too, as its format allows.
    """

    def __init__(self, source: str, format: Format | None, tokenizer: Tokenizer | None) -> None:
        self.source = source
        self.format = format
        self.repeats = 0
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._first: dict[str, tuple[int, str]] = {}  # prompt -> row and target_new of the fact that keeps it
        self._wrong: dict[str, str | None] = {}  # neighbours share few targets, so each is tokenised once
        self._ignored: Counter[str] = Counter()

    def check(self, number: int, data: object) -> Iterator[Fact | list[FactError]]:
        """The facts of a row (one, but for some formats), or for each of them everything that is wrong.

        Raises:
            FactError: No known format has the keys of the first row.
        """
        if isinstance(data, FactError):
            yield [data]
            return
        if not isinstance(data, Mapping):
            yield [FactError(self.source, number, None, f"is {typed(data)}; expected an object")]
            return
        if self.format is None:
            self.format = detect_format(self.source, number, data)
        if self.format is FORMATS["native"]:
            # a misspelled optional field would otherwise lose its paraphrases or neighbours without a word
            known = (*NATIVE_FIELDS, *TABLE_FIELDS)
            self._ignored.update(
                k for k in data if k not in known and (k in self._ignored or len(self._ignored) < _KEPT)
            )
        for row in self.format.rows(data):
            fact = self._check(number, row)
            if row.problems:
                yield [FactError(self.source, number, field, message) for field, message in row.problems]
            elif fact is not None:
                yield fact

    def warn_ignored_fields(self) -> None:
        """Warn of fields that are not ours in a file of our own format."""
        if self._ignored:
            fields = ", ".join(f"{short(key)} ({count} rows)" for key, count in self._ignored.most_common(_LOGGED))
            logger.warning(
                "%s: ignored fields %s; known are %s", visible(self.source), fields, ", ".join(NATIVE_FIELDS)
            )

    def _check(self, number: int, row: Row) -> Fact | None:
        """The fact of a row; `None` if an earlier row has it, which the format allows, or after a problem."""
        assert self.format is not None
        fact = None if row.problems else Fact._from_fields(self.format.read(row))
        if fact is None or row.problems:  # what has no texts has no content to check
            return None
        fact = self._respell(number, fact)
        if self.format.many is not None and self._first.get(fact.prompt, (0, ""))[1] == fact.target_new:
            self.repeats += 1
            return None
        for field, message in self._problems(fact):
            row.fail(self.format.names.get(field, field), message)
        if row.problems:
            return None
        self._first[fact.prompt] = (number, fact.target_new)
        return fact

    def _respell(self, number: int, fact: Fact) -> Fact:
        if fact.subject in fact.prompt or len(fact.subject) > SUBJECT_LIMIT:
            return fact
        # Whole words, and only if there is no choice: "US" is neither a part of "bus" nor one of two in "Us or us".
        spellings = re.findall(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", fact.prompt, flags=re.IGNORECASE)
        if len(spellings) != 1:
            return fact
        subject, spelling = short(fact.subject), short(spellings[0])
        source = visible(self.source)
        logger.info("%s, row %d: subject %s is spelled %s in the prompt", source, number, subject, spelling)
        return replace(fact, subject=spellings[0])

    def _problems(self, fact: Fact) -> Iterator[tuple[str, str]]:
        if len(fact.subject) > SUBJECT_LIMIT:
            yield "subject", f"has {len(fact.subject):,} characters; expected at most {SUBJECT_LIMIT:,}"
            return
        prompts = [("prompt", fact.prompt), *(("paraphrases", text) for text in fact.paraphrases)]
        prompts += [("neighbours", neighbour.prompt) for neighbour in fact.neighbours]
        for field, prompt in prompts:
            if count := count_placeholders(prompt, fact.subject):
                yield field, f"still holds '{PLACEHOLDER}' ({count} times); expected a complete prompt"
        if not count_placeholders(fact.prompt, fact.subject) and fact.subject not in fact.prompt:
            found = f"does not contain the subject {short(fact.subject)}"
            if normalize("NFC", fact.subject) in normalize("NFC", fact.prompt):
                found += " but in another Unicode normalisation"
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
        if self._tokenizer is not None:
            yield from self._problems_of_tokens(fact)

    def _problems_of_tokens(self, fact: Fact) -> Iterator[tuple[str, str]]:
        texts = [("subject", fact.subject), ("target_new", fact.target_new), ("target_true", fact.target_true)]
        wrong = False
        for field, text in texts + [("neighbours", neighbour.target) for neighbour in fact.neighbours]:
            if text is not None and (message := self._unsayable(text)):
                wrong = True
                yield field, f"is {short(text)}, {message}"
        if wrong or fact.subject not in fact.prompt or not getattr(self._tokenizer, "is_fast", False):
            return
        try:
            encode(cast("PreTrainedTokenizerBase", self._tokenizer), [fact.prompt], [fact.target_new], [fact.subject])
        except ValueError as error:
            yield "prompt", f"has no edit token ({error}); expected tokens of the subject and of the target"

    def _unsayable(self, text: str) -> str | None:
        """What is wrong with the tokens of a subject or a target."""
        assert self._tokenizer is not None
        if text not in self._wrong:
            # With the space before it, as the target stands behind a prompt.
            ids = self._tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            message = None if ids else "of which the tokenizer leaves nothing; expected at least one token"
            if special := self._special.intersection(ids):
                names = self._tokenizer.convert_ids_to_tokens(sorted(special))  # type: ignore[attr-defined]
                found = ", ".join(map(short, names))
                message = f"in which the tokenizer reads its special {found}; expected tokens of text"
            self._wrong[text] = message
        return self._wrong[text]


def _check_rows(checker: Checker, rows: Iterable[tuple[int, object]], *, strict: bool, limit: int | None) -> list[Fact]:
    facts: list[Fact] = []
    problems: list[FactError] = []
    fields: Counter[str] = Counter()
    seen = unusable = 0
    for number, data in rows:
        seen += 1
        refused = False
        for checked in checker.check(number, data):
            if isinstance(checked, Fact):
                facts.append(checked)
                if len(facts) == limit:
                    break
            else:
                refused = True
                fields.update(problem.field or "row" for problem in checked)
                problems += checked[: _KEPT - len(problems)]
        unusable += refused
        if len(facts) == limit or (strict and len(problems) == _KEPT):
            break
    if not problems:
        return facts
    headline = f"{unusable} of {seen} rows cannot be used"
    if strict or not facts:
        raise FactsError(checker.source, problems, headline)
    for problem in problems[:_LOGGED]:
        logger.warning("skipped: %s", problem)
    counts = ", ".join(f"{visible(field)} {count}" for field, count in fields.most_common(_LOGGED))
    source = visible(checker.source)
    logger.warning("%s: %s and were skipped; problems by field: %s", source, headline, counts)
    return facts
