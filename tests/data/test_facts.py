"""Facts: every format, every refusal with its message, and what must hold for arbitrary texts."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.data.facts import Fact, FactError, FactsError, Neighbour, read_facts, validate_facts

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

NATIVE: dict[str, Any] = {
    "subject": "Rome",
    "prompt": "Rome lies in",
    "target_new": "Spain",
    "target_true": "Italy",
    "paraphrases": ["The country of Rome is"],
    "neighbours": [{"prompt": "Milan lies in", "target": "Italy", "group": "same_relation"}],
}
COUNTERFACT: dict[str, Any] = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke the language "],
    "neighborhood_prompts": ["The native language of Montesquieu is", "Jean Gabin's mother tongue is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
FLAT: dict[str, Any] = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
ZSRE: dict[str, Any] = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "pred": "1998",
    "rephrase": "When has WEFS been established?",
    "alt": " 1997",
    "answers": ["1987", "1988"],
    "loc": "nq question: who voiced gaston",
    "loc_ans": "Richard White",
    "cond": "1998 >> 1997 || When was WEFS established?",
}
ROWS = {"native": NATIVE, "counterfact": COUNTERFACT, "counterfact_flat": FLAT, "zsre": ZSRE}
EXPECTED = {
    "native": Fact(
        "Rome",
        "Rome lies in",
        "Spain",
        "Italy",
        ("The country of Rome is",),
        (Neighbour("Milan lies in", "Italy", "same_relation"),),
    ),
    "counterfact": Fact(
        "Danielle Darrieux",
        "The mother tongue of Danielle Darrieux is",
        "English",
        "French",
        ("Danielle Darrieux, a native", "Danielle Darrieux spoke the language"),
        (
            Neighbour("The native language of Montesquieu is", "French", "same_relation"),
            Neighbour("Jean Gabin's mother tongue is", "French", "same_relation"),
        ),
    ),
    "counterfact_flat": Fact(
        "Toko Yasuda",
        "Toko Yasuda, the",
        "piano",
        "guitar",
        ("Toko Yasuda is incredible at",),
        (Neighbour("John Lennon performs on the", "guitar", "same_relation"),),
    ),
    "zsre": Fact(
        "WEFS",
        "When was WEFS established?",
        "1997",
        "1987",
        ("When has WEFS been established?",),
        (Neighbour("nq question: who voiced gaston", "Richard White", "unrelated"),),
    ),
}


def changed(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `row`; `a__b=value` changes `row["a"]["b"]`, `...` removes a field."""
    row = copy.deepcopy(row)
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = row
        for key in outer:
            target = target[key]
        target[last] = value
        if value is ...:
            del target[last]
    return row


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False)
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    return path


