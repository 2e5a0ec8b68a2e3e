"""From a file of facts to checked fields: the formats in which other projects publish facts.

Files are untrusted input. `load_rows` turns a file into numbered rows, `detect_format` picks the format from the keys
of a row, and a format's `read` pulls typed, stripped texts out of one row. Everything that is wrong with a row is
remembered in its `Row`, under the name the field has *in the file*, so that a user sees all problems at once.

Formats:

- `native`: our own shape, `subject, prompt, target_new, target_true, paraphrases, neighbours[{prompt, target, group}]`.
  A single `{}` in the prompt stands for the subject.
- `counterfact`: CounterFact as MEMIT (arXiv 2210.07229) reads it. The neighbourhood prompts have another subject but
  the same relation and the same true object, so `target_true` is their truth.
- `counterfact_flat`: one CounterFact prompt of each kind per row; the locality prompt is the neighbour.
- `zsre`: zsRE rows as MEND wrote them. `alt` is the target to edit in, the first of `answers` the truth (`pred`, the
  prediction of the model MEND edited, only where `answers` is empty). The locality question keeps its `nq question: `
  prefix: a neighbour is only compared with itself before the edit, and rewriting data would hide what was asked.
"""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACEHOLDER = "{}"
NATIVE_FIELDS = ("subject", "prompt", "target_new", "target_true", "paraphrases", "neighbours")
_MISSING, _BROKEN = object(), object()
_SHOWN = 20


class FactError(ValueError):
    """Something in a source of facts cannot be used.

    Args:
        file: The file as the caller named it, or the source of facts made in memory.
        row: 1-based row, in a `.jsonl` file the line; `None` if the whole file is meant.
        field: Name of the field as the file spells it; `None` if the whole row is meant.
        message: What was found and what was expected.
    """

    def __init__(self, file: str, row: int | None, field: str | None, message: str) -> None:
        super().__init__(file, row, field, message)
        self.file = file
        self.row = row
        self.field = field
        self.message = message

    def __str__(self) -> str:
        row = "" if self.row is None else f", row {self.row}"
        field = "" if self.field is None else f", field '{self.field}'"
        return f"{self.file}{row}{field}: {self.message}"


class FactsError(FactError):
    """Several rows cannot be used; `row` and `field` are those of the first problem.

    Args:
        file: The file as the caller named it, or the source of facts made in memory.
        problems: Every problem found, at least one.
        headline: What the problems mean for the whole, e.g. `"2 of 9 rows cannot be used"`.
    """

    def __init__(self, file: str, problems: Sequence[FactError], headline: str) -> None:
        super().__init__(file, problems[0].row, problems[0].field, headline)
        self.args = (file, problems, headline)
        self.problems = list(problems)

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.message}", *(f"  {problem}" for problem in self.problems[:_SHOWN])]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more problems")
        return "\n".join(lines)


def short(value: object, width: int = 60) -> str:
    """One-line `repr` for messages, bounded in length and depth because values come from untrusted files."""
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= width else f"{text[:width]}..."


def typed(value: object) -> str:
    """`short` with the type, for a value that should have had another one."""
    return "null" if value is None else f"{short(value)} ({type(value).__name__})"


