"""The formats of facts files: from a row to the fields of a fact.

A format is a table of names and a small function that takes typed, stripped texts out of a `Row`. The row collects all
its problems, under the names that the fields have *in the file*, so that a user sees all of them at once.

In every format an answer may also be a number or a truth value (read as the file writes it), and a single text a list
of one text or an object `{"str": text}`. A `target_true` that equals `target_new` counts as unknown.

Formats:

- `native`: our own, `subject, prompt, target_new, target_true, paraphrases, neighbours[{prompt, target, group}],
  probes[{kind, prompt, answers}]`. A single `{}` in the prompt, in a paraphrase or in the prompt of a probe stands for
  the subject. A table may have one text for `paraphrases`,
  and `neighbour_prompts`, `neighbour_targets` and `neighbour_groups` (texts, or lists of the same length) for
  `neighbours`. With `columns` a file may have other names for these fields.
- `counterfact`: CounterFact and multi-CounterFact as MEMIT (arXiv 2210.07229) reads them, with or without the wrapper
  `requested_rewrite`. The neighbourhood prompts have another subject but the same relation and the same true object, so
  `target_true` is their true answer. Without it they have none, and are left out.
- `counterfact_flat`: one CounterFact prompt of each kind per row; the locality prompt is the neighbour.
- `zsre`: zsRE rows in MEND's format. `alt` is the new target, the first of `answers` the true one; if there are none,
  it is `pred`, the prediction of the model that MEND edited, or unknown. The locality question keeps its prefix
  `nq question: `, because a neighbour is compared only with itself before the edit.
- `knowedit`: KnowEdit (arXiv 2401.01286), the format of EasyEdit. `locality` and `portability` hold one question or
  many, by group or not. Locality questions are neighbours; those without an answer are left out, as in EasyEdit. A
  portability question is a probe: `reversed` or `multi_hop` if its group says so, otherwise `portability`. It is also
  a paraphrase if it asks for the same fact by another name of the subject (`Subject_Aliasing`) and has the new target
  among its answers.
- `knowedit_bio`: WikiBio in KnowEdit, with the fields `concept`, `text` and `labels`.
- `mquake`: MQuAKE (arXiv 2305.14795). A row has several edits; each of them is a fact, and its question is the
  paraphrase. Rows share edits, and each edit is taken once. The multi-hop questions of a row, which follow from all
  of its edits together, are probes of the last of these edits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_moeedit.data.errors import FactError, short
from lit_moeedit.data.probes import ProbeFields, mquake_probes, portability_probes, questions, read_probes
from lit_moeedit.data.rows import Row, near_key
from lit_moeedit.text import first_few, printable

PLACEHOLDER = "{}"
NATIVE_FIELDS = ("subject", "prompt", "target_new", "target_true", "paraphrases", "neighbours", "probes")
TABLE_FIELDS = ("neighbour_prompts", "neighbour_targets", "neighbour_groups")
_SINGLE = ("subject", "prompt", "target_new", "target_true")
_MAX_KEYS_SHOWN = 20
_LIKELY_NAMES = {
    "subject": ("subject", "entity", "name", "head", "topic", "title", "concept"),
    "prompt": ("prompt", "question", "query", "cloze", "template", "sentence", "input", "text"),
    "target_new": ("new", "false", "counterfactual", "edit", "target", "answer", "object", "tail", "label", "output"),
}
"""For the fields that every fact has, parts of names that others give them, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Format:
    """A published format of facts: its keys, and a function that reads a row.

    Args:
        name: Its name.
        keys: Keys that every row of this format has.
        read: Reads the fields of a fact from a row.
        names: Field name to name (or names) in the file, where they differ.
        some: Keys of which every row has at least one.
        many: Key of the list of facts, if a row may have several.
        shared: Reads the probes of a whole row, if it may have several facts.
        wrapper: Key of an object with the fields whose names begin with it. A row without it has these fields itself.
        required: Names that every row must have, although the field is optional.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    names: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    some: tuple[str, ...] = ()
    many: str | None = None
    shared: Callable[[Row], tuple[ProbeFields, ...]] | None = None
    required: Collection[str] = ()
    wrapper: str | None = None

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Return true if `row` has the keys of this format."""
        if self.wrapper is not None and self.wrapper in row:
            return True
        has_keys = all(key in row for key in self.keys) and any(key in row for key in self.some or row)
        return has_keys and (self.many is None or isinstance(row[self.many], list))

    @property
    def recognised_by(self) -> str:
        """The keys of this format, for messages."""
        keys = ", ".join(self.keys) + (f" and {' or '.join(self.some)}" if self.some else "")
        return keys if self.wrapper is None else f"{self.wrapper}, or {keys}"

    def rows(self, row: Mapping[str, Any]) -> list[Row]:
        """Split a row into one row for each of its facts."""
        names = self.names
        if self.wrapper is not None and self.wrapper not in row:
            names = {ours: str(name).removeprefix(f"{self.wrapper}.") for ours, name in names.items()}
        whole = Row(row, names=names, required=self.required)
        return [whole] if self.many is None else whole.parts(self.many)


