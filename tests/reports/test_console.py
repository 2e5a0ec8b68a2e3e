"""The report on a terminal of 80 columns and others."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from lit_moeedit.reports import ConsoleReport, Report
from tests.reports.sample import fact, hostile, sample


def printed(report: Report, width: int, max_rows: int = 20) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(ConsoleReport(report, max_rows))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_every_fact_takes_one_line(width: int) -> None:
    lines = printed(sample(25), width)
    assert all(cell_len(line) <= width for line in lines)
    header, *rows = lines[:21]
    for column in ("prompt", "old → new", "before", "after", "end", "p(new)", "para", "near"):
        assert column in header
    assert [row.split()[0] for row in rows] == ["✗", "✗", *["✓"] * 18]
    assert lines[21].strip() == "and 5 more"
    # what tells facts apart can be read, even where the prompt is cut
    for row, subject in zip(rows, ("Burkina Faso", "Peru", "France"), strict=False):
        assert subject in row
    text = " ".join(" ".join(lines).split())
    assert "no target vector was found: the loss was still 6.9 nats after 25 steps" in text
    assert lines[-1] == "23 of 25 facts hold: 1 failed, 1 lost later."


@pytest.mark.parametrize("width", [40, 80, 120])
def test_hostile_texts_stay_texts(width: int) -> None:
    lines = printed(hostile(), width)
    text = "\n".join(lines)
    assert not set("\x1b\x00\r\u202e\u2066\udc80") & set(text)
    assert "[bold red]x[/]" in " ".join(text.split())
    if width >= 80:
        assert all(cell_len(line) <= width for line in lines)


def test_wide_letters_and_long_prompts_are_cut() -> None:
    rows = [
        fact("首都" * 20, "東京" * 30, "京都" * 30, ("東京" * 30, "京都" * 30)),
        fact("x" * 10_000, None, "y" * 10_000, ("z" * 10_000,)),
    ]
    lines = printed(replace(sample(0), rows=tuple(rows), warnings=()), 80)
    assert all(cell_len(line) <= 80 for line in lines)
    assert len(lines) < 10


def test_empty_columns_are_left_out() -> None:
    header = printed(replace(sample(), rows=(fact("x", "x", "y", ("x", "y")),)), 80)[0]
    assert "after" in header and "end" not in header
    assert printed(Report(), 80) == ["No fact has been edited."]


def test_reasons_are_counted_when_there_are_many() -> None:
    rows = tuple(fact(f"country {i}", "a", "b", ("a", "a"), reason=f"reason {i}.") for i in range(8))
    text = "\n".join(printed(replace(sample(), rows=rows), 80, max_rows=3))
    assert "reason 2." in text and "reason 3." not in text
    assert "and 5 more reasons" in text
