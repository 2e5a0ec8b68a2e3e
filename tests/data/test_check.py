"""Tests of the command `facts check`: its output, its failures, and escaped control characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from lit_moeedit.cli import run
from tests.data.rows import FLAT, MQUAKE, NATIVE, ZSRE, write
from tests.data.tokenizers import tokenizer

pytestmark = pytest.mark.usefixtures("own_process")


def checked(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    run(["facts", "check", str(path), *options])
    return capsys.readouterr().out.splitlines()


def refused(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, list[str]]:
    """Return the exit message of the command and its output; a text as exit code means 1."""
    with pytest.raises(SystemExit) as caught:
        run(["facts", "check", str(path), *options])
    assert isinstance(caught.value.code, str)
    return caught.value.code, capsys.readouterr().out.splitlines()


def test_what_is_understood_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**FLAT, "prompt": f"Toko Yasuda plays the {number}."} for number in range(1200)]
    rows[7].pop("rephrase_prompt")
    path = write(tmp_path / "facts.json", rows)
    assert checked(path, capsys) == [
        f"{path}: 1,200 rows of the format counterfact_flat",
        "  1,200 usable facts, 0 rows that cannot be used",
        "  1,200 with true target",
        "  1,199 with paraphrases (1,199 in all)",
        "  1,200 with neighbours (1,200 in all)",
        "  neighbours by group: same_relation 1,200",
        *(
            line
            for number in (0, 1)
            for line in (
                f"Example, row {number + 1}: 'Toko Yasuda'",
                f"  prompt      'Toko Yasuda plays the {number}.'",
                "  target      'guitar' -> 'piano'",
                "  paraphrase  'Toko Yasuda is incredible at'",
                "  neighbour   'John Lennon performs on the': 'guitar'",
            )
        ),
    ]
    assert checked(path, capsys, "--limit", "5")[0] == f"{path}: 5 rows of the format counterfact_flat"


def test_problems_are_grouped_by_field_and_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [{**NATIVE, "target_new": {}, "paraphrases": [{}, number]} for number in range(11)]
    path = write(tmp_path / "facts.jsonl", [NATIVE, *bad, {**NATIVE, "subject": "Oslo"}])
    code, lines = refused(path, capsys)
    assert code == f"lit-moeedit facts check: {path}: 12 of 13 rows cannot be used"
    assert lines[-6:] == [
        "Problem, field target_new: 11 (rows 2, 3, 4, 5, 6, 7, 8, 9 and 3 more)",
        "  row 2: is {} (dict); expected a text",
        "Problem, field paraphrases[]: 11 (rows 2, 3, 4, 5, 6, 7, 8, 9 and 3 more)",
        "  row 2: is {} (dict); expected a text",
        "Problem, field prompt: 1 (rows 13)",
        "  row 13: does not contain the subject 'Oslo'; expected it letter by letter in 'Rome lies in'",
    ]


def test_columns_and_formats_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "facts.csv"
    path.write_text("name,prompt,new,p1,p2\nRome,{} lies in,Spain,a,b\n", encoding="utf-8")
    assert "has 'name', 'prompt', 'new', 'p1', 'p2', which is no known format" in refused(path, capsys)[0]
    columns = "{subject: name, target_new: new, paraphrases: [p1, p2]}"
    lines = checked(path, capsys, "--columns", columns)
    assert lines[0] == f"{path}: 1 rows of the format columns" and "  1 with paraphrases (2 in all)" in lines
    assert refused(path, capsys, "--format", "zsre")[1][-1] == "  row 2: is missing; expected a text"
    assert "format is 'excel'; expected one of" in refused(path, capsys, "--format", "excel")[0]
    assert "limit is 0; expected at least 1" in refused(path, capsys, "--limit", "0")[0]


def test_shared_edits_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "facts.json", [MQUAKE, MQUAKE, MQUAKE])
    assert checked(path, capsys)[:3] == [
        f"{path}: 3 rows of the format mquake",
        "  1 usable facts, 0 rows that cannot be used",
        "  2 repetitions of an edit of an earlier row, left out",
    ]


def test_a_tokenizer_checks_targets_and_edit_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer("metaspace").save_pretrained(folder)
    path = write(tmp_path / "facts.json", [NATIVE, {**NATIVE, "prompt": "Rome is", "target_new": "</s>"}])
    checked(path, capsys)
    code, lines = refused(path, capsys, f"--tokenizer={folder}")
    assert code.endswith("1 of 2 rows cannot be used")
    expected = "is '</s>', in which the tokenizer reads its special '</s>'; expected tokens of text"
    assert lines[-2:] == ["Problem, field target_new: 1 (rows 2)", f"  row 2: {expected}"]
    assert "no-such-folder" in refused(path, capsys, f"--tokenizer={tmp_path / 'no-such-folder'}")[0]


def test_a_tokenizer_is_read_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder, mark = write(tmp_path / "facts.json", [NATIVE]), tmp_path / "evil", tmp_path / "was-run"
    folder.mkdir()
    Qwen3MoeConfig().save_pretrained(folder)
    option = f"--tokenizer={folder}"
    assert refused(path, capsys, option)[0].endswith("evil cannot be used: it has no vocabulary")
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n", encoding="utf-8")
    assert "evil cannot be used: " in refused(path, capsys, option)[0] and not mark.exists()


HOSTILE = "\u202eRome\u2066 [bold]x[/] :smile: <b>y</b> \ufffd A\u030a \u200b"


def test_nothing_of_a_file_acts_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    neighbours = [{"prompt": HOSTILE, "target": HOSTILE, "group": "a\x1b[2J" if bad else HOSTILE} for bad in (0, 1)]
    rows: list[Any] = [
        {**NATIVE, "subject": HOSTILE, "prompt": f"{HOSTILE} and {HOSTILE}?\n", "neighbours": neighbours[:1]},
        {**NATIVE, "\x1b[31m": 1, "subject": "\x1b[2J", "neighbours": neighbours},
        {**ZSRE, "\u202e": 1},
    ]
    path = write(tmp_path / "a\u202eb.json", rows)
    code, lines = refused(path, capsys)
    assert all(line.isprintable() for line in (code, *lines))
    assert any("[bold]x[/] :smile:" in line for line in lines)
    assert [line.partition(":")[0] for line in lines if line.startswith("Remark")] == [
        "Remark, markup",
        "Remark, invisible characters (of no width, or changing the direction of writing)",
        "Remark, replacement characters of an earlier wrong decoding",
        "Remark, letters that are not composed (Unicode NFC)",
        "Remark, a prompt that ends with a line break",
        "Remark, a subject that occurs twice in its prompt (the last one counts)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("facts.json", b"", "is empty; expected a list of objects"),
        ("facts.json", json.dumps([NATIVE]).encode()[:-9], "row 1: is not valid JSON ("),
        ("facts.parquet", b"PAR1", "has the suffix '.parquet'; expected '.json', '.jsonl', '.csv' or '.tsv'"),
        (None, b"", "there is no facts file"),
    ],
)
def test_a_file_that_cannot_be_read_has_one_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, content: bytes, message: str
) -> None:
    path = tmp_path / (name or "absent.json")
    if name is not None:
        path.write_bytes(content)
    code, lines = refused(path, capsys)
    assert code.startswith("lit-moeedit facts check: ") and message in code and str(path) in code
    assert lines == []