def count_placeholders(prompt: str, subject: str) -> int:
    """Count the placeholders `{}` in a prompt outside of the subject, which may itself contain some."""
    return sum(part.count(PLACEHOLDER) for part in prompt.split(subject)) if subject else 0


def _fill(prompt: str, subject: str) -> str:
    if count_placeholders(prompt, subject) != 1:
        return prompt
    return subject.join(part.replace(PLACEHOLDER, subject) for part in prompt.split(subject))


# --- our own format --------------------------------------------------------------------------------------------------


def read_complete(row: Row) -> dict[str, Any]:
    """Read the fields of the native format, without replacing placeholders."""
    return {
        **_read_edit(row, line_ends=True),
        "paraphrases": row.texts("paraphrases", line_ends=True),
        "neighbours": tuple(_read_neighbour(inner) for inner in row.rows("neighbours")),
        "probes": read_probes(row),
    }


def _read_edit(row: Row, *, line_ends: bool = False, fill: bool = False) -> dict[str, Any]:
    """Read the fields that every format has. `fill` replaces a placeholder in the prompt."""
    subject, prompt = row.text("subject", answer=True), row.text("prompt", line_ends=line_ends)
    prompt = _fill(prompt, subject) if fill else prompt
    # of several spellings of the truth the first one is taken
    target_true = next(iter(row.answers("target_true")), None)
    return {
        "subject": subject,
        "prompt": prompt,
        "target_new": row.text("target_new", answer=True),
        "target_true": target_true,
    }


def _read_neighbour(row: Row) -> tuple[str, ...]:
    neighbour, group = (row.text("prompt", line_ends=True), row.text("target", answer=True)), row.text_or_none("group")
    return neighbour if group is None else (*neighbour, group)


def _read_native(row: Row) -> dict[str, Any]:
    fields = _read_edit(row, line_ends=True, fill=True)
    table = row.pairs("neighbour_prompts", "neighbour_targets", line_ends=True)
    groups = row.answers("neighbour_groups")
    if groups and len(groups) != len(table):
        row.fail("neighbour_groups", f"has {len(groups)} texts; expected {len(table)}, one for each prompt")
    if groups:
        table = [[*pair, group] for pair, group in zip(table, groups, strict=False)]
    paraphrases = row.texts("paraphrases", single=True, line_ends=True)
    return {
        **fields,
        "paraphrases": tuple(_fill(text, fields["subject"]) for text in paraphrases),
        "neighbours": (*(_read_neighbour(inner) for inner in row.rows("neighbours")), *table),
        "probes": tuple((kind, _fill(text, fields["subject"]), found) for kind, text, found in read_probes(row)),
    }


def named_columns(columns: Mapping[str, str | Sequence[str]]) -> Format:
    """Make a native format with other names of the fields.

    Args:
        columns: Field name to column name, or to several column names if the field is a list.

    Raises:
        ValueError: A field is unknown, has no column, or has several columns but is not a list.
    """
    known = tuple(name for name in (*NATIVE_FIELDS, *TABLE_FIELDS) if name not in ("neighbours", "probes"))
    names = {ours: (given,) if isinstance(given, str) else tuple(given) for ours, given in columns.items()}
    for ours, given in names.items():
        if ours not in known:
            raise ValueError(f"columns names the field {ours!r}; expected some of {', '.join(known)}")
        if not given or (len(given) > 1 and ours in _SINGLE):
            raise ValueError(
                f"columns gives {ours} {len(given)} names; expected {'one' if ours in _SINGLE else 'some'}"
            )
    shown = {"neighbours": names.get("neighbour_targets", ("neighbour_targets",))}
    required = {name for given in names.values() for name in given}
    return Format("columns", (), _read_native, names | shown, required=required)


# --- formats of other projects ---------------------------------------------------------------------------------------


def _read_counterfact(row: Row) -> dict[str, Any]:
    fields = _read_edit(row, fill=True)
    prompts, truth = row.texts("neighbours", single=True), fields["target_true"]
    if truth is None and prompts:
        row.remarks["neighbours without an answer (left out)"] += len(prompts)
    neighbours = tuple((prompt, truth, "same_relation") for prompt in prompts if truth is not None)
    return fields | {"paraphrases": row.texts("paraphrases", single=True), "neighbours": neighbours}


def _read_mquake(row: Row) -> dict[str, Any]:
    return _read_edit(row, fill=True) | {"paraphrases": row.texts("paraphrases", single=True)}


def _read_zsre(row: Row) -> dict[str, Any]:
    fields = _read_edit(row)
    return fields | {
        "target_true": fields["target_true"] or next(iter(row.answers("pred")), None),
        "paraphrases": row.texts("paraphrases", single=True),
        "neighbours": _grouped(row.pairs("loc", "loc_ans", open=True), "unrelated"),
    }


def _grouped(pairs: Iterable[Sequence[str]], group: str) -> tuple[tuple[str, ...], ...]:
    return tuple((*pair, group) for pair in pairs)


def _read_counterfact_flat(row: Row) -> dict[str, Any]:
    return _read_edit(row, fill=True) | {
        "paraphrases": row.texts("rephrase_prompt", single=True),
        "neighbours": _grouped(row.pairs("locality_prompt", "locality_ground_truth", open=True), "same_relation"),
    }