class Row:
    """Typed access to one untrusted row, which remembers every problem instead of stopping at the first.

    Args:
        data: The row.
        clean: Strip texts and refuse empty ones; `False` checks types only and leaves texts as they are.
    """

    def __init__(self, data: Mapping[str, Any], *, clean: bool = True) -> None:
        self.data = data
        self.clean = clean
        self.problems: list[tuple[str, str]] = []
        self._prefix = ""

    def fail(self, field: str, message: str) -> None:
        """Remember that `field` cannot be used."""
        problem = (self._prefix + field, message)
        if problem not in self.problems:
            self.problems.append(problem)

    def text(self, path: str) -> str:
        """The text at a dotted `path`, which must be there; `""` after a problem."""
        value = self._get(path)
        if value is _MISSING:
            self.fail(path, "is missing; expected a text")
        return "" if value is _MISSING or value is _BROKEN else self._text(path, value)

    def text_or_none(self, path: str) -> str | None:
        """The text at a dotted `path`, `None` if it is absent or null."""
        value = self._get(path)
        return None if value is None or value is _MISSING or value is _BROKEN else self._text(path, value)

    def texts(self, path: str) -> tuple[str, ...]:
        """The list of texts at `path`, empty if it is absent or null."""
        return tuple(self._text(f"{path}[{index}]", item) for index, item in enumerate(self._list(path, "texts")))

    def rows(self, path: str) -> list[Row]:
        """The list of objects at `path`, empty if it is absent or null; their problems are added to this row's."""
        inner_rows = []
        for index, item in enumerate(self._list(path, "objects")):
            if not isinstance(item, Mapping):
                self.fail(f"{path}[{index}]", f"is {typed(item)}; expected an object")
                continue
            inner = Row(item, clean=self.clean)
            inner.problems, inner._prefix = self.problems, f"{self._prefix}{path}[{index}]."
            inner_rows.append(inner)
        return inner_rows

    def _get(self, path: str) -> object:
        value: object = self.data
        walked: list[str] = []
        for key in path.split("."):
            if not isinstance(value, Mapping):
                self.fail(".".join(walked), f"is {typed(value)}; expected an object")
                return _BROKEN
            walked.append(key)
            value = value.get(key, _MISSING)
            if value is _MISSING:
                return _MISSING
        return value

    def _list(self, path: str, content: str) -> Sequence[object]:
        value = self._get(path)
        if value is None or value is _MISSING or value is _BROKEN:
            return ()
        if not isinstance(value, list | tuple):
            self.fail(path, f"is {typed(value)}; expected a list of {content}")
            return ()
        return value

    def _text(self, field: str, value: object) -> str:
        if not isinstance(value, str):
            self.fail(field, f"is {typed(value)}; expected a text")
            return ""
        if not self.clean:
            return value
        if not value.strip():
            self.fail(field, f"is {short(value)}; expected a text that is not empty")
        elif any("\ud800" <= character <= "\udfff" for character in value):
            self.fail(field, f"is {short(value)}, with half of a surrogate pair; expected valid Unicode")
        return value.strip()


def count_placeholders(prompt: str, subject: str) -> int:
    """How often `{}` stands in `prompt` outside the subject, which may itself contain one."""
    return sum(part.count(PLACEHOLDER) for part in prompt.split(subject)) if subject else 0


def _fill(prompt: str, subject: str) -> str:
    if count_placeholders(prompt, subject) != 1:
        return prompt
    return subject.join(part.replace(PLACEHOLDER, subject) for part in prompt.split(subject))


def read_complete(row: Row) -> dict[str, Any]:
    """The fields of our own shape, with the prompt as it stands."""
    return {
        "subject": row.text("subject"),
        "prompt": row.text("prompt"),
        "target_new": row.text("target_new"),
        "target_true": row.text_or_none("target_true"),
        "paraphrases": row.texts("paraphrases"),
        "neighbours": tuple(_read_neighbour(inner) for inner in row.rows("neighbours")),
    }


def _read_neighbour(row: Row) -> tuple[str, ...]:
    neighbour, group = (row.text("prompt"), row.text("target")), row.text_or_none("group")
    return neighbour if group is None else (*neighbour, group)


def _read_native(row: Row) -> dict[str, Any]:
    fields = read_complete(row)
    return {**fields, "prompt": _fill(fields["prompt"], fields["subject"])}


def _read_counterfact(row: Row) -> dict[str, Any]:
    subject = row.text("requested_rewrite.subject")
    truth = row.text("requested_rewrite.target_true.str")
    return {
        "subject": subject,
        "prompt": _fill(row.text("requested_rewrite.prompt"), subject),
        "target_new": row.text("requested_rewrite.target_new.str"),
        "target_true": truth,
        "paraphrases": row.texts("paraphrase_prompts"),
        "neighbours": tuple((prompt, truth, "same_relation") for prompt in row.texts("neighborhood_prompts")),
    }


def _read_single(row: Row, rephrase: str, locality: tuple[str, str], group: str) -> dict[str, Any]:
    paraphrase = row.text_or_none(rephrase)
    prompt = row.text_or_none(locality[0])
    return {
        "paraphrases": () if paraphrase is None else (paraphrase,),
        "neighbours": () if prompt is None else ((prompt, row.text(locality[1]), group),),
    }