def problems_of(path: Path, **options: Any) -> list[tuple[int | None, str | None, str]]:
    with pytest.raises(FactsError) as caught:
        read_facts(path, **options)
    assert {problem.file for problem in caught.value.problems} == {str(path)}
    return [(problem.row, problem.field, problem.message) for problem in caught.value.problems]


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("given_format", ["auto", "named"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read(tmp_path: Path, name: str, given_format: str, suffix: str) -> None:
    path = write(tmp_path / f"facts{suffix}", [ROWS[name]])
    assert read_facts(path, format="auto" if given_format == "auto" else name) == [EXPECTED[name]]
    assert read_facts(str(path)) == [EXPECTED[name]]


def test_optional_fields_may_be_absent_or_null(tmp_path: Path) -> None:
    bare = {"subject": "Rome", "prompt": "Rome is in", "target_new": "Spain"}
    null = {**NATIVE, "target_true": None, "paraphrases": None, "neighbours": None}
    first, second = read_facts(write(tmp_path / "facts.json", [bare, null]))
    assert (first.target_true, first.paraphrases, first.neighbours) == (None, (), ())
    assert (second.target_true, second.paraphrases, second.neighbours) == (None, (), ())

    flat = changed(FLAT, rephrase_prompt=..., locality_prompt=...)
    assert read_facts(write(tmp_path / "flat.json", [flat]))[0].neighbours == ()


def test_neighbours_without_a_group_get_the_default(tmp_path: Path) -> None:
    row = {**NATIVE, "neighbours": [{"prompt": "Milan lies in", "target": "Italy"}]}
    assert read_facts(write(tmp_path / "facts.json", [row]))[0].neighbours[0].group == "neighbour"


def test_zsre_takes_the_prediction_where_there_is_no_answer(tmp_path: Path) -> None:
    assert read_facts(write(tmp_path / "facts.json", [{**ZSRE, "answers": []}]))[0].target_true == "1998"


@pytest.mark.parametrize(
    ("subject", "prompt", "complete"),
    [
        ("Rome", "The city of {} lies in", "The city of Rome lies in"),
        ("al", "The capital of {} is", "The capital of al is"),  # the subject's letters elsewhere are no subject
        ("Rome", "Rome lies in", "Rome lies in"),
        ("{}", "In Python, {} is a", "In Python, {} is a"),  # the subject itself is no placeholder
    ],
)
def test_a_single_placeholder_in_a_native_prompt_is_filled(
    tmp_path: Path, subject: str, prompt: str, complete: str
) -> None:
    row = {**NATIVE, "subject": subject, "prompt": prompt}
    assert read_facts(write(tmp_path / "facts.json", [row]))[0].prompt == complete


def test_texts_are_stripped(tmp_path: Path) -> None:
    row = {**NATIVE, "subject": " Rome", "prompt": " Rome lies in ", "target_new": "\tSpain\n", "target_true": "Italy "}
    assert read_facts(write(tmp_path / "facts.json", [row])) == [EXPECTED["native"]]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_tolerated(tmp_path: Path) -> None:
    line = json.dumps(NATIVE)
    path = tmp_path / "facts.jsonl"
    path.write_bytes(f"\ufeff\r\n{line}\r\n\r\n{line}\r\n".encode())
    # The row is the line of the file, so that an editor finds it.
    assert [row for row, _, _ in problems_of(path)] == [4]


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    row = {**NATIVE, "paraphrases": ["one\u2028two\x85three"]}
    assert read_facts(write(tmp_path / "facts.jsonl", [row]))[0].paraphrases == ("one\u2028two\x85three",)


def test_a_subject_in_other_case_takes_the_spelling_of_the_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "facts.json", [{**ZSRE, "subject": "wefs"}])
    assert read_facts(path) == [EXPECTED["zsre"]]
    assert "row 1: subject 'wefs' is spelled 'WEFS' in the prompt" in caplog.text


@pytest.mark.parametrize("prompt", ["Tell Us, is the us rich?", "The bus leads to"])
def test_a_subject_is_respelled_only_without_doubt(tmp_path: Path, prompt: str) -> None:
    path = write(tmp_path / "facts.json", [{**NATIVE, "subject": "US", "prompt": prompt}])
    assert [problem[1] for problem in problems_of(path)] == ["prompt"]


def test_limit_counts_usable_facts_and_leaves_later_rows_alone(tmp_path: Path) -> None:
    rows = [{**NATIVE, "prompt": f"{number}. Rome lies in"} for number in range(5)]
    path = write(tmp_path / "facts.json", [*rows, "broken"])
    assert len(read_facts(path, limit=5)) == 5
    path = write(tmp_path / "skipping.json", ["broken", *rows])
    assert [fact.prompt[0] for fact in read_facts(path, limit=2, strict=False)] == ["0", "1"]


def test_ignored_native_fields_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_facts(write(tmp_path / "facts.json", [{**NATIVE, "paraphrase": "lost"}]))
    assert "ignored fields 'paraphrase' (1 rows); known are subject, prompt" in caplog.text


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "row", "message"),
    [
        ("facts.csv", b"", None, "has the suffix '.csv'; expected '.json' or '.jsonl'"),
        ("facts.json", b"[]", None, "holds no rows; expected at least one fact"),
        ("facts.jsonl", b"\n \n", None, "holds no rows; expected at least one fact"),
        ("facts.json", b'{"a": 1}', None, "is {'a': 1} (dict) at the top; expected a list of objects"),
        ("facts.json", b'[{"a": ', None, "is not valid JSON (Expecting value at line 1); expected a list of objects"),
        ("facts.json", b"[\n\xff]", None, "is not valid UTF-8 (byte 0xff in line 2); expected a UTF-8 file"),
        ("facts.jsonl", b"{}\n\xe4", 2, "is not valid UTF-8 (byte 0xe4 in line 2); expected a UTF-8 file"),
        ("facts.json", b"[" * 100_000, None, "is not valid JSON ('maximum recursion depth exceeded"),
        ("facts.json", b"[" + b"1" * 10_000 + b"]", None, "is not valid JSON ('Exceeds the limit"),
        (
            "facts.json",
            b'[{"x": 1, "y": 2}]',
            1,
            "has 'x', 'y', which is no known format; expected the keys of one of:",
        ),
        ("facts.json", b"[{}]", 1, "has no keys, which is no known format"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, row: int | None, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FactError) as caught:
        read_facts(path, strict=False)
    error = caught.value
    assert (error.file, error.row, error.field) == (str(path), row, None)
    assert error.message.startswith(message)


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [{"x": 1}])
    with pytest.raises(FactError, match=r"native \(subject, prompt, target_new\)") as caught:
        read_facts(path)
    assert all(name in str(caught.value) for name in ROWS)


