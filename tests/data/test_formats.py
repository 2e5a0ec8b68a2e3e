"""Tests of the formats of other projects: nested questions, lists of edits, tables, names of columns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_moeedit.data import FactsCorpus
from lit_moeedit.data.facts import Fact, FactError, FactsError, Neighbour, read_facts
from lit_moeedit.data.row_files import load_rows
from tests.data.rows import (
    COUNTERFACT,
    EXPECTED,
    FLAT,
    KNOWEDIT,
    MQUAKE,
    NATIVE,
    REWRITE,
    ZSRE,
    changed,
    problems_of,
    write,
)

PAIR = ("Two and two make", "four")


def read_one(tmp_path: Path, row: Any, **options: Any) -> Fact:
    (fact,) = read_facts(write(tmp_path / "facts.json", [row]), **options)
    return fact


# --- KnowEdit and EasyEdit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("locality", "group"),
    [
        ({"prompt": PAIR[0], "ground_truth": PAIR[1]}, "locality"),
        ([{"prompt": PAIR[0], "ground_truth": [PAIR[1], "4"]}], "locality"),
        ({"far": {"prompt": PAIR[0], "ground_truth": PAIR[1]}}, "far"),
        ({"far": {"prompt": [PAIR[0]], "ground_truth": [PAIR[1]]}}, "far"),
        ({"far": {"prompt": [PAIR[0]], "ground_truth": [[PAIR[1], "4"]]}}, "far"),
        ({"far": [{"prompt": PAIR[0], "ground_truth": [[PAIR[1], "4"], ["vier"]]}]}, "far"),
        ({"far": [{"prompt": PAIR[0], "ground_truth": [[PAIR[1]]]}, None], "near": None, "other": []}, "far"),
    ],
)
def test_locality_in_every_shape(tmp_path: Path, locality: Any, group: str) -> None:
    fact = read_one(tmp_path, changed(KNOWEDIT, locality=locality))
    assert fact.neighbours == (Neighbour(*PAIR, group),)


@pytest.mark.parametrize("nothing", [None, {}, [], {"far": None}, {"far": []}, [{"prompt": "x", "ground_truth": []}]])
def test_no_locality_and_no_portability(tmp_path: Path, nothing: Any) -> None:
    fact = read_one(tmp_path, changed(KNOWEDIT, locality=nothing, portability=nothing))
    assert (fact.neighbours, fact.paraphrases) == ((), ("Where did Leo Arons die?",))


def test_flat_rows_take_single_values_and_lists(tmp_path: Path) -> None:
    lists = changed(
        FLAT, locality_prompt=["a is", "b is"], locality_ground_truth=["c", "d"], rephrase_prompt=["x", "y"]
    )
    fact = read_one(tmp_path, lists)
    assert fact.neighbours == (Neighbour("a is", "c", "same_relation"), Neighbour("b is", "d", "same_relation"))
    assert fact.paraphrases == ("x", "y")
    path = write(tmp_path / "short.json", [changed(lists, locality_ground_truth=["c"])])
    assert problems_of(path) == [
        (1, "locality_ground_truth", "has 1 texts; expected 2, one for each of locality_prompt")
    ]


def test_zsre_with_portability_stays_zsre(tmp_path: Path) -> None:
    row = {**ZSRE, "portability": {"Recalled Relation": "(x)", "New Question": "?", "New Answer": "y"}}
    assert read_one(tmp_path, row) == EXPECTED["zsre"]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"locality": 5}, "locality", "is 5 (int); expected an object with 'prompt' and 'ground_truth'"),
        (
            {"locality": {"a\x1b": ["x"]}},
            "locality.a\\x1b[0]",
            "is 'x' (str); expected an object with 'prompt' and 'ground_truth'",
        ),
        ({"locality": [{"ground_truth": "x"}]}, "locality[0].prompt", "is null; expected a text"),
        (
            {"portability": {"a": {"prompt": ["x", "y"], "ground_truth": ["z"]}}},
            "portability.a.ground_truth",
            "is ['z'] (list); expected a list of 2, one for each prompt",
        ),
        (
            {"locality": {"a": [{"prompt": "x", "ground_truth": [[{}]]}]}},
            "locality.a[0].ground_truth[0]",
            "is {} (dict); ",
        ),
    ],
)
def test_bad_questions_are_named(tmp_path: Path, changes: dict[str, Any], field: str, message: str) -> None:
    ((row, named, found),) = problems_of(write(tmp_path / "facts.json", [changed(KNOWEDIT, **changes)]))
    assert (row, named) == (1, field) and found.startswith(message)


# --- CounterFact and MQuAKE ------------------------------------------------------------------------------------------


def test_multi_counterfact_is_counterfact(tmp_path: Path) -> None:
    row = {**COUNTERFACT, "pararel_idx": 2796, "attribute_prompts": ["Jean Gabin, a native"]}
    assert read_one(tmp_path, row) == EXPECTED["counterfact"]


def test_a_mquake_row_is_several_facts(tmp_path: Path) -> None:
    second = {**REWRITE, "prompt": "The capital of {} is", "subject": "Croatia", "question": None}
    path = write(tmp_path / "facts.json", [changed(MQUAKE, requested_rewrite=[REWRITE, second])])
    facts = read_facts(path)
    assert facts[0] == replace(EXPECTED["mquake"], probes=())
    assert (facts[1].prompt, facts[1].paraphrases) == ("The capital of Croatia is", ())
    assert read_facts(path, limit=1) == facts[:1]


def test_mquake_rows_share_edits_but_may_not_contradict(tmp_path: Path) -> None:
    other = changed(REWRITE, target_new__str="Italy")
    third = changed(REWRITE, subject="Bob", prompt="{} is from")
    rows = [MQUAKE, MQUAKE, {**MQUAKE, "requested_rewrite": [other, third]}]
    path = write(tmp_path / "facts.json", rows)
    ((row, field, message),) = problems_of(path)
    assert (row, field) == (3, "requested_rewrite[0].target_new.str")
    assert message.startswith("is 'Italy', but row 1 sets 'Croatia' for the same prompt")
    # only the fact that contradicts is left out of its row
    assert [fact.subject for fact in read_facts(path, strict=False)] == ["Ellie Kemper", "Bob"]


@pytest.mark.parametrize(
    ("rewrites", "field", "message"),
    [
        ([], "requested_rewrite", "is empty; expected at least one object"),
        ([5], "requested_rewrite[0]", "is 5 (int); expected an object"),
        ([changed(REWRITE, subject=...)], "requested_rewrite[0].subject", "is missing; expected a text"),
        (
            [changed(REWRITE, target_new__str=" ")],
            "requested_rewrite[0].target_new.str",
            "is ' '; expected a text that is not empty",
        ),
    ],
)
def test_bad_rewrites_are_named(tmp_path: Path, rewrites: list[Any], field: str, message: str) -> None:
    path = write(tmp_path / "facts.json", [{**MQUAKE, "requested_rewrite": rewrites}])
    assert problems_of(path) == [(1, field, message)]


# --- tables ----------------------------------------------------------------------------------------------------------

TABLE = """subject,prompt,target_new,target_true,paraphrases,neighbour_prompts,neighbour_targets,neighbour_groups
Rome,Rome lies in,Spain,Italy,The country of Rome is,Milan lies in,Italy,same_relation
"Washington, D.C.","{}
is in",Peru,,,,,
"""


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_with_our_names(tmp_path: Path, suffix: str) -> None:
    text = TABLE if suffix == ".csv" else TABLE.replace(",", "\t").replace("Washington\t", "Washington,")
    path = tmp_path / f"facts{suffix}"
    path.write_text(f"\ufeff{text}", encoding="utf-8", newline="\r\n")
    first, second = read_facts(path)
    assert first == EXPECTED["native"]
    assert second.prompt.split() == ["Washington,", "D.C.", "is", "in"]
    assert (second.target_true, second.paraphrases, second.neighbours) == (None, (), ())


def test_a_table_in_a_known_format(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    names = list(FLAT)
    path.write_text(",".join(names) + "\n" + ",".join(f'"{FLAT[name]}"' for name in names) + "\n", encoding="utf-8")
    assert read_facts(path) == [EXPECTED["counterfact_flat"]]


OWN = """name,the question,new.answer,old,p1,p2,near,near answer
Rome,{} lies in,Spain,Italy,Where is Rome?,,Milan lies in,Italy
Oslo,{} lies in,Peru,,,In Oslo one is in,,
"""
COLUMNS = {
    "subject": "name",
    "prompt": "the question",
    "target_new": "new.answer",
    "target_true": "old",
    "paraphrases": ["p1", "p2"],
    "neighbour_prompts": "near",
    "neighbour_targets": "near answer",
}


def test_a_table_with_other_names(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(OWN, encoding="utf-8")
    first, second = read_facts(path, columns=COLUMNS)
    assert first == Fact(
        "Rome", "Rome lies in", "Spain", "Italy", ("Where is Rome?",), (Neighbour("Milan lies in", "Italy"),)
    )
    assert second == Fact("Oslo", "Oslo lies in", "Peru", None, ("In Oslo one is in",))
    # JSON rows may have other names, too
    rows = [{"name": "Rome", "the question": "Rome lies in", "new.answer": "Spain", "old": None, "p1": ["a", "b"]}]
    fact = read_one(
        tmp_path,
        rows[0],
        columns={k: v for k, v in COLUMNS.items() if k[:2] in ("su", "pr", "ta")} | {"paraphrases": "p1"},
    )
    assert fact == Fact("Rome", "Rome lies in", "Spain", None, ("a", "b"))


def test_problems_of_a_table_have_its_names(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    header, first, second = OWN.splitlines()
    path.write_text(
        "\n".join([header, first.replace("Rome,", ",", 1), second.replace("Peru", "Peru\x07"), ""]), encoding="utf-8"
    )
    assert problems_of(path, columns=COLUMNS) == [
        (2, "name", "is null; expected a text"),
        (3, "new.answer", "is 'Peru\\x07', with the control character '\\x07'; expected text"),
    ]
    path.write_text(OWN.replace(",Milan lies in,Italy", ",Milan lies in,"), encoding="utf-8")
    assert problems_of(path, columns=COLUMNS) == [(2, "near answer", "has 0 texts; expected 1, one for each of near")]
    wrong = {**COLUMNS, "paraphrases": ["p1", "p3"]}
    path.write_text(OWN, encoding="utf-8")
    assert problems_of(path, columns=wrong) == [
        (row, "p3", "is missing; expected the column given in columns") for row in (2, 3)
    ]


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("subject,prompt,prompt\n", 1, "has the column 'prompt' twice; expected the names of the columns, each once"),
        (
            'a,b\n"x,y\n',
            2,
            "is not valid CSV (unexpected end of data); expected cells separated by ',', quoted by '\"'",
        ),
        ('a,b\n"x"y,z\n', 2, "is not valid CSV (',' expected after '\"'); expected cells separated by ','"),
        (f"a,b\n{'x' * 200_000},z\n", 2, "is not valid CSV (field larger than field limit (131072)); expected cells"),
        ("a;b;c\n1;2;3\n", 1, "has a single column 'a;b;c'; expected cells separated by ','"),
        ("subject,prompt,target_new\n", None, "holds no rows; expected at least one fact"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, text: str, row: int | None, message: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FactError) as caught:
        read_facts(path, strict=False)
    assert caught.value.row == row and caught.value.message.startswith(message)


@pytest.mark.parametrize("text", [",subject,prompt,target_new\n0,{}\n", "subject,prompt,target_new,\n{},\n"])
def test_what_spreadsheets_add_is_left_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(",, ,\n" + text.replace("{}", "Rome,Rome lies in,Spain") + ",,,\n , ,,\n", encoding="utf-8")
    assert [row for _, row in load_rows(path)] == [{"subject": "Rome", "prompt": "Rome lies in", "target_new": "Spain"}]


def test_rows_of_the_wrong_length_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("subject,prompt,target_new\n\nRome,Rome lies in\nOslo,Oslo lies in,Peru\n", encoding="utf-8")
    assert problems_of(path) == [(3, None, "has 2 cells; expected 3 as in the first line")]
    assert [fact.subject for fact in read_facts(path, strict=False)] == ["Oslo"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"subjekt": "x"}, "columns names the field 'subjekt'; expected some of subject, prompt, target_new"),
        ({"neighbours": "x"}, "columns names the field 'neighbours'"),
        ({"subject": ["x", "y"]}, "columns gives subject 2 names; expected one"),
        ({"paraphrases": []}, "columns gives paraphrases 0 names; expected some"),
    ],
)
def test_wrong_columns_are_refused(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_facts("facts.csv", columns=columns)
    with pytest.raises(ValueError, match="format is 'zsre', which has names of its own"):
        read_facts("facts.csv", columns={}, format="zsre")


def test_columns_can_be_given_in_yaml(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    path = tmp_path / "facts.csv"
    path.write_text(OWN.replace(",,,In Oslo", ",Norway,,In Oslo"), encoding="utf-8")
    corpus = {
        "class_path": "lit_moeedit.data.FactsCorpus",
        "init_args": {"path": str(path), "edits": 2, "columns": COLUMNS},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"corpus": corpus}), encoding="utf-8")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(FactsCorpus, "corpus")
    made = parser.instantiate_classes(parser.parse_args([f"--config={tmp_path / 'run.yaml'}"])).corpus
    assert [edit.subject for edit in made.edits] == ["Rome", "Oslo"]


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ro\0me", "with the control character '\\x00'; expected text"),
        ("Ro\x1b[31mme", "with the control character '\\x1b'; expected text"),
        ("Ro\x9b31mme", "with the control character '\\x9b'; expected text"),
        ("x" * 70_000, "characters ('xxx"),
    ],
)
def test_damaged_texts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    row = {**NATIVE, "subject": text, "prompt": f"{text} lies in"}
    problems = problems_of(write(tmp_path / "facts.jsonl", [row]))
    assert {field for _, field, _ in problems} == {"subject", "prompt"}
    assert all(message in found for _, _, found in problems)


@pytest.mark.parametrize(
    "subject",
    ["<script>alert(1)</script>", "[bold]Rome[/]", "القاهرة", "ירושלים", "👩🏽\u200d🚀", "Ro\u202eme", "Z̷̡a̴l̵g̶o̸", "a\tb"],
)
def test_strange_texts_are_texts(tmp_path: Path, subject: str) -> None:
    fact = read_one(tmp_path, {**NATIVE, "subject": subject, "prompt": f"{subject} lies in"})
    assert (fact.subject, fact.prompt) == (subject, f"{subject} lies in")


def test_prompts_keep_the_line_ends_behind_them(tmp_path: Path) -> None:
    neighbours = [{"prompt": "Milan?\n", "target": "Italy\n"}]
    row = {**NATIVE, "prompt": "Where is {}? \r\n\n ", "paraphrases": ["Rome?\n"], "neighbours": neighbours}
    fact = read_one(tmp_path, row)
    assert (fact.prompt, fact.paraphrases) == ("Where is Rome?\n\n", ("Rome?\n",))
    assert fact.neighbours == (Neighbour("Milan?\n", "Italy"),)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    line = json.dumps(NATIVE)
    path.write_text(f'{line[:-1]}, "subject": "Oslo"}}\n', encoding="utf-8")
    expected = "is not valid JSON (the name 'subject' occurs twice in an object); expected one object per line"
    assert problems_of(path) == [(1, None, expected)]


def test_no_number_of_problems_fills_the_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [{**NATIVE, "paraphrases": [{}] * 5000}])
    assert len(problems_of(path)) == 100
    path = write(tmp_path / "rows.jsonl", [None] * 3000)
    with pytest.raises(FactsError, match="1000 of 1000 rows cannot be used"):
        read_facts(path)
    path = write(tmp_path / "most.jsonl", [*[None] * 3000, NATIVE])
    assert read_facts(path, strict=False) == [EXPECTED["native"]]
