"""Facts to edit: read from a file or taken from memory, and checked before anything else happens.

An edit changes the weights for good. A fact that cannot be edited (its subject is not in its prompt, it has no target,
another row sets the opposite) is refused here, with the file, the row and the field.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unicodedata import normalize

from lit_moeedit.data.encoding import encode
from lit_moeedit.data.errors import FactError, FactsError, short, typed
from lit_moeedit.data.fact import CheckedFacts, Fact, Neighbour, Tokenizer
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
from lit_moeedit.data.function_words import is_function_word
from lit_moeedit.data.probes import Probe, ProbeKind
from lit_moeedit.data.row_files import load_rows
from lit_moeedit.data.rows import Row
from lit_moeedit.data.shared_probes import Found, SharedProbes
from lit_moeedit.text import first_few, nearest, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CheckedFacts",
    "Fact",
    "FactError",
    "FactsError",
    "Neighbour",
    "Probe",
    "ProbeKind",
    "Tokenizer",
    "read_facts",
    "validate_facts",
]

log = logging.getLogger(__name__)

_COMPLETE = Format("fact", (), read_complete)
SUBJECT_LIMIT = 1000
"""Maximum number of characters of a subject: no name is as long, and the time to find it in a prompt grows with it."""
SAME_TARGETS = "facts whose true target is also the new one (it counts as unknown)"
FUNCTION_WORDS = "subjects that are function words (their tokens stand everywhere, and an edit changes all of that)"
MAX_LOGGED = 20
"""Maximum number of problems or fields in a log message."""
MAX_KEPT = 1000
"""Maximum number of problems, and of names of ignored fields, that are kept in memory: a file may have any number."""


def read_facts(
    path: str | Path | Iterable[Fact | Mapping[str, Any]],
    *,
    format: str = "auto",
    columns: Mapping[str, str | Sequence[str]] | None = None,
    strict: bool = True,
    tokenizer: Tokenizer | None = None,
    limit: int | None = None,
) -> CheckedFacts:
    """Read and check the facts of a file, row by row, or those of a list.

    The file may be larger than memory; its facts must fit into memory. A `target_true` that is absent, empty, or the
    same as `target_new` is unknown (`None`).

    Args:
        path: A `.json` file with a list of objects, a `.jsonl` file with one object per line, or a table (`.csv`,
            `.tsv`) whose first line has the names of the columns. The file is UTF-8 with at most 4 MiB in a row. Or
            the rows themselves, as objects with the same keys.
        format: A name in `lit_moeedit.data.formats.FORMATS`, or `auto` to choose it by the keys of the first row.
        columns: Field name to column name, for a file with other names; a list of column names if the field is a list.
            Fields are `subject`, `prompt`, `target_new`, `target_true`, `paraphrases`, `neighbour_prompts`,
            `neighbour_targets` and `neighbour_groups`. A field that is not given keeps its name.
        strict: True to refuse the file if any row cannot be used; `False` skips such rows, with a warning.
        tokenizer: A tokenizer for further checks. It refuses targets without a token, subjects and targets that
            contain special tokens (the unknown token is one), and subjects without an edit token.
        limit: Maximum number of facts to read; the rest of the file is not read.

    Returns:
        The facts in the order of the file. Texts have no surrounding whitespace, except for line ends after prompts.

    Raises:
        FactError: The file as a whole cannot be read.
        FactsError: A row cannot be used (with `strict`), or no row can.
        OSError: The file cannot be opened.
        ValueError: `format`, `columns` or `limit` is not valid.

    Example:
        >>> facts = read_facts("facts.jsonl", strict=False, limit=100)  # doctest: +SKIP
        >>> facts = read_facts("table.csv", columns={"target_new": "new"})  # doctest: +SKIP
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1 or None")
    if isinstance(path, str | Path):
        source, rows = str(path), load_rows(Path(path))
    else:
        source, rows = "facts", _rows_in_memory("facts", path)
    checker = Checker(source, choose_format(format, columns), tokenizer)
    with closing(rows):
        facts = CheckedFacts(_check_rows(checker, rows, strict=strict, limit=limit), tokenizer)
    checker.warn()
    return facts


def check_facts_file(
    path: str | Path, columns: Mapping[str, str | Sequence[str]] | None = None, strict: bool = True
) -> None:
    """Check that a facts file exists, and that `read_facts` will accept its rows; without `strict`, the first of them.

    Raises:
        FactError: As for `read_facts`, which warns of what is remarkable besides.
        OSError: The file cannot be opened.
        ValueError: `columns` is not valid.
    """
    checker = Checker(str(path), choose_format("auto", columns), None)
    with closing(load_rows(Path(path))) as rows:
        if strict:
            _check_rows(checker, rows, strict=True, limit=None)
        for number, data in islice(rows, 1):  # of which the columns must be known in any case
            list(checker.check(number, data))