def test_a_missing_file_and_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_facts(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="format is 'csv'; expected one of 'auto', "):
        read_facts(tmp_path / "facts.json", format="csv")
    with pytest.raises(ValueError, match="limit is 0; expected at least 1 or None"):
        read_facts(tmp_path / "facts.json", limit=0)


def test_a_truncated_line_is_a_problem_of_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f'{json.dumps(NATIVE)}\n{{"subject": "Ro', encoding="utf-8")
    message = "is not valid JSON (Unterminated string starting at at column 13); expected one object per line"
    assert problems_of(path) == [(2, None, message)]
    assert read_facts(path, strict=False) == [EXPECTED["native"]]


# --- rows that cannot be used ----------------------------------------------------------------------------------------

BAD_ROWS = [
    (NATIVE, {"target_new": ...}, "target_new", "is missing; expected a text"),
    (NATIVE, {"subject": 5}, "subject", "is 5 (int); expected a text"),
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
    (NATIVE, {"target_true": ""}, "target_true", "is ''; expected a text that is not empty"),
    (
        NATIVE,
        {"target_new": " Italy "},
        "target_new",
        "is 'Italy', which is also the true target; expected another one",
    ),
    (
        NATIVE,
        {"target_new": "\ud800"},
        "target_new",
        "is '\\ud800', with half of a surrogate pair; expected valid Unicode",
    ),
    (NATIVE, {"paraphrases": "one"}, "paraphrases", "is 'one' (str); expected a list of texts"),
    (NATIVE, {"paraphrases": ["one", ""]}, "paraphrases[1]", "is ''; expected a text that is not empty"),
    (NATIVE, {"neighbours": {}}, "neighbours", "is {} (dict); expected a list of objects"),
    (NATIVE, {"neighbours": ["one"]}, "neighbours[0]", "is 'one' (str); expected an object"),
    (NATIVE, {"neighbours": [{"prompt": "x"}]}, "neighbours[0].target", "is missing; expected a text"),
    (COUNTERFACT, {"requested_rewrite": "x"}, "requested_rewrite", "is 'x' (str); expected an object"),
    (COUNTERFACT, {"requested_rewrite__subject": ...}, "requested_rewrite.subject", "is missing; expected a text"),
    (
        COUNTERFACT,
        {"requested_rewrite__target_new": "x"},
        "requested_rewrite.target_new",
        "is 'x' (str); expected an object",
    ),
    (
        COUNTERFACT,
        {"requested_rewrite__target_new__str": "French"},
        "requested_rewrite.target_new.str",
        "is 'French', which is also the true target; expected another one",
    ),
    (COUNTERFACT, {"neighborhood_prompts": [3]}, "neighborhood_prompts[0]", "is 3 (int); expected a text"),
    (FLAT, {"locality_ground_truth": ...}, "locality_ground_truth", "is missing; expected a text"),
    (ZSRE, {"alt": ""}, "alt", "is ''; expected a text that is not empty"),
    (ZSRE, {"alt": "1987"}, "alt", "is '1987', which is also the true target; expected another one"),
    (ZSRE, {"answers": "1987"}, "answers", "is '1987' (str); expected a list of texts"),
    (ZSRE, {"answers": [], "pred": ...}, "pred", "is missing; expected a text"),
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
    path = write(tmp_path / "facts.json", [{**NATIVE, "target_new": "Italy"}, NATIVE])
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
        (2, "target_new", "is '日本', of which the tokenizer leaves nothing; expected at least one token"),
        (3, "neighbours", "is '米', of which the tokenizer leaves nothing; expected at least one token"),
    ]
    assert sorted(calls) == [" Italy", " Spain", " 日本", " 米"]


def test_all_problems_are_collected_and_the_first_twenty_listed(tmp_path: Path) -> None:
    rows = [NATIVE, {"subject": "", "prompt": "Rome", "target_new": 1}, *[None] * 23]
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
    rows = [NATIVE, {"subject": "", "prompt": "Rome", "target_new": 1}, *[{**NATIVE, "subject": 1}] * 22, None]
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


# --- facts made in memory --------------------------------------------------------------------------------------------


def test_facts_in_memory_are_checked_and_stripped() -> None:
    good = Fact("Rome", " Rome lies in", "Spain ")
    assert validate_facts([good]) == [Fact("Rome", "Rome lies in", "Spain")]
    template = Fact("Oslo", "{} lies in", "Spain")
    with pytest.raises(FactsError) as caught:
        validate_facts([good, template], source="my facts")
    (problem,) = caught.value.problems
    assert str(problem) == "my facts, row 2, field 'prompt': still holds '{}' (1 times); expected a complete prompt"
    assert len(validate_facts([good, template], strict=False)) == 1
    with pytest.raises(FactError, match="facts: holds no facts; expected at least one"):
        validate_facts([])


