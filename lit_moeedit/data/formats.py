"""From a row to the fields of a fact: the formats in which other projects publish facts.

A format is data and a small function that takes typed, stripped texts out of a `Row`. Everything that is wrong with a
row is remembered in it, under the name that the field has *in the file*, so that a user sees all problems at once.

Formats:

- `native`: our own shape, `subject, prompt, target_new, target_true, paraphrases, neighbours[{prompt, target, group}]`.
  A single `{}` in the prompt or in a paraphrase stands for the subject. What fits into a table fits as well: one text
  for `paraphrases`, and `neighbour_prompts`, `neighbour_targets` and `neighbour_groups` (texts, or lists as long as
  each other) for `neighbours`. With `columns` a file may have other names for these fields.
- `counterfact`: CounterFact and multi-CounterFact as MEMIT (arXiv 2210.07229) reads them. The neighbourhood prompts
  have another subject but the same relation and the same true object, so `target_true` is their truth.
- `counterfact_flat`: one CounterFact prompt of each kind per row; the locality prompt is the neighbour.
- `zsre`: zsRE rows as MEND wrote them. `alt` is the target to edit in, the first of `answers` the truth (`pred`, the
  prediction of the model MEND edited, only where `answers` is empty). The locality question keeps its `nq question: `
  prefix: a neighbour is only compared with itself before the edit, and rewriting data would hide what was asked.
- `knowedit`: KnowEdit (arXiv 2401.01286) and what EasyEdit takes: `locality` and `portability` hold questions, one or
  many, by group or not. Locality questions are neighbours; those without an answer are left out, as EasyEdit does. A
  portability question is a paraphrase if it asks for the same fact by another name of the subject
  (`Subject_Aliasing`) and has the new target among its answers; the others ask for other facts and are left out.
- `knowedit_bio`: WikiBio in KnowEdit, where the fields are `concept`, `text` and `labels`.
- `mquake`: MQuAKE (arXiv 2305.14795). A row asks one question over several edits; each of them is a fact, and its own
  question the paraphrase. The questions over several hops are left out. Rows share edits, which are taken once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_moeedit.data.errors import FactError, short, typed, visible
from lit_moeedit.data.rows import Row

PLACEHOLDER = "{}"
NATIVE_FIELDS = ("subject", "prompt", "target_new", "target_true", "paraphrases", "neighbours")
TABLE_FIELDS = ("neighbour_prompts", "neighbour_targets", "neighbour_groups")
_SINGLE = ("subject", "prompt", "target_new", "target_true")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Format:
    """How one published shape of facts is recognised and read.

    Args:
        name: Its name.
        keys: Keys that a row of this format always has.
        read: Takes the fields of a fact out of a row, under our own names.
        names: Our name of a field to its name in the file, where they differ.
        some: Keys of which a row has at least one.
        many: Key of the list of facts, if a row holds several.
        columns: Our name of a field to its names in the file, for `Row`.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    some: tuple[str, ...] = ()
    many: str | None = None
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether `row` has the keys of this format."""
        has_keys = all(key in row for key in self.keys) and any(key in row for key in self.some or row)
        return has_keys and (self.many is None or isinstance(row[self.many], list))

    def rows(self, row: Mapping[str, Any]) -> list[Row]:
        """The facts of a row, unread: one row for each."""
        whole = Row(row, columns=self.columns)
        return [whole] if self.many is None else whole.parts(self.many)


def count_placeholders(prompt: str, subject: str) -> int:
    """How often `{}` stands in a prompt outside the subject, which may itself contain one."""
    return sum(part.count(PLACEHOLDER) for part in prompt.split(subject)) if subject else 0


def _fill(prompt: str, subject: str) -> str:
    if count_placeholders(prompt, subject) != 1:
        return prompt
    return subject.join(part.replace(PLACEHOLDER, subject) for part in prompt.split(subject))


# --- our own shape ---------------------------------------------------------------------------------------------------


def read_complete(row: Row) -> dict[str, Any]:
    """The fields of our own shape, with the prompt as it stands."""
    return {
        **_read_edit(row),
        "paraphrases": row.texts("paraphrases", line_ends=True),
        "neighbours": tuple(_read_neighbour(inner) for inner in row.rows("neighbours")),
    }


def _read_edit(row: Row) -> dict[str, Any]:
    return {
        "subject": row.text("subject"),
        "prompt": row.text("prompt", line_ends=True),
        "target_new": row.text("target_new"),
        "target_true": row.text_or_none("target_true"),
    }


def _read_neighbour(row: Row) -> tuple[str, ...]:
    neighbour, group = (row.text("prompt", line_ends=True), row.text("target")), row.text_or_none("group")
    return neighbour if group is None else (*neighbour, group)


def _read_native(row: Row) -> dict[str, Any]:
    fields = _read_edit(row)
    prompts, targets, groups = (
        row.texts(name, single=True, line_ends=name == "neighbour_prompts", paired=True) for name in TABLE_FIELDS
    )
    if len(targets) != len(prompts):
        row.fail("neighbour_targets", f"has {len(targets)} texts; expected {len(prompts)}, one for each prompt")
    if groups and len(groups) != len(prompts):
        row.fail("neighbour_groups", f"has {len(groups)} texts; expected {len(prompts)}, one for each prompt")
    table = zip(prompts, targets, groups, strict=False) if groups else zip(prompts, targets, strict=False)
    paraphrases = row.texts("paraphrases", single=True, line_ends=True)
    return {
        **fields,
        "prompt": _fill(fields["prompt"], fields["subject"]),
        "paraphrases": tuple(_fill(text, fields["subject"]) for text in paraphrases),
        "neighbours": (*(_read_neighbour(inner) for inner in row.rows("neighbours")), *table),
    }


def named_columns(columns: Mapping[str, str | Sequence[str]]) -> Format:
    """The native format with other names.

    Args:
        columns: Our name of a field to its name in the file; several names where the field is a list.

    Raises:
        ValueError: A field is unknown, has several names but one value, or no name.
    """
    known = tuple(name for name in (*NATIVE_FIELDS, *TABLE_FIELDS) if name != "neighbours")
    names = {ours: (given,) if isinstance(given, str) else tuple(given) for ours, given in columns.items()}
    for ours, given in names.items():
        if ours not in known:
            raise ValueError(f"columns names the field {ours!r}; expected some of {', '.join(known)}")
        if not given or (len(given) > 1 and ours in _SINGLE):
            raise ValueError(
                f"columns gives {ours} {len(given)} names; expected {'one' if ours in _SINGLE else 'some'}"
            )
    shown = {ours: given[0] for ours, given in names.items()}
    shown["neighbours"] = shown.get("neighbour_targets", "neighbour_targets")
    return Format("columns", (), _read_native, shown, columns=names)


# --- the shapes of others --------------------------------------------------------------------------------------------


def _read_rewrite(row: Row, at: str = "") -> dict[str, Any]:
    subject = row.text(f"{at}subject")
    return {
        "subject": subject,
        "prompt": _fill(row.text(f"{at}prompt"), subject),
        "target_new": row.text(f"{at}target_new.str"),
        "target_true": row.text(f"{at}target_true.str"),
    }


def _read_counterfact(row: Row) -> dict[str, Any]:
    fields = _read_rewrite(row, "requested_rewrite.")
    prompts = row.texts("neighborhood_prompts")
    return {
        **fields,
        "paraphrases": row.texts("paraphrase_prompts"),
        "neighbours": tuple((prompt, fields["target_true"], "same_relation") for prompt in prompts),
    }


def _read_mquake(row: Row) -> dict[str, Any]:
    return {**_read_rewrite(row), "paraphrases": row.texts("question", single=True)}


def _read_zsre(row: Row) -> dict[str, Any]:
    return {
        "subject": row.text("subject"),
        "prompt": row.text("src"),
        "target_new": row.text("alt"),
        "target_true": next(iter(row.texts("answers")), None) or row.text("pred"),
        "paraphrases": row.texts("rephrase", single=True),
        "neighbours": _read_locality(row, "loc", "loc_ans", "unrelated"),
    }


def _read_locality(row: Row, prompt: str, answer: str, group: str) -> tuple[tuple[str, ...], ...]:
    """One locality prompt or several, with as many answers."""
    prompts = row.texts(prompt, single=True, paired=True)
    if not prompts:
        return ()
    answers = row.texts(answer, single=True, paired=True) if answer in row.data else (row.text(answer),)
    if len(answers) != len(prompts):
        row.fail(answer, f"has {len(answers)} texts; expected {len(prompts)}, one for each of {prompt}")
    return tuple((text, reply, group) for text, reply in zip(prompts, answers, strict=False))


def _read_counterfact_flat(row: Row) -> dict[str, Any]:
    return {
        "subject": row.text("subject"),
        "prompt": row.text("prompt"),
        "target_new": row.text("target_new"),
        "target_true": next(iter(row.texts("ground_truth", single=True)), None),
        "paraphrases": row.texts("rephrase_prompt", single=True),
        "neighbours": _read_locality(row, "locality_prompt", "locality_ground_truth", "same_relation"),
    }


def _read_knowedit(row: Row) -> dict[str, Any]:
    fields = _read_counterfact_flat(row)
    aliases = [
        text
        for group, text, answers in _questions(row, "portability")
        if group.casefold().replace(" ", "_") in ("subject_aliasing", "synonym") and fields["target_new"] in answers
    ]
    local = [(text, answers[0], group) for group, text, answers in _questions(row, "locality") if answers]
    return {
        **fields,
        "paraphrases": (*fields["paraphrases"], *row.texts("rephrase", single=True), *aliases),
        "neighbours": (*fields["neighbours"], *local),
    }


def _read_knowedit_bio(row: Row) -> dict[str, Any]:
    return {
        "subject": row.text("concept"),
        "prompt": row.text("text", line_ends=True),
        "target_new": row.text("labels"),
        "neighbours": tuple((text, found[0], group) for group, text, found in _questions(row, "locality") if found),
    }


def _questions(row: Row, name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Group, prompt and answers of every question below `name`, which may hold them in any of EasyEdit's shapes.

    `{group: questions}` or questions alone; these are one object or a list of them; and an object has a prompt with
    its answers, or a list of prompts with as many entries of answers.
    """
    value = row.data.get(name)
    is_grouped = isinstance(value, Mapping) and not {"prompt", "ground_truth"} & value.keys()
    groups = value.items() if is_grouped else [(name, value)]  # type: ignore[union-attr]
    for group, questions in groups:
        where = f"{name}.{visible(group)}" if is_grouped else name
        for index, question in enumerate(questions if isinstance(questions, list) else [questions]):
            at = f"{where}[{index}]" if isinstance(questions, list) else where
            if question is None:
                continue
            if not isinstance(question, Mapping):
                row.fail(at, f"is {typed(question)}; expected an object with 'prompt' and 'ground_truth'")
                continue
            prompt, answers = question.get("prompt"), question.get("ground_truth")
            if isinstance(prompt, list):
                if not isinstance(answers, list) or len(answers) != len(prompt):
                    expected = f"expected a list of {len(prompt)}, one for each prompt"
                    row.fail(f"{at}.ground_truth", f"is {typed(answers)}; {expected}")
                    continue
                pairs = list(zip(prompt, answers, strict=True))
            else:
                pairs = [(prompt, answers)]
            for text, found in pairs:
                inner = Row({"prompt": text, "ground_truth": list(_flat(found))})
                yield group, inner.text("prompt"), list(inner.texts("ground_truth"))
                for field_name, message in inner.problems:
                    row.fail(f"{at}.{field_name}", message)