def _rows_in_memory(source: str, facts: Iterable[object]) -> Generator[tuple[int, object], None, None]:
    if isinstance(facts, Fact | Mapping | str | Path) or not isinstance(facts, Iterable):
        raise FactError(source, None, None, f"is {typed(facts)}; expected a list of facts")
    number = 0
    for number, fact in enumerate(facts, start=1):
        yield number, fact
    if not number:
        raise FactError(source, None, None, "holds no facts; expected at least one")


def choose_format(format: str, columns: Mapping[str, str | Sequence[str]] | None) -> Format | None:
    """Return the format for these arguments of `read_facts`; `None` leaves the choice to the first row.

    Raises:
        ValueError: An argument is not valid.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format is {format!r}; expected one of {', '.join(map(repr, ('auto', *FORMATS)))}")
    if columns is None:
        return None if format == "auto" else FORMATS[format]
    if format not in ("auto", "native"):
        raise ValueError(f"format is {format!r}, which has names of its own; expected no columns with it")
    return named_columns(columns)


def validate_facts(
    facts: Iterable[Fact | Mapping[str, Any]],
    *,
    source: str = "facts",
    tokenizer: Tokenizer | None = None,
    strict: bool = True,
) -> CheckedFacts:
    """Check facts made in memory, as `read_facts` checks those of a file.

    Facts that were checked before with the same tokenizer are returned at once.

    Args:
        facts: The facts, or objects with the keys of any format of files; their position, from 1, is the row in
            messages.
        source: The name of their source in messages.
        tokenizer: As for `read_facts`.
        strict: True to refuse all facts if any of them cannot be used; `False` skips such facts, with a warning.

    Returns:
        The facts in their order, with texts without surrounding whitespace. A subject that the prompt contains once,
        but in another case, takes the spelling of the prompt. A `target_true` that equals `target_new` is `None`.

    Raises:
        FactError: There are no facts.
        FactsError: A fact cannot be used (with `strict`), or no fact can.
    """
    if facts and isinstance(facts, CheckedFacts) and (tokenizer is None or tokenizer is facts.tokenizer):
        return facts
    checker = Checker(source, None, tokenizer)
    checked = _check_rows(checker, _rows_in_memory(source, facts), strict=strict, limit=None)
    checker.warn()
    return CheckedFacts(checked, tokenizer)


class Checker:
    """A check of rows, one after the other. It remembers prompts and targets, because rows can contradict each other.

    Args:
        source: The file, or another name for the source of facts in messages.
        format: The format of the rows; `None` chooses it by the keys of the first row.
        tokenizer: As for `read_facts`.

    Attributes:
        format: The format, once it is known.
        repeats: Number of edits that were left out because an earlier row has them, in formats that allow it.
        remarks: Numbers of facts or of their parts, by what is remarkable about them.
        shared: The probes of rows with several facts.
    """

    def __init__(self, source: str, format: Format | None, tokenizer: Tokenizer | None) -> None:
        self.source = source
        self.format = format
        self.repeats = 0
        self.remarks: Counter[str] = Counter()
        self.shared = SharedProbes()
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._first: dict[str, tuple[int, str]] = {}  # prompt -> row and target_new of the first fact with it
        self._token_problems: dict[str, str | None] = {}  # neighbours share few targets, so each is tokenised once
        self._ignored: Counter[str] = Counter()

    def check(self, number: int, data: object) -> Iterator[Fact | list[FactError]]:
        """Yield for each fact of a row (some formats have several) either the fact or the list of its problems.

        Raises:
            FactError: No known format has the keys of the first row.
        """
        if isinstance(data, Fact):
            yield from self._check_row(number, _COMPLETE, asdict(data))
            return
        if not isinstance(data, Mapping):
            wrong = FactError(self.source, number, None, f"is {typed(data)}; expected an object")
            yield [data if isinstance(data, FactError) else wrong]
            return
        if self.format is None:
            self.format = detect_format(self.source, number, data)
        if self.format is FORMATS["native"]:
            # otherwise a misspelled optional field would lose its paraphrases or neighbours silently
            known = (*NATIVE_FIELDS, *TABLE_FIELDS)
            self._ignored.update(
                k for k in data if k not in known and (k in self._ignored or len(self._ignored) < MAX_KEPT)
            )
        yield from self._check_row(number, self.format, data)

    def _check_row(self, number: int, format: Format, data: Mapping[str, Any]) -> Iterator[Fact | list[FactError]]:
        found: Found = [(row, *self._check(number, format, row)) for row in format.rows(data)]
        if format.shared is not None:
            found = self.shared.share(format.shared, Row(data), found)
        for row, fact, is_new in found:
            if row.problems:
                yield [FactError(self.source, number, field, message) for field, message in row.problems]
                continue
            if is_new or fact is None:
                self.remarks.update(row.remarks)
            if fact is not None and is_new:
                yield fact

    def warn(self) -> None:
        """Log a warning about remarkable facts, and one about unknown fields."""
        if self.remarks:
            counts = first_few((f"{count:,} {remark}" for remark, count in self.remarks.items()), MAX_LOGGED)
            log.warning("%s: %s", printable(self.source), counts)
        self.warn_ignored_fields()

    def warn_ignored_fields(self) -> None:
        """Log a warning about unknown fields in a file of the native format."""
        if self._ignored:
            known = (*NATIVE_FIELDS, *TABLE_FIELDS)
            counts = (
                f"{short(key)} ({count} rows){nearest(str(key), known)}" for key, count in self._ignored.most_common()
            )
            fields = first_few(counts, MAX_LOGGED)
            log.warning("%s: ignored fields %s; known are %s", printable(self.source), fields, ", ".join(NATIVE_FIELDS))

    def _check(self, number: int, format: Format, row: Row) -> tuple[Fact | None, bool]:
        """Return the fact of a row, `None` after a problem, and whether it is new.

        In some formats rows may have the edits of earlier ones.
        """
        fact = None if row.problems else Fact.from_fields(format.read(row))
        if fact is None or row.problems:
            return None, False
        fact = self._respell(number, fact)
        if fact.target_new == fact.target_true:
            row.remarks[SAME_TARGETS] += 1
            fact = replace(fact, target_true=None)
        if is_function_word(fact.subject):
            row.remarks[FUNCTION_WORDS] += 1
        if format.many is not None and self._first.get(fact.prompt, (0, ""))[1] == fact.target_new:
            self.repeats += 1
            return fact, False
        for field, message in self._problems(fact):
            row.fail(row.where(field), message)
        if row.problems:
            return None, False
        self._first[fact.prompt] = (number, fact.target_new)
        return fact, True

    def _respell(self, number: int, fact: Fact) -> Fact:
        if fact.subject in fact.prompt or len(fact.subject) > SUBJECT_LIMIT:
            return fact
        # whole words, and only one candidate: "US" is not a part of "bus", and ambiguous in "Us or us"
        spellings = re.findall(rf"(?<!\w){re.escape(fact.subject)}(?!\w)", fact.prompt, flags=re.IGNORECASE)
        if len(spellings) != 1:
            return fact
        subject, spelling = short(fact.subject), short(spellings[0])
        source = printable(self.source)
        log.info("%s, row %d: subject %s is spelled %s in the prompt", source, number, subject, spelling)
        return replace(fact, subject=spellings[0])

    def _problems(self, fact: Fact) -> Iterator[tuple[str, str]]:
        if len(fact.subject) > SUBJECT_LIMIT:
            yield "subject", f"has {len(fact.subject):,} characters; expected at most {SUBJECT_LIMIT:,}"
            return
        prompts = [("prompt", fact.prompt), *(("paraphrases", text) for text in fact.paraphrases)]
        prompts += [("neighbours", neighbour.prompt) for neighbour in fact.neighbours]
        prompts += [("probes", probe.prompt) for probe in fact.probes]
        for field, prompt in prompts:
            if count := count_placeholders(prompt, fact.subject):
                yield field, f"still holds '{PLACEHOLDER}' ({count} times); expected a complete prompt"
        if not count_placeholders(fact.prompt, fact.subject) and fact.subject not in fact.prompt:
            found = f"does not contain the subject {short(fact.subject)}"
            if normalize("NFC", fact.subject) in normalize("NFC", fact.prompt):
                found += " but in another Unicode normalisation"
            yield "prompt", f"{found}; expected it letter by letter in {short(fact.prompt)}"
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
            if text is not None and (message := self._token_problem(text)):
                wrong = True
                yield field, f"is {short(text)}, {message}"
        if wrong or fact.subject not in fact.prompt or not getattr(self._tokenizer, "is_fast", False):
            return
        try:
            encode(cast("PreTrainedTokenizerBase", self._tokenizer), [fact.prompt], [fact.target_new], [fact.subject])
        except ValueError as error:
            yield "prompt", f"has no edit token ({error}); expected tokens of the subject and of the target"

    def _token_problem(self, text: str) -> str | None:
        """Return the problem with the tokens of a subject or a target, if there is one."""
        assert self._tokenizer is not None
        if text not in self._token_problems:
            # with a space before it, as in a prompt
            ids = self._tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            message = None if ids else "for which the tokenizer returns no token; expected at least one"
            if special := self._special.intersection(ids):
                names = self._tokenizer.convert_ids_to_tokens(sorted(special))  # type: ignore[attr-defined]
                found = ", ".join(map(short, names))
                message = f"in which the tokenizer reads its special {found}; expected tokens of text"
            self._token_problems[text] = message
        return self._token_problems[text]


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
                problems += checked[: MAX_KEPT - len(problems)]
        unusable += refused
        if len(facts) == limit or (strict and len(problems) == MAX_KEPT):
            break
    facts = checker.shared.complete(facts, checker.remarks)
    if not problems:
        return facts
    headline = f"{unusable} of {seen} rows cannot be used"
    if strict or not facts:
        raise FactsError(checker.source, problems, headline)
    for problem in problems[:MAX_LOGGED]:
        log.warning("skipped: %s", problem)
    counts = first_few((f"{printable(field)} {count}" for field, count in fields.most_common()), MAX_LOGGED)
    log.warning("%s: %s and were skipped; problems by field: %s", printable(checker.source), headline, counts)
    return facts