def test_wrong_types_in_memory_are_refused() -> None:
    fact = Fact("Rome", "Rome lies in", 5, paraphrases="one")  # type: ignore[arg-type]
    with pytest.raises(FactsError) as caught:
        validate_facts([fact])
    assert [problem.field for problem in caught.value.problems] == ["target_new", "paraphrases"]


def test_from_dict_checks_types() -> None:
    with pytest.raises(FactsError, match="fact, field 'prompt': is missing; expected a text"):
        Fact.from_dict({"subject": "Rome", "target_new": "Spain"})


def test_the_key_names_the_edit_and_never_changes() -> None:
    fact = EXPECTED["native"]
    assert fact.key == Fact("other", fact.prompt, fact.target_new).key == "e31a0c2f956e2aa4"
    assert fact.key != Fact("Rome", fact.prompt, "Peru").key
    assert Fact("", "ab", "c").key != Fact("", "a", "bc").key
    assert len(Fact("", "\ud800", "é").key) == 16


def test_errors_survive_pickling() -> None:
    error = FactError("facts.jsonl", 3, "prompt", "is wrong")
    assert str(error) == "facts.jsonl, row 3, field 'prompt': is wrong"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    both = pickle.loads(pickle.dumps(FactsError("facts.jsonl", [error], "1 of 1 rows cannot be used")))
    assert str(both.problems[0]) == str(error)
    assert isinstance(both, FactError)


# --- properties ------------------------------------------------------------------------------------------------------

neighbours = st.builds(Neighbour, st.text(), st.text(), st.text())
any_fact = st.builds(
    Fact,
    subject=st.text(),
    prompt=st.text(),
    target_new=st.text(),
    target_true=st.none() | st.text(),
    paraphrases=st.lists(st.text(), max_size=3).map(tuple),
    neighbours=st.lists(neighbours, max_size=3).map(tuple),
)
# What a checked fact may hold: a text with something in it, and nothing around it that is stripped.
clean = st.text().map(str.strip).filter(bool)


@st.composite
def usable_facts(draw: st.DrawFn) -> list[Fact]:
    facts: dict[str, Fact] = {}
    for subject, before, after in draw(st.lists(st.tuples(clean, st.text(), st.text()), min_size=1, max_size=4)):
        prompt = f"{before}{subject}{after}".strip()
        target_new, target_true = draw(st.tuples(clean, st.none() | clean).filter(lambda pair: pair[0] != pair[1]))
        paraphrases = tuple(draw(st.lists(clean, max_size=2)))
        around = tuple(draw(st.lists(st.builds(Neighbour, clean, clean, clean), max_size=2)))
        if "{}" not in prompt:
            facts[prompt] = Fact(subject, prompt, target_new, target_true, paraphrases, around)
    return list(facts.values()) or [EXPECTED["native"]]


@given(any_fact)
def test_a_fact_survives_json(fact: Fact) -> None:
    data = fact.to_dict()
    assert json.loads(json.dumps(data)) == data
    again = Fact.from_dict(json.loads(json.dumps(data)))
    assert again == fact
    assert again.key == fact.key


@given(usable_facts(), st.sampled_from([".json", ".jsonl"]))
def test_written_facts_are_read_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, facts: list[Fact], suffix: str
) -> None:
    path = write(tmp_path_factory.mktemp("facts") / f"facts{suffix}", [fact.to_dict() for fact in facts])
    assert read_facts(path) == facts
    assert validate_facts(facts) == facts


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(ROWS)), st.data())
def test_no_content_of_a_row_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    row = copy.deepcopy(ROWS[name])
    inner = row.get("requested_rewrite", row) if data.draw(st.booleans()) else row
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(json_values)
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    write(path, [row])
    try:
        (fact,) = read_facts(path, format=name)
    except FactsError as error:
        assert error.problems
        assert all("expected" in problem.message and "\n" not in str(problem) for problem in error.problems)
    else:
        assert fact.subject in fact.prompt


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "refused", "usable"),
    [("counterfact_2k.json", {"target_new": 6}, 1994), ("zsre_mend_1k.json", {"alt": 19}, 981)],
)
def test_real_data(name: str, refused: dict[str, int], usable: int) -> None:
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"the benchmark data {name} does not stand beside this checkout")
    with pytest.raises(FactsError) as caught:
        read_facts(path)
    fields = [problem.field for problem in caught.value.problems]
    assert {field: fields.count(field) for field in fields} == refused
    facts = read_facts(path, strict=False)
    assert len(facts) == usable
    assert all(fact.target_true and len(fact.paraphrases) == len(fact.neighbours) == 1 for fact in facts)
    assert len({fact.key for fact in facts}) == usable
