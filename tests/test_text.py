"""Tests of text in messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.text import brief, first_few, printable


@pytest.mark.parametrize("keep", ["", "\n"])
@given(text=st.text())
def test_nothing_in_a_message_moves_the_cursor_or_turns_the_line(text: str, keep: str) -> None:
    shown = printable(text, keep)
    assert all(c.isprintable() or c in keep for c in shown)
    assert printable(shown, keep) == shown
    shown.encode("utf-8")
    assert shown == text or not all(c.isprintable() or c in keep for c in text)


@given(st.text())
def test_a_brief_error_is_one_line(text: str) -> None:
    shown = brief(ValueError(text))
    assert shown.splitlines() == [shown] and len(shown) <= 201


@pytest.mark.parametrize(
    ("items", "total", "expected"),
    [
        ([], None, ""),
        (["a", "b"], None, "a, b"),
        (["a", "b", "c"], None, "a, b and 1 more"),
        ([1, 2], 2002, "1, 2 and 2,000 more"),
        ([1], 1, "1"),
        ({"a": 1, "b": 2, "c": 3}, None, "a, b and 1 more"),
    ],
)
def test_the_first_few_items_are_listed_and_the_others_counted(items: list[object], total: int, expected: str) -> None:
    assert first_few(items, 2, total=total) == expected