def _read_knowedit(row: Row) -> dict[str, Any]:
    fields = _read_counterfact_flat(row)
    aliases = [
        text
        for group, text, answers in questions(row, "portability")
        if group.casefold().replace(" ", "_") in ("subject_aliasing", "synonym") and fields["target_new"] in answers
    ]
    local = [(text, answers[0], group) for group, text, answers in questions(row, "locality") if answers]
    paraphrases = (*fields["paraphrases"], *row.texts("rephrase", single=True), *aliases)
    return fields | {
        "paraphrases": paraphrases,
        "neighbours": (*fields["neighbours"], *local),
        "probes": portability_probes(row),
    }


def _read_knowedit_bio(row: Row) -> dict[str, Any]:
    return {
        **_read_edit(row, line_ends=True),
        "neighbours": tuple((text, found[0], group) for group, text, found in questions(row, "locality") if found),
    }


_FLAT_NAMES = {"target_true": "ground_truth", "neighbours": "locality_ground_truth"}
_EDIT = ("subject", "prompt", "target_new")
# in the order of detection: the keys of the native format are a subset of those of other formats
_ALL = (
    Format(
        "mquake",
        ("requested_rewrite",),
        _read_mquake,
        {"paraphrases": "question"},
        many="requested_rewrite",
        shared=mquake_probes,
    ),
    Format(
        "counterfact",
        _EDIT,
        _read_counterfact,
        {
            "subject": "requested_rewrite.subject",
            "prompt": "requested_rewrite.prompt",
            "target_new": "requested_rewrite.target_new",
            "target_true": "requested_rewrite.target_true",
            "paraphrases": "paraphrase_prompts",
            "neighbours": "neighborhood_prompts",
        },
        some=("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"),
        wrapper="requested_rewrite",
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
        "knowedit", _EDIT, _read_knowedit, {**_FLAT_NAMES, "neighbours": "locality"}, some=("locality", "portability")
    ),
    Format(
        "knowedit_bio",
        ("concept", "text", "labels"),
        _read_knowedit_bio,
        {"subject": "concept", "prompt": "text", "target_new": "labels", "neighbours": "locality"},
    ),
    Format(
        "counterfact_flat",
        _EDIT,
        _read_counterfact_flat,
        {**_FLAT_NAMES, "paraphrases": "rephrase_prompt"},
        some=("ground_truth", "rephrase_prompt", "locality_prompt"),
    ),
    Format("native", _EDIT, _read_native, {}),
)
FORMATS: Mapping[str, Format] = {fmt.name: fmt for fmt in _ALL}


def detect_format(file: str, number: int, row: Mapping[str, Any]) -> Format:
    """Return the format whose keys `row` has.

    Raises:
        FactError: No format fits; the message names the keys found and the known formats.
    """
    for candidate in _ALL:
        if candidate.fits(row):
            return candidate
    misspelled = next(filter(None, (_misspelled(candidate, row) for candidate in reversed(_ALL))), "")
    if misspelled:
        raise FactError(file, number, None, misspelled)
    found = first_few(map(short, row), _MAX_KEYS_SHOWN) or "no keys"
    known = "; ".join(f"{fmt.name} ({fmt.recognised_by})" for fmt in _ALL)
    example = f"or the names of its columns, such as --columns '{_example_columns(row)}' ('columns' in a config)"
    message = f"has {found}, which is no known format; expected the keys of one of: {known}; {example}"
    raise FactError(file, number, None, message)


def _misspelled(format: Format, row: Mapping[str, Any]) -> str:
    """Describe how keys of a row are nearly those of a format; empty if they are not."""
    missing = [key for key in format.keys if key not in row]
    near = {key: near_key(key, (name for name in row if name not in format.keys)) for key in missing}
    if not missing or len(set(near.values()) - {None}) < len(missing):
        return ""
    pairs = first_few(f"{short(given)} (did you mean {key!r}?)" for key, given in near.items())
    return f"has no {first_few(map(repr, missing))}, but {pairs}; expected the keys of the format {format.name}"


def _example_columns(row: Mapping[str, Any]) -> str:
    """Write `columns` with a row's own keys: those with likely names, the others in their order."""
    keys, chosen = [key for key in row if isinstance(key, str) and key], dict.fromkeys(_LIKELY_NAMES, "")
    for ours, likely in _LIKELY_NAMES.items():
        free = [key for key in keys if key not in chosen.values()]
        chosen[ours] = next((key for part in likely for key in free if part in key.casefold()), "")
    left = (key for key in keys if key not in chosen.values())
    return "{" + ", ".join(f"{ours}: {_as_yaml(key or next(left, 'KEY'))}" for ours, key in chosen.items()) + "}"


def _as_yaml(key: str) -> str:
    """Write a key as YAML within single quotes of a shell."""
    is_plain = key.replace("_", "a").isalnum() and not key[0].isdigit()
    return key if is_plain else '"' + printable(key).replace('"', '\\"').replace("'", "'\\''") + '"'
