"""Tests of facts files: every format, files that cannot be read, and properties for arbitrary texts."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.data.facts import Fact, FactError, FactsError, Neighbour, read_facts, validate_facts
from lit_moeedit.data.row_files import load_rows
from tests.data.rows import EXPECTED, FLAT, NATIVE, ROWS, ZSRE, changed, problems_of, write

MADE_UP = Path(__file__).with_name("made_up")
REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

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


@pytest.mark.parametrize("empty", ["", " \n"])
def test_optional_fields_may_be_empty(tmp_path: Path, empty: str) -> None:
    neighbour = {"prompt": "Milan is", "target": "b", "group": empty}
    row = {**NATIVE, "target_true": empty, "paraphrases": ["one", empty], "neighbours": [neighbour]}
    (native,) = read_facts(write(tmp_path / "facts.json", [row]))
    assert native == Fact("Rome", "Rome lies in", "Spain", None, ("one",), (Neighbour("Milan is", "b"),))
    assert validate_facts([replace(native, target_true=empty, paraphrases=("one", empty))]) == [native]
    names = ("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    (flat,) = read_facts(write(tmp_path / "flat.json", [{**FLAT, **dict.fromkeys(names, empty)}]))
    assert flat == Fact("Toko Yasuda", "Toko Yasuda, the", "piano")


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
    row = {**NATIVE, "subject": subject, "prompt": prompt, "paraphrases": ["one", prompt]}
    (fact,) = read_facts(write(tmp_path / "facts.json", [row]))
    assert (fact.prompt, fact.paraphrases) == (complete, ("one", complete))


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
    assert (
        "ignored fields 'paraphrase' (1 rows) (did you mean 'paraphrases'?); known are subject, prompt" in caplog.text
    )


# --- files that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "row", "message"),
    [
        ("facts.txt", b"", None, "has the suffix '.txt'; expected '.json', '.jsonl', '.csv' or '.tsv'"),
        ("facts.json", b"[]", None, "holds no rows; expected at least one fact"),
        ("facts.jsonl", b"\n \n", None, "holds no rows; expected at least one fact"),
        ("facts.json", b'{"a": 1}', None, "begins with '{'; expected a list of objects (one object per"),
        ("facts.json", b'[{"a": ', 1, "is not valid JSON (Expecting value at line 1); expected a list of objects"),
        ("facts.json", b"[\n\xff]", None, "is not valid UTF-8 (byte 0xff in line 2); expected a UTF-8 file"),
        ("facts.jsonl", b"\n\xe4", 2, "is not valid UTF-8 (byte 0xe4 in line 2); expected a UTF-8 file"),
        ("facts.json", b"[" * 100_000, 1, "is not valid JSON (maximum recursion depth exceeded"),
        ("facts.json", b"[" + b"1" * 10_000 + b"]", 1, "is not valid JSON (Exceeds the limit"),
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
    with pytest.raises(ValueError, match="format is 'excel'; expected one of 'auto', "):
        read_facts(tmp_path / "facts.json", format="excel")
    with pytest.raises(ValueError, match="limit is 0; expected at least 1 or None"):
        read_facts(tmp_path / "facts.json", limit=0)


def test_a_truncated_line_is_a_problem_of_its_row_only(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(f'{json.dumps(NATIVE)}\n{{"subject": "Ro', encoding="utf-8")
    message = "is not valid JSON (Unterminated string starting at at column 13); expected one object per line"
    assert problems_of(path) == [(2, None, message)]
    assert read_facts(path, strict=False) == [EXPECTED["native"]]


# --- properties ------------------------------------------------------------------------------------------------------

# What a checked fact may hold: a text with something in it, and nothing around it that is stripped.
letters = st.characters(exclude_categories=("Cc", "Cs"))
clean = st.text(letters).map(str.strip).filter(bool)


@st.composite
def usable_facts(draw: st.DrawFn) -> list[Fact]:
    facts: dict[str, Fact] = {}
    for subject, before, after in draw(
        st.lists(st.tuples(clean, st.text(letters), st.text(letters)), min_size=1, max_size=4)
    ):
        prompt = f"{before}{subject}{after}".strip()
        target_new, target_true = draw(st.tuples(clean, st.none() | clean).filter(lambda pair: pair[0] != pair[1]))
        paraphrases = tuple(draw(st.lists(clean, max_size=2)))
        around = tuple(draw(st.lists(st.builds(Neighbour, clean, clean, clean), max_size=2)))
        if not any("{}" in text for text in (prompt, *paraphrases, *(neighbour.prompt for neighbour in around))):
            facts[prompt] = Fact(subject, prompt, target_new, target_true, paraphrases, around)
    return list(facts.values()) or [EXPECTED["native"]]


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
    inner = inner[0] if isinstance(inner, list) else inner
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


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "field", "extent"),
    [
        ("native", "prompt", (1, 1)),
        ("counterfact", "requested_rewrite.target_new.str", (2, 1)),
        ("counterfact_flat", "target_new", (1, 1)),
        ("zsre", "alt", (1, 1)),
        ("knowedit", "prompt", (2, 1)),
        ("knowedit_bio", "text", (0, 1)),
        # two rows share an edit, which is taken once
        ("mquake", "requested_rewrite[0].target_new.str", (1, 0)),
    ],
)
def test_a_file_of_every_format(name: str, field: str, extent: tuple[int, int]) -> None:
    """Facts that nobody holds: three that can be used, and a last row that cannot."""
    path = MADE_UP / f"{name}.json"
    assert [problem[:2] for problem in problems_of(path)] == [(4, field)]
    facts = read_facts(path, strict=False)
    assert facts == read_facts(path, strict=False, format=name)
    assert len(facts) == len({fact.key for fact in facts}) == 3
    assert all((len(fact.paraphrases), len(fact.neighbours)) == extent for fact in facts)
    assert all((fact.target_true is None) == (name == "knowedit_bio") for fact in facts)


@pytest.mark.parametrize(
    ("name", "refused", "usable", "unknown"),
    [("counterfact_2k.json", {"target_new": 6}, 1994, 0), ("zsre_mend_1k.json", {"alt": 2}, 998, 17)],
)
def test_published_data(
    name: str, refused: dict[str, int], usable: int, unknown: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"the published data {name}, which is not ours to copy, is not beside this checkout")
    # six rows contradict earlier ones, two have no new target
    fields = [field for _, field, _ in problems_of(path)]
    assert {field: fields.count(field) for field in fields} == refused
    facts = read_facts(path, strict=False)
    rows = len(list(load_rows(path)))
    assert rows >= 1000 and rows == usable + sum(refused.values())
    assert len(facts) == len({fact.key for fact in facts}) == usable
    assert sum(fact.target_true is None for fact in facts) == unknown
    assert (f"{unknown} facts whose true target is also the new one" in caplog.text) == (unknown > 0)
    assert all(len(fact.paraphrases) == len(fact.neighbours) == 1 for fact in facts)