def _flat(value: object) -> Iterator[object]:
    """The answers in a list of answers, each of which may be a list of its spellings; empty ones stand for none."""
    left = [value]  # no recursion: a file may nest deeper than Python calls
    while left:
        item = left.pop()
        if isinstance(item, list):
            left += reversed(item)
        elif item is not None and item != "":
            yield item


_FLAT_NAMES = {"target_true": "ground_truth", "neighbours": "locality_ground_truth"}
_EDIT = ("subject", "prompt", "target_new")
# In the order of detection: the keys of the native format are a part of others' keys.
_ALL = (
    Format(
        "mquake",
        ("requested_rewrite",),
        _read_mquake,
        {"target_new": "target_new.str", "target_true": "target_true.str", "paraphrases": "question"},
        many="requested_rewrite",
    ),
    Format(
        "counterfact",
        ("requested_rewrite",),
        _read_counterfact,
        {
            "subject": "requested_rewrite.subject",
            "prompt": "requested_rewrite.prompt",
            "target_new": "requested_rewrite.target_new.str",
            "target_true": "requested_rewrite.target_true.str",
            "paraphrases": "paraphrase_prompts",
            "neighbours": "neighborhood_prompts",
        },
    ),
    Format(
        "zsre",
        ("subject", "src", "alt"),
        _read_zsre,
        {
            "prompt": "src",
            "target_new": "alt",
            "target_true": "answers",
            "paraphrases": "rephrase",
            "neighbours": "loc_ans",
        },
    ),
    Format(
        "knowedit",
        _EDIT,
        _read_knowedit,
        {**_FLAT_NAMES, "neighbours": "locality"},
        some=("locality", "portability"),
    ),
    Format(
        "knowedit_bio",
        ("concept", "text", "labels"),
        _read_knowedit_bio,
        {"subject": "concept", "prompt": "text", "target_new": "labels", "neighbours": "locality"},
    ),
    Format(
        "counterfact_flat",
        (*_EDIT, "ground_truth"),
        _read_counterfact_flat,
        {**_FLAT_NAMES, "paraphrases": "rephrase_prompt"},
    ),
    Format("native", _EDIT, _read_native, {}),
)
FORMATS: Mapping[str, Format] = {fmt.name: fmt for fmt in _ALL}


def detect_format(file: str, number: int, row: Mapping[str, Any]) -> Format:
    """The format whose keys `row` has.

    Raises:
        FactError: No format fits; the message names the keys found and the formats known.
    """
    for candidate in _ALL:
        if candidate.fits(row):
            return candidate
    found = ", ".join(short(key) for key in list(row)[:_SHOWN]) or "no keys"
    known = "; ".join(f"{fmt.name} ({', '.join(fmt.keys)})" for fmt in _ALL)
    raise FactError(file, number, None, f"has {found}, which is no known format; expected the keys of one of: {known}")