def _read_counterfact_flat(row: Row) -> dict[str, Any]:
    return {
        "subject": row.text("subject"),
        "prompt": row.text("prompt"),
        "target_new": row.text("target_new"),
        "target_true": row.text_or_none("ground_truth"),
        **_read_single(row, "rephrase_prompt", ("locality_prompt", "locality_ground_truth"), "same_relation"),
    }


def _read_zsre(row: Row) -> dict[str, Any]:
    return {
        "subject": row.text("subject"),
        "prompt": row.text("src"),
        "target_new": row.text("alt"),
        "target_true": next(iter(row.texts("answers")), None) or row.text("pred"),
        **_read_single(row, "rephrase", ("loc", "loc_ans"), "unrelated"),
    }


@dataclass(frozen=True, slots=True)
class Format:
    """How one published shape of facts is recognised and read.

    Args:
        keys: Keys that a row of this format always has.
        read: Takes the fields of a fact out of a row, under our own names.
        names: Our name of a field to its name in the file, where they differ.
    """

    keys: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    names: Mapping[str, str]


# In the order of detection: the native keys are a part of the keys of the flat CounterFact rows.
FORMATS: Mapping[str, Format] = {
    "counterfact": Format(
        ("requested_rewrite",),
        _read_counterfact,
        {
            "subject": "requested_rewrite.subject",
            "prompt": "requested_rewrite.prompt",
            "target_new": "requested_rewrite.target_new.str",
            "target_true": "requested_rewrite.target_true.str",
            "neighbours": "neighborhood_prompts",
        },
    ),
    "zsre": Format(
        ("subject", "src", "alt"),
        _read_zsre,
        {"prompt": "src", "target_new": "alt", "target_true": "answers", "neighbours": "loc_ans"},
    ),
    "counterfact_flat": Format(
        ("subject", "prompt", "target_new", "ground_truth"),
        _read_counterfact_flat,
        {"target_true": "ground_truth", "neighbours": "locality_ground_truth"},
    ),
    "native": Format(("subject", "prompt", "target_new"), _read_native, {}),
}


def detect_format(file: str, number: int, row: Mapping[str, Any]) -> Format:
    """The format whose keys `row` has.

    Raises:
        FactError: No format fits; the message names the keys found and the formats known.
    """
    for candidate in FORMATS.values():
        if all(key in row for key in candidate.keys):
            return candidate
    found = ", ".join(short(key) for key in list(row)[:_SHOWN]) or "no keys"
    known = "; ".join(f"{name} ({', '.join(fmt.keys)})" for name, fmt in FORMATS.items())
    raise FactError(file, number, None, f"has {found}, which is no known format; expected the keys of one of: {known}")


def load_rows(path: Path) -> list[tuple[int, object]]:
    """Read a `.json` list or a `.jsonl` file into numbered rows.

    Returns:
        Pairs of the row's number (from 1; in `.jsonl` the line, so blank lines count) and the row. A row of a `.jsonl`
        file that is not valid JSON is given as the `FactError` that says so, because the other rows can still be used.

    Raises:
        FactError: Suffix, encoding, syntax or top-level type of the file is not as expected, or it holds no rows.
        OSError: The file cannot be opened.
    """
    file, suffix = str(path), path.suffix.lower()
    if suffix not in {".json", ".jsonl"}:
        raise FactError(file, None, None, f"has the suffix {short(path.suffix)}; expected '.json' or '.jsonl'")
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"is not valid UTF-8 (byte {data[error.start]:#04x} in line {line}); expected a UTF-8 file"
        raise FactError(file, line if suffix == ".jsonl" else None, None, found) from error

    rows: list[tuple[int, object]]
    if suffix == ".jsonl":
        # Not `splitlines`: it would also split at U+2028 and its like, which may stand inside a JSON string.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(number, _parse(file, number, line, "one object per line")) for number, line in lines]
    else:
        content = _parse(file, None, text, "a list of objects")
        if isinstance(content, FactError):
            raise content
        if not isinstance(content, list):
            raise FactError(file, None, None, f"is {typed(content)} at the top; expected a list of objects")
        rows = list(enumerate(content, start=1))
    if not rows:
        raise FactError(file, None, None, "holds no rows; expected at least one fact")
    return rows


def _parse(file: str, row: int | None, text: str, expected: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at column {error.colno}" if row else f"{error.msg} at line {error.lineno}"
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, lists nested as deep
        where = short(str(error), width=100)
    return FactError(file, row, None, f"is not valid JSON ({where}); expected {expected}")
