"""Probes: read from every format that has some, limited, named in errors, and without a trace in facts without them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.data.check import check
from lit_moeedit.data.facts import Fact, FactsError, Probe, read_facts, validate_facts
from lit_moeedit.data.probes import NO_ANSWER, PROBE_LIMIT, TOO_MANY, UNFILLED
from lit_moeedit.edits import Edit
from lit_moeedit.standalone.chat import in_chat
from tests.data.rows import EXPECTED, KNOWEDIT, MQUAKE, NATIVE, REWRITE, changed, problems_of, write

PROBE = {"kind": "reversed", "prompt": "The city in {} is", "answers": ["Rome", "Roma"]}


def read(tmp_path: Path, *rows: Any) -> list[Fact]:
    return list(read_facts(write(tmp_path / "facts.json", list(rows))))


def test_native_probes_are_read_written_and_checked_in_memory(tmp_path: Path) -> None:
    (fact,) = read(tmp_path, {**NATIVE, "probes": [PROBE, {**PROBE, "kind": "multi_hop", "answers": "Rome"}]})
    first, second = fact.probes
    assert first == Probe("reversed", "The city in Rome is", ("Rome", "Roma"))
    assert (second.kind, second.answers) == ("multi_hop", ("Rome",))
    again = Fact.from_dict(json.loads(json.dumps(fact.to_dict())))
    assert again == fact and validate_facts([fact]) == [fact]
    assert read(tmp_path, fact.to_dict()) == [fact]


def test_facts_without_probes_are_what_they_were_and_probes_change_no_key() -> None:
    fact = EXPECTED["native"]
    # digests of edits and state keys of callbacks are made of these
    assert "probes" not in fact.to_dict() and "probes" not in repr(fact)
    with_probes = replace(fact, probes=(Probe("portability", "x", ("y",)),))
    assert with_probes.key == fact.key and repr(with_probes) == repr(fact) and with_probes != fact
    # computed before facts had probes
    plain = Edit("a", (Fact("Rome", "Rome lies in", "Spain", "Italy", ("p",)),), "Editor", {}, ())
    assert plain.id == "45f9203d87b713faace6070f8aaaa22690e70a07cea49d7aa25035e74e6bc0e5"


@pytest.mark.parametrize(
    ("probes", "field", "message"),
    [
        ("x", "probes", "is 'x' (str); expected a list of objects"),
        ([5], "probes[0]", "is 5 (int); expected an object"),
        ([changed(PROBE, kind=...)], "probes[0].kind", "is missing; expected a text"),
        ([PROBE, {**PROBE, "kind": "two"}], "probes[1].kind", "is 'two'; expected one of 'portability', 'multi_hop', "),
        ([{**PROBE, "prompt": " "}], "probes[0].prompt", "is ' '; expected a text that is not empty"),
        ([{**PROBE, "prompt": "a\x00"}], "probes[0].prompt", "is 'a\\x00', with the control character"),
        ([{**PROBE, "prompt": "a" * 65537}], "probes[0].prompt", "has 65,537 characters"),
        ([{**PROBE, "answers": []}], "probes[0].answers", "has no text; expected at least one answer"),
        ([{**PROBE, "answers": [[{}]]}], "probes[0].answers[0]", "is {} (dict); expected a text"),
        ([{**PROBE, "answers": ["x"] * 101}], "probes[0].answers", "has 101 texts; expected at most 100"),
        ([PROBE] * 101, "probes", "has 101 objects; expected at most 100"),
        ([{**PROBE, "prompt": "{} or {}"}], "probes", "still holds '{}' (2 times); expected a complete prompt"),
    ],
)
def test_bad_probes_are_named(tmp_path: Path, probes: Any, field: str, message: str) -> None:
    path = write(tmp_path / "facts.json", [NATIVE, {**NATIVE, "prompt": "Rome is", "probes": probes}])
    ((row, named, found),) = problems_of(path)
    assert (row, named) == (2, field) and found.startswith(message)


def test_wrong_types_from_dict_are_refused() -> None:
    with pytest.raises(FactsError, match=r"field 'probes\[0\]\.kind': is 'other'; expected one of"):
        Fact.from_dict({**EXPECTED["native"].to_dict(), "probes": [{**PROBE, "kind": "other"}]})


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        ("Reasoning", "portability"),
        ("one_hop", "portability"),
        ("Reversed Relation", "reversed"),
        ("Inverse-Relation", "reversed"),
        ("two_hop", "multi_hop"),
    ],
)
def test_groups_of_knowedit_have_a_kind(tmp_path: Path, group: str, kind: str) -> None:
    asked = {group: [{"prompt": ["a", "b"], "ground_truth": ["x", [["y"], "z"]]}, {"prompt": "c", "ground_truth": []}]}
    (fact,) = read(tmp_path, changed(KNOWEDIT, portability=asked))
    assert [(probe.kind, probe.prompt, probe.answers) for probe in fact.probes] == [
        (kind, "a", ("x",)),
        (kind, "b", ("y", "z")),
    ]


def test_other_projects_files_are_cut_with_a_remark(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = [{"prompt": f"q{i}", "ground_truth": [f"a{j}" for j in range(103)]} for i in range(102)]
    others = [{"prompt": "open", "ground_truth": [""]}, {"prompt": "In {}, what is", "ground_truth": ["a"]}]
    with caplog.at_level(logging.WARNING):
        (fact,) = read(tmp_path, changed(KNOWEDIT, portability=[*others, *many]))
    assert len(fact.probes) == len(fact.probes[0].answers) == PROBE_LIMIT
    # 2 questions, and 3 answers of each of the 102
    assert f"{2 + 3 * 102} {TOO_MANY}" in caplog.text and f"1 {NO_ANSWER}" in caplog.text
    assert f"1 {UNFILLED}" in caplog.text


def rewrite(subject: str, **changes: Any) -> dict[str, Any]:
    return changed(REWRITE, subject=subject, **changes)


def mquake(case: int, *subjects: str, **changes: Any) -> dict[str, Any]:
    rows = [rewrite(subject) for subject in subjects]
    return changed(MQUAKE, requested_rewrite=rows, questions=[f"case {case}?", f"case {case}, then?"], **changes)


def test_questions_of_mquake_are_probes_of_the_last_of_their_edits(tmp_path: Path) -> None:
    rows = [
        mquake(1, "Ann", "Bob", new_answer_alias=["Kolinda", "Kolinda Grabar-Kitarovic"]),
        mquake(2, "Cid", "Ann"),
        mquake(3, "Bob", "Ann"),
        mquake(4, "Ann"),
    ]
    facts = {fact.subject: fact for fact in read(tmp_path, *rows)}
    asked = {subject: [probe.prompt[:6] for probe in fact.probes[::2]] for subject, fact in facts.items()}
    # of two edits in one row the second is made last, of an old and a new one the new one
    assert asked == {"Ann": ["case 4"], "Bob": ["case 1", "case 3"], "Cid": ["case 2"]}
    assert facts["Bob"].probes[0].answers == ("Kolinda Grabar-Kitarovic", "Kolinda")
    assert {probe.kind for fact in facts.values() for probe in fact.probes} == {"multi_hop"}


def test_questions_of_mquake_without_one_of_their_edits_are_left_out(tmp_path: Path) -> None:
    row = mquake(1, "Ann", "Bob")
    row["requested_rewrite"][1]["target_new"] = None
    path = write(tmp_path / "facts.json", [row])
    assert [fact.probes for fact in read_facts(path, strict=False)] == [()]


def test_bad_questions_of_mquake_are_named_and_cost_no_fact(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [MQUAKE, changed(mquake(2, "Bob"), questions=[5])])
    assert problems_of(path) == [(2, "questions[0]", "is 5 (int); expected a text")]
    assert [len(fact.probes) for fact in read_facts(path, strict=False)] == [1, 0]


def test_the_command_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(write(tmp_path / "facts.json", [mquake(1, "Ann", "Bob"), mquake(2, "Ann")]))
    assert "  probes by kind: multi_hop 4" in capsys.readouterr().out.splitlines()


class _Chat:
    chat_template = "x"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "".join(f"<{message['content']}>" for message in messages)


def test_probes_are_asked_in_the_chat_template() -> None:
    fact = replace(EXPECTED["native"], probes=(Probe("reversed", "Which city?", ("Rome",)),))
    (asked,) = in_chat(_Chat(), [fact])  # type: ignore[arg-type]
    assert asked.probes == (Probe("reversed", "<Which city?><", ("Rome",)),)
