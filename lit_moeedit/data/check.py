"""The command ``facts check``: a summary of a facts file, before anything is edited."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import closing
from pathlib import Path
from unicodedata import is_normalized

from rich.console import Console

from lit_moeedit.data.encoding import is_within_word, subject_span
from lit_moeedit.data.errors import FactError, short
from lit_moeedit.data.facts import Checker, Fact, choose_format
from lit_moeedit.data.row_files import load_rows
from lit_moeedit.pretrained import pretrained_tokenizer
from lit_moeedit.text import first_few, printable

_MAX_EXAMPLES = 2
_MAX_ROWS = 8
"""Maximum number of row numbers listed for a problem or a remark."""
_MAX_KINDS = 50
"""Maximum number of fields, groups or remarks that are counted separately."""
_INVISIBLE = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_MARKUP = re.compile(r"</?[A-Za-z][^<>]*>|&(#\d+|[A-Za-z]+);")


def check(
    path: Path,
    format: str = "auto",
    columns: dict[str, str | list[str]] | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
) -> None:
    """Print a summary of a facts file: format, counts, examples, and the problems of its rows.

    The file is read row by row and may be larger than memory. The exit code is 1 if a row cannot be used.

    Args:
        path: a .json, .jsonl, .csv or .tsv file.
        format: name of its format; auto chooses it by the keys of the first row.
        columns: field names to column names of the file, such as '{target_new: new, paraphrases: [p1, p2]}'.
        limit: stop after this many usable facts.
        tokenizer: folder or hub id of a tokenizer, to check the tokens of subjects, targets and edit tokens.

    Raises:
        ValueError: an option is not valid, or rows cannot be used.
        OSError: the file or the tokenizer cannot be read.

    Example:
        lit-moeedit facts check facts.csv --columns '{subject: name, prompt: question, target_new: answer}'
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    loaded = None if tokenizer is None else pretrained_tokenizer(tokenizer)
    checker, summary = Checker(str(path), choose_format(format, columns), loaded), Summary()
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
        self.kinds: Counter[str] = Counter()
        self.examples: list[tuple[int, Fact]] = []
        self.problems: dict[str, _Rows] = {}
        self.remarks: dict[str, _Rows] = {}

    def add(self, number: int, checked: list[Fact | list[FactError]]) -> None:
        """Count the facts and problems of a row."""
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
        self.kinds.update(probe.kind for probe in fact.probes)
        for neighbour in fact.neighbours:
            known = neighbour.group in self.groups or len(self.groups) < _MAX_KINDS
            self.groups[neighbour.group if known else "others"] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append((number, fact))
        for remark in remarks(fact):
            _note(self.remarks, remark, number, "")

    def lines(self, checker: Checker) -> list[str]:
        """Format the summary, with all texts of the file escaped."""
        name = "of no known format" if checker.format is None else f"of the format {checker.format.name}"
        lines = [f"{printable(checker.source)}: {self.rows:,} rows {name}"]
        lines.append(f"  {self.facts:,} usable facts, {self.refused:,} rows that cannot be used")
        if checker.repeats:
            lines.append(f"  {checker.repeats:,} repetitions of an edit of an earlier row, left out")
        for kind in ("true target", "paraphrases", "neighbours"):
            total = "" if kind == "true target" else f" ({self.counts[f'{kind} in all']:,} in all)"
            lines.append(f"  {self.counts[kind]:,} with {kind}{total}")
        groups = ", ".join(f"{printable(group)} {count:,}" for group, count in self.groups.most_common())
        lines += [f"  neighbours by group: {groups}"] if groups else []
        if kinds := self.kinds + checker.shared.late:
            lines.append(f"  probes by kind: {', '.join(f'{kind} {count:,}' for kind, count in kinds.most_common())}")
        for number, fact in self.examples:
            lines.append(f"Example, row {number}: {short(fact.subject)}")
            lines.append(f"  prompt      {short(fact.prompt, 100)}")
            lines.append(f"  target      {short(fact.target_true)} -> {short(fact.target_new)}")
            lines += [f"  paraphrase  {short(text, 100)}" for text in fact.paraphrases[:1]]
            lines += [f"  neighbour   {short(n.prompt, 100)}: {short(n.target)}" for n in fact.neighbours[:1]]
        for field, rows in self.problems.items():
            lines += [f"Problem, field {printable(field)}: {rows}", f"  row {rows.numbers[0]}: {rows.message}"]
        lines += [f"Remark, {remark}: {rows}" for remark, rows in self.remarks.items()]
        lines += [f"Remark, {remark}: {count:,}" for remark, count in checker.remarks.items()]
        return lines


class _Rows:
    """A count of rows, with the numbers of the first ones."""

    def __init__(self, message: str) -> None:
        self.count = self.last = 0
        self.numbers: list[int] = []
        self.message = message

    def add(self, number: int) -> None:
        """Count a row; repeated calls for the same row count once."""
        if number != self.last:
            self.count, self.last = self.count + 1, number
            self.numbers += [number] if len(self.numbers) < _MAX_ROWS else []

    def __str__(self) -> str:
        return f"{self.count:,} (rows {first_few(self.numbers, _MAX_ROWS, total=self.count)})"


def _note(kinds: dict[str, _Rows], kind: str, number: int, message: str) -> None:
    if kind not in kinds and len(kinds) >= _MAX_KINDS:
        kind = "others"
    kinds.setdefault(kind, _Rows(message)).add(number)


def remarks(fact: Fact) -> list[str]:
    """List properties of a fact that are allowed, but rarely intended.

    Example:
        >>> remarks(Fact("Rome", "<b>Rome</b> lies in", "Spain"))
        ['markup']
    """
    texts = [fact.subject, fact.prompt, fact.target_new, fact.target_true or "", *fact.paraphrases]
    start, end = subject_span(fact.prompt, fact.subject)
    texts += [text for neighbour in fact.neighbours for text in (neighbour.prompt, neighbour.target)]
    found = {
        "markup": any(map(_MARKUP.search, texts)),
        "invisible characters (of no width, or changing the direction of writing)": any(map(_INVISIBLE.search, texts)),
        "replacement characters of an earlier wrong decoding": any("\ufffd" in text for text in texts),
        "letters that are not composed (Unicode NFC)": not all(is_normalized("NFC", text) for text in texts),
        "a prompt that ends with a line break": fact.prompt.endswith("\n"),
        "a subject within a longer word": is_within_word(fact.prompt, start) or is_within_word(fact.prompt, end),
        "a subject that occurs twice in its prompt (the last one counts)": fact.prompt.count(fact.subject) > 1,
    }
    return [remark for remark, is_so in found.items() if is_so]
