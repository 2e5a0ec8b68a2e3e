"""Tests of errors about rows: each names the row, the field and the expected value."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.data.facts import FactsError, read_facts
from tests.data.rows import COUNTERFACT, EXPECTED, FLAT, NATIVE, ROWS, ZSRE, changed, problems_of, write

BAD_ROWS = [
    (NATIVE, {"target_new": ...}, "target_new", "is missing; expected a text"),
    (NATIVE, {"subject": {}}, "subject", "is {} (dict); expected a text"),
    (NATIVE, {"subject": ["Rome", "Roma"]}, "subject", "is ['Rome', 'Roma'] (list); expected a text"),
    (NATIVE, {"prompt": 5}, "prompt", "is 5 (int); expected a text"),
    (NATIVE, {"prompt": 5.5}, "prompt", "is '5.5' (Number); expected a text"),
    (NATIVE, {"subject": " "}, "subject", "is ' '; expected a text that is not empty"),
    (
        NATIVE,
        {"prompt": "Paris lies in"},
        "prompt",
        "does not contain the subject 'Rome'; expected it letter by letter in 'Paris lies in'",
    ),
    (NATIVE, {"prompt": "{} and {}"}, "prompt", "still holds '{}' (2 times); expected a complete prompt"),
    (NATIVE, {"target_new": "\n"}, "target_new", "is '\\n'; expected a text that is not empty"),
    (NATIVE, {"target_new": None}, "target_new", "is null; expected a text"),
    (NATIVE, {"target_new": []}, "target_new", "is [] (list); expected a text"),
    (NATIVE, {"target_new": ["Spain", "Peru"]}, "target_new", "is ['Spain', 'Peru'] (list); expected a text"),
    (NATIVE, {"target_new": float("inf")}, "target_new", "is inf (float); expected a text"),
    (NATIVE, {"target_new": {"str": None}}, "target_new.str", "is null; expected a text"),
    (NATIVE, {"target_new": {"id": "Q29"}}, "target_new", "is {'id': 'Q29'} (dict); expected a text"),
    (NATIVE, {"target_true": {}}, "target_true", "is {} (dict); expected a text"),
    (
        NATIVE,
        {"target_new": "\ud800"},
        "target_new",
        "is '\\ud800', with half of a surrogate pair; expected valid Unicode",
    ),
    (NATIVE, {"paraphrases": 5}, "paraphrases", "is 5 (int); expected a list of texts"),
    (NATIVE, {"paraphrases": ["one", "", 5]}, "paraphrases[2]", "is 5 (int); expected a text"),
    (
        NATIVE,
        {"paraphrases": ["one", "{} and {}"]},
        "paraphrases",
        "still holds '{}' (2 times); expected a complete prompt",
    ),
    (
        NATIVE,
        {"neighbours": [{"prompt": "{} is", "target": "x"}]},
        "neighbours",
        "still holds '{}' (1 times); expected a complete prompt",
    ),
    (
        COUNTERFACT,
        {"paraphrase_prompts": ["{} is"]},
        "paraphrase_prompts",
        "still holds '{}' (1 times); expected a complete prompt",
    ),
    (NATIVE, {"subject": "a" * 1001}, "subject", "has 1,001 characters; expected at most 1,000"),
    (
        NATIVE,
        {"neighbour_prompts": ["a", ""], "neighbour_targets": ["b", "c"]},
        "neighbour_prompts[1]",
        "is ''; expected a text that is not empty",
    ),
    (
        FLAT,
        {"locality_prompt": ["", "a"], "locality_ground_truth": ["b", "c"]},
        "locality_prompt[0]",
        "is ''; expected a text that is not empty",
    ),
    (NATIVE, {"neighbours": {}}, "neighbours", "is {} (dict); expected a list of objects"),
    (NATIVE, {"neighbours": ["one"]}, "neighbours[0]", "is 'one' (str); expected an object"),
    (NATIVE, {"neighbours": [{"prompt": "x"}]}, "neighbours[0].target", "is missing; expected a text"),
    (COUNTERFACT, {"requested_rewrite": "x"}, "requested_rewrite", "is 'x' (str); expected an object"),
    (COUNTERFACT, {"requested_rewrite__subject": ...}, "requested_rewrite.subject", "is missing; expected a text"),
    (
        COUNTERFACT,
        {"requested_rewrite__target_new__str": ""},
        "requested_rewrite.target_new.str",
        "is ''; expected a text that is not empty",
    ),
    (COUNTERFACT, {"neighborhood_prompts": [3]}, "neighborhood_prompts[0]", "is 3 (int); expected a text"),
    (
        FLAT,
        {"locality_ground_truth": ["c", "d"]},
        "locality_ground_truth",
        "has 2 texts; expected 1, one for each of locality_prompt",
    ),
    (ZSRE, {"alt": ""}, "alt", "is ''; expected a text that is not empty"),
    (ZSRE, {"answers": {}}, "answers", "is {} (dict); expected a text"),
    (
        ZSRE,
        {"src": "When?"},
        "src",
        "does not contain the subject 'WEFS'; expected it letter by letter in 'When?'",
    ),
]


@pytest.mark.parametrize(("good", "changes", "field", "message"), BAD_ROWS)
def test_a_bad_row_is_named(
    tmp_path: Path, good: dict[str, Any], changes: dict[str, Any], field: str, message: str
) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f"\n{json.dumps(changed(good, **changes))}\n{json.dumps(good)}\n", encoding="utf-8")
    name = next(name for name, row in ROWS.items() if row is good)
    assert problems_of(path, format=name) == [(2, field, message)]
    assert read_facts(path, format=name, strict=False) == [EXPECTED[name]]


def test_a_row_that_is_no_object(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [NATIVE, ["x"], None])
    expected = [(2, None, "is ['x'] (list); expected an object"), (3, None, "is null; expected an object")]
    assert problems_of(path) == expected


def test_duplicates_and_contradictions_name_the_first_row(tmp_path: Path) -> None:
    rows = [NATIVE, {**NATIVE, "target_new": " Spain"}, {**NATIVE, "target_new": "Peru"}]
    path = write(tmp_path / "facts.json", rows)
    assert problems_of(path) == [
        (2, "prompt", "repeats the edit of row 1 ('Rome lies in'); expected every edit once"),
        (
            3,
            "target_new",
            "is 'Peru', but row 1 sets 'Spain' for the same prompt 'Rome lies in'; expected one target per prompt",
        ),
    ]
    assert read_facts(path, strict=False) == [EXPECTED["native"]]


def test_a_refused_row_contradicts_nobody(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [{**NATIVE, "target_new": "Peru", "paraphrases": [5]}, NATIVE])
    assert read_facts(path, strict=False) == [EXPECTED["native"]]


def test_targets_without_tokens_are_refused(tmp_path: Path) -> None:
    calls: list[str] = []

    def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        calls.append(text)
        return {"input_ids": [ord(letter) for letter in text if letter.isascii() and letter != " "]}

    rows = [
        NATIVE,
        {**NATIVE, "prompt": "Rome is in", "target_new": "日本"},
        {**NATIVE, "prompt": "Rome is", "neighbours": [{"prompt": "Milan is", "target": "米"}]},
    ]
    path = write(tmp_path / "facts.json", rows)
    assert problems_of(path, tokenizer=tokenizer) == [
        (2, "target_new", "is '日本', for which the tokenizer returns no token; expected at least one"),
        (3, "neighbours", "is '米', for which the tokenizer returns no token; expected at least one"),
    ]
    assert sorted(calls) == [" Italy", " Rome", " Spain", " 日本", " 米"]


def test_all_problems_are_collected_and_the_first_twenty_listed(tmp_path: Path) -> None:
    rows = [NATIVE, {"subject": "", "prompt": "Rome", "target_new": {}}, *[None] * 23]
    path = write(tmp_path / "facts.json", rows)
    with pytest.raises(FactsError) as caught:
        read_facts(path)
    error = caught.value
    assert len(error.problems) == 25
    assert (error.file, error.row, error.field) == (str(path), 2, "subject")
    lines = str(error).splitlines()
    assert lines[0] == f"{path}: 24 of 25 rows cannot be used"
    assert lines[1] == f"  {path}, row 2, field 'subject': is ''; expected a text that is not empty"
    assert lines[-1] == "  ... and 5 more problems"
    assert len(lines) == 22


def test_skipping_counts_and_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [NATIVE, {"subject": "", "prompt": "Rome", "target_new": {}}, *[{**NATIVE, "subject": {}}] * 22, None]
    path = write(tmp_path / "facts.json", rows)
    assert read_facts(path, strict=False) == [EXPECTED["native"]]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert len(caplog.records) == 21
    first, *_, last = (record.getMessage() for record in caplog.records)
    assert first == f"skipped: {path}, row 2, field 'subject': is ''; expected a text that is not empty"
    summary = "24 of 25 rows cannot be used and were skipped; problems by field: subject 23, target_new 1, row 1"
    assert last == f"{path}: {summary}"


def test_skipping_everything_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [{**NATIVE, "subject": "Oslo"}])
    assert [field for _, field, _ in problems_of(path, strict=False)] == ["prompt"]
    path = write(tmp_path / "rows.json", [1, 2])
    assert [row for row, _, _ in problems_of(path, strict=False)] == [1, 2]
