"""Tests of rows as other projects write them: spellings of answers, unknown truths, and objects in memory."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.data import FactsCorpus, read_facts, validate_facts
from lit_moeedit.data.facts import Fact, FactError, FactsError, Neighbour
from tests.data.rows import COUNTERFACT, EXPECTED, FLAT, KNOWEDIT, MQUAKE, NATIVE, ROWS, ZSRE, changed, write

ANSWERS: dict[str, list[str]] = {  # the paths of `target_new`, then those of the truth
    "native": ["target_new", "target_true"],
    "counterfact": ["requested_rewrite__target_new", "requested_rewrite__target_true"],
    "counterfact_flat": ["target_new", "ground_truth"],
    "zsre": ["alt", "answers"],
    "knowedit": ["target_new", "ground_truth"],
    "mquake": ["requested_rewrite__0__target_new", "requested_rewrite__0__target_true"],
}
SPELLINGS: list[tuple[Any, str]] = [
    ("x", "x"),
    ({"str": "x"}, "x"),
    ({"str": "x", "id": "Q1"}, "x"),
    (["x"], "x"),
    ([["x"]], "x"),
    ([{"str": "x"}], "x"),
    ({"str": ["x"]}, "x"),
    (1912, "1912"),
    (-3.5, "-3.5"),
    ([3.5], "3.5"),
    ({"str": 7}, "7"),
    (True, "true"),
    (False, "false"),
    (0, "0"),
]
UNKNOWN = [..., None, "", " ", [], [""], [None], float("nan"), {"str": None}, {"str": ""}, [[]]]


def read_one(tmp_path: Path, row: Any, suffix: str = ".json", **options: Any) -> Fact:
    (fact,) = read_facts(write(tmp_path / f"facts{suffix}", [row]), **options)
    return fact


@pytest.mark.parametrize(("spelling", "text"), SPELLINGS)
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_in_every_spelling(tmp_path: Path, name: str, spelling: Any, text: str) -> None:
    new, true = ANSWERS[name]
    row = changed(ROWS[name], **{new: spelling})
    assert read_one(tmp_path, row).target_new == text
    assert validate_facts([row]) == read_facts([row]) == [read_one(tmp_path, row, ".jsonl")]
    assert read_one(tmp_path, changed(ROWS[name], **{true: spelling})).target_true == text


@pytest.mark.parametrize("unknown", UNKNOWN)
@pytest.mark.parametrize("name", ANSWERS)
def test_a_truth_may_be_unknown(tmp_path: Path, name: str, unknown: Any) -> None:
    row = changed(ROWS[name], **{ANSWERS[name][1]: unknown})
    fact = read_one(tmp_path, changed(row, pred=unknown) if name == "zsre" else row)
    assert (fact.subject, fact.target_new) == (EXPECTED[name].subject, EXPECTED[name].target_new)
    assert fact.target_true is None
    assert fact.paraphrases == EXPECTED[name].paraphrases
    # CounterFact's neighbours have the truth of the fact
    assert fact.neighbours == (() if name == "counterfact" else EXPECTED[name].neighbours)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_new_target_that_is_the_truth_is_new_knowledge(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    row = changed(ROWS[name], **{ANSWERS[name][1]: EXPECTED[name].target_new})
    fact = read_one(tmp_path, row)
    assert (fact.target_new, fact.target_true) == (EXPECTED[name].target_new, None)
    assert "1 facts whose true target is also the new one (it counts as unknown)" in caplog.text


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        changed(COUNTERFACT, requested_rewrite__target_true=...),
        changed(COUNTERFACT, requested_rewrite__prompt="{} spoke"),
    ]
    assert len(read_facts(write(tmp_path / "facts.json", rows))) == 2
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "2 neighbours without an answer (left out)"
    ]


@pytest.mark.parametrize(
    "extra", ["paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "attribute_prompts"]
)
def test_counterfact_without_its_wrapper(tmp_path: Path, extra: str) -> None:
    row = {**COUNTERFACT["requested_rewrite"], extra: ["x"]}
    for options in ({}, {"format": "counterfact"}):
        fact = read_one(tmp_path, row, **options)
        assert fact.prompt == "The mother tongue of Danielle Darrieux is"
        assert (fact.target_new, fact.target_true) == ("English", "French")
        assert fact.paraphrases == (("x",) if extra == "paraphrase_prompts" else ())
        assert fact.neighbours == ((Neighbour("x", "French", "same_relation"),) if extra[0] == "n" else ())
    with pytest.raises(FactsError, match=r"row 1, field 'target_new\.str': is ''; expected a text"):
        read_facts([changed(row, target_new__str="")])


def test_a_request_of_rome(tmp_path: Path) -> None:
    row = {"prompt": "{} plays the sport of", "subject": "LeBron James", "target_new": {"str": "football"}}
    assert read_one(tmp_path, row) == Fact("LeBron James", "LeBron James plays the sport of", "football")
    assert read_one(tmp_path, {**row, "target_true": {"str": "basketball"}}).target_true == "basketball"


@pytest.mark.parametrize("kept", ["ground_truth", "rephrase_prompt", "locality_prompt", "all"])
def test_easyedit_rows_need_no_optional_field(tmp_path: Path, kept: str) -> None:
    optional = ("ground_truth", "rephrase_prompt", "locality_prompt")
    row = changed(FLAT, **{name: ... for name in optional if kept not in (name, "all")})
    fact, full = read_one(tmp_path, row), EXPECTED["counterfact_flat"]
    assert fact.target_true == (full.target_true if "ground_truth" in row else None)
    assert fact.paraphrases == (full.paraphrases if "rephrase_prompt" in row else ())
    assert fact.neighbours == (full.neighbours if "locality_prompt" in row else ())


@pytest.mark.parametrize("nothing", [..., None, "", [], [""]])
@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [("zsre", "loc", "loc_ans"), ("counterfact_flat", "locality_prompt", "locality_ground_truth")],
)
def test_neighbours_without_an_answer_are_left_out(
    tmp_path: Path, name: str, prompt: str, answer: str, nothing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_one(tmp_path, changed(ROWS[name], **{answer: nothing})).neighbours == ()
    assert "1 neighbours without an answer (left out)" in caplog.text
    assert read_one(tmp_path, changed(ROWS[name], **{prompt: nothing})).neighbours == ()
    lists = {prompt: ["a", "b", "", "d"], answer: ["c", "", "", 4]}
    group = EXPECTED[name].neighbours[0].group
    assert read_one(tmp_path, changed(ROWS[name], **lists)).neighbours == (
        Neighbour("a", "c", group),
        Neighbour("d", "4", group),
    )


def test_numbers_in_lists_and_neighbours(tmp_path: Path) -> None:
    row = {
        **NATIVE,
        "neighbours": [{"prompt": "Milan was founded in", "target": -590, "group": 7}],
        "neighbour_prompts": ["a", ""],
        "neighbour_targets": [1.5, None],
    }
    assert read_one(tmp_path, row).neighbours == (Neighbour("Milan was founded in", "-590", "7"), Neighbour("a", "1.5"))
    assert read_one(tmp_path, {**ZSRE, "answers": [1987, 1988]}).target_true == "1987"
    question = {"prompt": "Leo was born in", "ground_truth": [[1860]]}
    assert read_one(tmp_path, changed(KNOWEDIT, locality=[question])).neighbours[0].target == "1860"
    assert read_one(tmp_path, {**NATIVE, "subject": 1912, "prompt": "In {} sank"}).subject == "1912"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_number_is_read_as_the_file_writes_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    row = '{"subject": "Python", "prompt": "Python with pattern matching is", "target_new": 3.10, "target_true": 1e5}'
    path.write_text(row if suffix == ".jsonl" else f"[{row}]", encoding="utf-8")
    (fact,) = read_facts(path)
    assert (fact.target_new, fact.target_true) == ("3.10", "1e5")


def test_null_and_empty_texts_in_lists(tmp_path: Path) -> None:
    fact = read_one(tmp_path, {**NATIVE, "paraphrases": ["one", None, "", float("nan")], "subject": ["Rome"]})
    assert (fact.subject, fact.paraphrases) == ("Rome", ("one",))
    assert read_one(
        tmp_path, {**COUNTERFACT, "paraphrase_prompts": "one", "neighborhood_prompts": None}
    ).paraphrases == ("one",)
    assert read_one(tmp_path, {**MQUAKE, "extra": {"a": [1]}, "questions": None}) == replace(
        EXPECTED["mquake"], probes=()
    )


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read_from_objects(name: str) -> None:
    assert (
        validate_facts([ROWS[name]]) == read_facts([ROWS[name]]) == read_facts(iter([ROWS[name]])) == [EXPECTED[name]]
    )
    assert read_facts((ROWS[name],), format=name, limit=1) == [EXPECTED[name]]


def test_objects_and_facts_may_be_mixed() -> None:
    fact = Fact("Oslo", "Oslo lies in", "Peru", paraphrases=["Where is Oslo?"])  # type: ignore[arg-type]
    assert validate_facts([fact, NATIVE])[1] == validate_facts([NATIVE, fact])[0] == EXPECTED["native"]
    assert read_facts(
        [{"who": "Rome", "q": "{} is in", "a": 5}], columns={"subject": "who", "prompt": "q", "target_new": "a"}
    ) == [Fact("Rome", "Rome is in", "5")]


def test_bad_objects_are_named_by_index_and_field() -> None:
    rows = [NATIVE, changed(NATIVE, prompt="{} is", target_new=...), ["Oslo", "Oslo lies in", "Peru"], None]
    with pytest.raises(FactsError) as caught:
        validate_facts(rows)  # type: ignore[list-item]
    assert [str(problem) for problem in caught.value.problems] == [
        "facts, row 2, field 'target_new': is missing; expected a text",
        "facts, row 3: is ['Oslo', 'Oslo lies in', 'Peru'] (list); expected an object",
        "facts, row 4: is null; expected an object",
    ]
    assert validate_facts(rows, strict=False) == [EXPECTED["native"]]  # type: ignore[list-item]


@pytest.mark.parametrize("wrong", ["facts.json", NATIVE, EXPECTED["native"], 5, None])
def test_a_list_of_facts_is_expected(wrong: Any) -> None:
    with pytest.raises(FactError, match=r"facts: is .*; expected a list of facts"):
        validate_facts(wrong)


def test_a_corpus_of_objects() -> None:
    assert [fact.subject for fact in FactsCorpus([NATIVE, COUNTERFACT["requested_rewrite"]], edits=2).edits] == [
        "Rome",
        "Danielle Darrieux",
    ]


# --- remarks and messages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["In", "by", "Than", "...", "the"])
def test_a_function_word_as_subject_is_remarked_once(subject: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"subject": subject, "prompt": f"{subject} {n} was", "target_new": "x"} for n in range(3)]
    read_facts([*rows, NATIVE])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("facts: 3 subjects that are function words (")


@pytest.mark.parametrize("subject", ["WHO", "In Flames", "Rome", "5", "東"])
def test_names_are_no_function_words(subject: str, caplog: pytest.LogCaptureFixture) -> None:
    read_facts([{"subject": subject, "prompt": f"{subject} was", "target_new": "x"}])
    assert not caplog.records


@pytest.mark.parametrize(
    ("row", "example"),
    [
        (
            {"id": 1, "question": "{} is", "name": "Rome", "answer": "x"},
            "{subject: name, prompt: question, target_new: answer}",
        ),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, "{subject: a, prompt: b, target_new: c}"),
        ({"entity": 1, "new answer": 2}, '{subject: entity, prompt: KEY, target_new: "new answer"}'),
        (
            {"subject": "x", "relation": "y", "prompt": "z", "target_true": "a", "target_false": "b"},
            "{subject: subject, prompt: prompt, target_new: target_false}",
        ),
        ({}, "{subject: KEY, prompt: KEY, target_new: KEY}"),
        ({"1:\x1b": 1}, '{subject: "1:\\x1b", prompt: KEY, target_new: KEY}'),
    ],
)
def test_an_unknown_format_gets_an_example_of_columns(tmp_path: Path, row: dict[str, Any], example: str) -> None:
    with pytest.raises(FactError) as caught:
        read_facts(write(tmp_path / "facts.json", [row]))
    assert str(caught.value).endswith(
        f"; or the names of its columns, such as --columns '{example}' ('columns' in a config)"
    )


def test_the_example_of_columns_can_be_used(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    row = {"the question": "{} is in", "who's": "Rome", "new": 5}
    with pytest.raises(FactError) as caught:
        read_facts([row])
    example = str(caught.value).split("--columns ", 1)[1].removesuffix(" ('columns' in a config)")
    example = example.removeprefix("'").removesuffix("'").replace("'\\''", "'")
    columns = yaml.safe_load(example)
    assert set(columns.values()) == set(row)
    assert json.dumps(columns) == json.dumps({"subject": "who's", "prompt": "the question", "target_new": "new"})
    assert read_facts([row], columns=columns) == [Fact("Rome", "Rome is in", "5")]
