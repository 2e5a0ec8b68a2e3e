"""Probes of an edit: questions about what follows from it, and how each format of facts files writes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_moeedit.data.errors import short, typed
from lit_moeedit.data.rows import Row
from lit_moeedit.text import printable

ProbeKind = Literal["portability", "multi_hop", "reversed"]
PROBE_KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)
"""``portability``: what follows from the edit, such as one step of reasoning, or the fact by another name of its
subject; ``multi_hop``: a question over two or more facts, at least one of them edited; ``reversed``: the question the
other way round."""
PROBE_LIMIT = 100
"""Maximum number of probes of a fact, and of answers of a probe. Each is a forward pass when it is measured."""
TOO_MANY = f"probes of a fact, or answers of a probe, beyond the first {PROBE_LIMIT} (left out)"
NO_ANSWER = "probes without an answer (left out)"
UNFILLED = "probes that hold '{}' (left out)"

ProbeFields = tuple[str, str, tuple[str, ...]]
"""Kind, prompt and answers."""
_REVERSED = ("revers", "inverse")
_MULTI_HOP = ("multi_hop", "two_hop", "multihop", "twohop")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about what follows from an edit. It is only asked, and has no part in making the edit.

    Args:
        kind: The relation of the question to the edit, one of `PROBE_KINDS`.
        prompt: The complete prompt.
        answers: Its answers after the edit, at least one; each of them counts as right.
    """

    kind: ProbeKind
    prompt: str
    answers: tuple[str, ...]


def read_probes(row: Row) -> tuple[ProbeFields, ...]:
    """Read the probes of the native format, `probes[{kind, prompt, answers}]`."""
    rows = row.rows("probes")
    if len(rows) > PROBE_LIMIT:
        row.fail("probes", f"has {len(rows):,} objects; expected at most {PROBE_LIMIT}")
    return tuple(_read_probe(inner) for inner in rows[:PROBE_LIMIT])


def _read_probe(row: Row) -> ProbeFields:
    kind, prompt, answers = row.text("kind"), row.text("prompt", line_ends=True), row.answers("answers")
    if kind and kind not in PROBE_KINDS:
        row.fail("kind", f"is {short(kind)}; expected one of {', '.join(map(repr, PROBE_KINDS))}")
    if not answers:
        row.fail("answers", "has no text; expected at least one answer")
    if len(answers) > PROBE_LIMIT:
        row.fail("answers", f"has {len(answers):,} texts; expected at most {PROBE_LIMIT}")
    return kind, prompt, answers


def cut_probes(row: Row, probes: Iterable[ProbeFields]) -> tuple[ProbeFields, ...]:
    """Leave out what cannot be asked or is beyond the limits, with a remark: other projects' files have no limits."""
    asked = list(probes)
    found = [probe for probe in asked if "{}" not in probe[1]]
    answered = [(kind, prompt, tuple(dict.fromkeys(answers))) for kind, prompt, answers in found if answers]
    beyond = [len(answered), *(len(answers) for _, _, answers in answered)]
    for remark, number in (
        (UNFILLED, len(asked) - len(found)),
        (NO_ANSWER, len(found) - len(answered)),
        (TOO_MANY, sum(max(0, size - PROBE_LIMIT) for size in beyond)),
    ):
        if number:
            row.remarks[remark] += number
    return tuple((kind, prompt, answers[:PROBE_LIMIT]) for kind, prompt, answers in answered[:PROBE_LIMIT])


def portability_probes(row: Row) -> tuple[ProbeFields, ...]:
    """Read the portability questions of KnowEdit and EasyEdit; their groups tell which are reversed or multi-hop."""
    return cut_probes(row, [(_kind(group), text, tuple(found)) for group, text, found in questions(row, "portability")])


def _kind(group: str) -> ProbeKind:
    name = group.casefold().replace(" ", "_").replace("-", "_")
    if any(part in name for part in _REVERSED):
        return "reversed"
    return "multi_hop" if any(part in name for part in _MULTI_HOP) else "portability"


def mquake_probes(row: Row) -> tuple[ProbeFields, ...]:
    """Read the questions of a row of MQuAKE, which are about all of its edits together, with their new answers."""
    answers = (*row.answers("new_answer"), *row.answers("new_answer_alias"))
    return cut_probes(row, [("multi_hop", text, answers) for text in row.texts("questions", single=True)])


def questions(row: Row, name: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield group, prompt and answers of every question below `name`, in any of EasyEdit's forms.

    The value is `{group: questions}` or questions alone. Questions are one object or a list of objects. An object has
    a prompt with its answers, or a list of prompts with one entry of answers each.
    """
    value: Any = row.data.get(name)
    is_grouped = isinstance(value, Mapping) and not {"prompt", "ground_truth"} & value.keys()
    for group, asked in value.items() if is_grouped else [(name, value)]:
        where = f"{name}.{printable(group)}" if is_grouped else name
        for index, question in enumerate(asked if isinstance(asked, list) else [asked]):
            at = f"{where}[{index}]" if isinstance(asked, list) else where
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
                inner = Row({"prompt": text, "ground_truth": found})
                yield group, inner.text("prompt"), list(inner.answers("ground_truth"))
                for field_name, message in inner.problems:
                    row.fail(f"{at}.{field_name}", message)
