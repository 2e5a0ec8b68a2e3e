"""A report as plain values: what is written can be read again, and what was not written by us is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.reports import (
    Measured,
    Report,
    Totals,
    facts_table,
    markdown,
    outcome_of,
    read_rows,
    write_rows,
)
from tests.reports.sample import HOSTILE, fact, hostile, sample


@pytest.mark.parametrize("report", [sample(), hostile(), Report()], ids=["sample", "hostile", "empty"])
def test_a_report_survives_strict_json(report: Report) -> None:
    plain = report.to_dict()
    text = json.dumps(plain, allow_nan=False)
    again = Report.from_dict(json.loads(text))
    # NaN is not equal to itself
    assert again.to_dict() == plain
    if report == sample():
        assert replace(again, metrics=report.metrics) == report
        assert math.isnan(again.metrics["before"]["score"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


PLACES = places(sample(2).to_dict())[1:]


@given(st.sampled_from(PLACES), JSON)
def test_any_value_at_any_place_is_read_or_refused_by_name(place: tuple[Any, ...], value: Any) -> None:
    plain = sample(2).to_dict()
    holder: Any = plain
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    try:
        report = Report.from_dict(plain)
    except ValueError as error:
        # the message names the field, unless the value is all of it
        assert "report" in str(error) and len(str(error)) < 500
    else:
        json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"title": 3}, r"report\.title should be a text, but is of type int"),
        ({"state": "over"}, r"report\.state should be one of running, finished, stopped, but is 'over'"),
        ({"colour": 1}, r"report has the unknown field 'colour'; expected title, "),
        ({"rows": [{"key": "a"}]}, r"report\.rows\[0\] lacks the field 'edit'"),
        ({"costs": [{"phase": "solve", "seconds": True}]}, r"report\.costs\[0\]\.seconds should be a number"),
        ({"relative_change": {"three": 1.0}}, r"the key 'three' of report\.relative_change should be an integer"),
        ({"edited_layers": [2**60]}, r"report\.edited_layers\[0\] should be an integer"),
        ({"started": "yesterday"}, r"report\.started should be a time in ISO 8601, but is 'yesterday'"),
        ({"started": "2026-03-01T09:00:00"}, r"the field 'started' of a report should have a time zone"),
        ({"metrics": {"later": {}}}, r"the key 'later' of report\.metrics should be one of before, after, end"),
        ({"settings": json.loads("[" * 30 + "]" * 30)}, r"report\.settings should be an object"),
        ({"settings": {"a": json.loads("[" * 30 + "]" * 30)}}, r"is nested more than 20 times"),
    ],
)
def test_what_is_wrong_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.from_dict(changed)


def test_times_need_a_zone() -> None:
    with pytest.raises(ValueError, match="time zone"):
        Report(started=datetime(2026, 3, 1))


def test_rows_are_written_line_by_line(tmp_path: Path) -> None:
    rows = (
        *sample().rows,
        *hostile().rows,
        replace(fact("x", None, "y", ("y",)), measured={"after": Measured("y", True, math.nan)}),
    )
    path = write_rows(rows, tmp_path / "new")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) == len(rows) + 1
    assert json.loads(lines[0])["measured"]["end"]["generated"] == "Lyon"
    assert "NaN" not in lines[-2] and json.loads(lines[-2])["measured"]["after"]["p_new"] is None
    again = read_rows(path)
    assert again[:-1] == rows[:-1]
    assert math.isnan(again[-1].measured["after"].p_new)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"key": 1}', "line 2 lacks the field"),
        (b"\xff", "not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_rows(sample(1).rows, tmp_path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_outcomes() -> None:
    held = Measured("y", True, 0.9)
    lost = Measured("x", False, 0.1)
    row = fact("x", "x", "y", ())
    expected = {
        "holds": {"before": lost, "after": held},
        "lost": {"after": held, "end": lost},
        "failed": {"after": lost, "end": lost},
        "unmeasured": {"before": held},
    }
    for outcome, measured in expected.items():
        assert outcome_of(replace(row, measured=measured)) == outcome  # type: ignore[arg-type]
    assert outcome_of(replace(row, measured={"after": held}, kept=False)) == "undone"


def test_an_edit_that_was_replaced_is_told_and_counts_no_more() -> None:
    rows = sample(3).rows
    replaced = replace(rows[0], replaced_by=2)
    assert outcome_of(rows[0]) == "holds" and outcome_of(replaced) == "replaced"
    alone, both = Totals.of(rows[1:]), Totals.of([replaced, *rows[1:]])
    assert both == Totals({**alone.facts, "replaced": 1}, alone.paraphrases, alone.neighbours)
    assert both.headline == alone.headline


@pytest.mark.parametrize(
    ("facts", "headline"),
    [
        (0, "No fact has been edited."),
        (1, "The fact holds."),
        (2, "All 2 facts hold."),
        (3, "2 of 3 facts hold: 1 failed."),
        (5, "3 of 5 facts hold: 1 failed, 1 lost later."),
    ],
)
def test_the_headline_counts(facts: int, headline: str) -> None:
    totals = Totals.of(sample(facts).rows)
    assert totals.headline == headline
    assert Totals.of(sample(5).rows[2:3]).headline == "The fact does not hold: failed."
    assert Totals.of(sample(5).rows[2:4]).headline == "None of 2 facts hold: 1 failed, 1 lost later."
    assert totals.number == facts


def test_totals_count_paraphrases_and_neighbours_at_the_last_moment() -> None:
    totals = Totals.of(sample().rows)
    assert (totals.paraphrases, totals.neighbours) == ((6, 10), (15, 20))
    undone = [replace(row, kept=False) for row in sample().rows]
    assert Totals.of(undone) == Totals({**dict.fromkeys(totals.facts, 0), "undone": 5}, (0, 0), (0, 0))


def test_the_table_has_no_empty_columns_and_begins_with_failures() -> None:
    names, rows = facts_table(sample().rows)
    assert names[:7] == ["outcome", "prompt", "old", "new", "before", "after", "end"]
    assert names[7:] == ["p(new)", "p(old)", "paraphrases", "neighbours", "reason", "edit", "epoch", "step"]
    assert [row[0] for row in rows] == ["failed", "lost later", "holds", "holds", "holds"]
    names, rows = facts_table([fact("x", None, "y", (), epoch=None, step=None)])
    assert names == ["outcome", "prompt", "new", "edit"]
    assert facts_table(()) == ([], [])


def test_markdown_is_one_table_whatever_the_texts_are() -> None:
    text = markdown(hostile().rows)
    lines = text.splitlines()
    assert len(lines) == 2 + len(HOSTILE)
    assert len({line.count("|") for line in lines}) == 1
    assert "<script" not in text and "\x1b" not in text and "`" not in text
    assert markdown(sample().rows, max_rows=2).splitlines()[-1] == "and 3 more"
