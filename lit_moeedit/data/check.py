"""The command ``facts check``: what is understood of a facts file, before anything is edited."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import closing
from pathlib import Path
from unicodedata import is_normalized

from rich.console import Console

from lit_moeedit.data.encoding import is_within_word, subject_span
from lit_moeedit.data.errors import FactError, short, visible
from lit_moeedit.data.facts import Checker, Fact, choose_format
from lit_moeedit.data.row_files import load_rows
from lit_moeedit.pretrained import pretrained_tokenizer

_EXAMPLES = 2
_ROWS = 8
"""So many row numbers stand behind a problem or a remark."""
_KINDS = 50
"""So many fields, groups or remarks are told apart."""
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|&(#\d+|[A-Za-z]+);")


def check(
    path: Path,
    format: str = "auto",
    columns: dict[str, str | list[str]] | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
) -> None:
    """Tell what is understood of a facts file: format, counts, examples, and what is wrong in which rows.

    The file is read row by row and may be larger than memory. The exit code is 1 if a row cannot be used.

    Args:
        path: a .json, .jsonl, .csv or .tsv file.
        format: name of its format; auto decides by the keys of the first row.
        columns: our names of fields to those of the file, such as '{target_new: new, paraphrases: [p1, p2]}'.
        limit: stop after this many usable facts.
        tokenizer: folder or hub id of a tokenizer, to check that it has tokens for subjects, targets and edit tokens.

    Raises:
        ValueError: if an option is wrong, or rows cannot be used.
        OSError: if the file or the tokenizer cannot be read.

    Example:
        lit-moeedit facts check facts.csv --columns '{subject: name, prompt: question, target_new: answer}'
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    chosen, loaded = choose_format(format, columns), None
    if tokenizer is not None:
        loaded = pretrained_tokenizer(tokenizer)
    checker, summary = Checker(str(path), chosen, loaded), Summary()
    with closing(load_rows(path)) as rows:
        for number, data in rows:
            summary.rows += 1
            summary.add(number, list(checker.check(number, data)))
            if limit is not None and summary.facts >= limit:
                break
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    for line in summary.lines(checker):
        console.print(line)
    checker.warn_ignored_fields()
    if summary.refused:
        headline = f"{summary.refused:,} of {summary.rows:,} rows cannot be used"
        raise FactError(checker.source, None, None, headline)


class Summary:
    """Counts, examples and problems of the rows seen, in bounded memory."""

    def __init__(self) -> None:
        self.rows = self.refused = self.facts = 0
        self.counts: Counter[str] = Counter()
        self.groups: Counter[str] = Counter()
        self.examples: list[tuple[int, Fact]] = []
        self.problems: dict[str, _Rows] = {}
        self.remarks: dict[str, _Rows] = {}

    def add(self, number: int, checked: list[Fact | list[FactError]]) -> None:
        """Count what a row holds."""
        self.refused += any(not isinstance(part, Fact) for part in checked)
        for part in checked:
            if isinstance(part, Fact):
                self._add_fact(number, part)
                continue
            for problem in part:
                field = re.sub(r"\[\d+\]", "[]", problem.field or "row")
                _note(self.problems, field, number, problem.message)

    def _add_fact(self, number: int, fact: Fact) -> None:
        self.facts += 1
        for name, held in (
            ("true target", int(fact.target_true is not None)),
            ("paraphrases", len(fact.paraphrases)),
            ("neighbours", len(fact.neighbours)),
        ):
            self.counts[name] += held > 0
            self.counts[f"{name} in all"] += held
        for neighbour in fact.neighbours:
            known = neighbour.group in self.groups or len(self.groups) < _KINDS
            self.groups[neighbour.group if known else "others"] += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append((number, fact))
        for remark in remarks(fact):
            _note(self.remarks, remark, number, "")

    def lines(self, checker: Checker) -> list[str]:
        """The summary for people, every text of the file escaped."""
        name = "of no known format" if checker.format is None else f"of the format {checker.format.name}"
        lines = [f"{visible(checker.source)}: {self.rows:,} rows {name}"]
        lines.append(f"  {self.facts:,} usable facts, {self.refused:,} rows that cannot be used")
        if checker.repeats:
            lines.append(f"  {checker.repeats:,} repetitions of an edit of an earlier row, left out")
        for kind in ("true target", "paraphrases", "neighbours"):
            total = "" if kind == "true target" else f" ({self.counts[f'{kind} in all']:,} in all)"
            lines.append(f"  {self.counts[kind]:,} with {kind}{total}")
        groups = ", ".join(f"{visible(group)} {count:,}" for group, count in self.groups.most_common())
        lines += [f"  neighbours by group: {groups}"] if groups else []
        for number, fact in self.examples:
            lines.append(f"Example, row {number}: {short(fact.subject)}")
            lines.append(f"  prompt      {short(fact.prompt, 100)}")
            lines.append(f"  target      {short(fact.target_true)} -> {short(fact.target_new)}")
            lines += [f"  paraphrase  {short(text, 100)}" for text in fact.paraphrases[:1]]
            lines += [f"  neighbour   {short(n.prompt, 100)}: {short(n.target)}" for n in fact.neighbours[:1]]
        for field, rows in self.problems.items():
            lines += [f"Problem, field {visible(field)}: {rows}", f"  row {rows.numbers[0]}: {rows.message}"]
        lines += [f"Remark, {remark}: {rows}" for remark, rows in self.remarks.items()]
        return lines


class _Rows:
    """How many rows, and the numbers of the first ones."""

    def __init__(self, message: str) -> None:
        self.count = self.last = 0
        self.numbers: list[int] = []
        self.message = message

    def add(self, number: int) -> None:
        """Count a row, once however often it is named."""
        if number != self.last:
            self.count, self.last = self.count + 1, number
            self.numbers += [number] if len(self.numbers) < _ROWS else []

    def __str__(self) -> str:
        more = f" and {self.count - len(self.numbers):,} more" if self.count > len(self.numbers) else ""
        return f"{self.count:,} (rows {', '.join(map(str, self.numbers))}{more})"


def _note(kinds: dict[str, _Rows], kind: str, number: int, message: str) -> None:
    if kind not in kinds and len(kinds) >= _KINDS:
        kind = "others"
    kinds.setdefault(kind, _Rows(message)).add(number)


def remarks(fact: Fact) -> list[str]:
    """What may be used as it is, but is seldom meant.

    Example:
        >>> remarks(Fact("Rome", "<b>Rome</b> lies in", "Spain"))
        ['markup']
    """
    texts = [fact.subject, fact.prompt, fact.target_new, fact.target_true or "", *fact.paraphrases]
    start, end = subject_span(fact.prompt, fact.subject)
    texts += [text for neighbour in fact.neighbours for text in (neighbour.prompt, neighbour.target)]
    found = {
        "markup": any(map(_MARKUP.search, texts)),
        "characters that cannot be seen (of no width, or turning the direction)": any(map(_INVISIBLE.search, texts)),
        "replacement characters of an earlier wrong decoding": any("\ufffd" in text for text in texts),
        "letters not composed (Unicode NFC)": not all(is_normalized("NFC", text) for text in texts),
        "a prompt that ends with a line break": fact.prompt.endswith("\n"),
        "a subject within a longer word": is_within_word(fact.prompt, start) or is_within_word(fact.prompt, end),
        "a subject that stands twice in its prompt (the last one counts)": fact.prompt.count(fact.subject) > 1,
    }
    return [remark for remark, is_so in found.items() if is_so]
