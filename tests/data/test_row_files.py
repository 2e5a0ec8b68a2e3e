"""Tests of reading rows piece by piece: the same rows for any size of pieces, bounded memory, errors with a place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.data.facts import FactError, read_facts
from lit_moeedit.data.row_files import ROW_LIMIT, load_rows
from lit_moeedit.data.rows import Number
from tests.data.fuzzing import pieces_of
from tests.data.rows import NATIVE, write

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def rows_of(path: Path) -> list[Any]:
    numbers, rows = zip(*load_rows(path), strict=True)
    assert numbers == tuple(range(1, len(rows) + 1))
    return list(rows)


def error_of(path: Path) -> tuple[int | None, str]:
    with pytest.raises(FactError) as caught:
        list(load_rows(path))
    assert str(caught.value).startswith(str(path))
    return caught.value.row, caught.value.message


@given(st.lists(values, min_size=1, max_size=4), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 12))
def test_a_list_is_read_as_if_at_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii: bool, piece: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "facts.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    path.write_bytes(text.encode("utf-8", errors="replace"))
    with pieces_of(piece):
        assert rows_of(path) == json.loads(path.read_text(encoding="utf-8"), parse_float=Number)


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("", None, "is empty; expected a list of objects"),
        ("  \n", None, "is empty; expected a list of objects"),
        ("[1$]", 1, "is not valid JSON ('$' after an element at line 1); expected a list of objects"),
        ("[1.]", 1, "is not valid JSON ('.' after an element at line 1); expected a list of objects"),
        ("[1 2]", 1, "is not valid JSON ('2' after an element at line 1); expected a list of objects"),
        ("[1,]", 2, "is not valid JSON (Expecting value at line 1); expected a list of objects"),
        ("[1,\n\n", 2, "is not valid JSON (Expecting value at line 3); expected a list of objects"),
        ("[{}", 1, "is not valid JSON (the file ends within the list at line 1); expected a list of objects"),
        (
            "[\n{},\n{'a'}]",
            2,
            "is not valid JSON (Expecting property name enclosed in double quotes at line 3); expected",
        ),
        ('[\n{},\n{"a": "b', 2, "is not valid JSON (Unterminated string starting at at line 3); expected"),
        ("[1]\n[2]", None, "holds '[' after the list, at line 2; expected nothing"),
        (
            '[{"a": 1, "a": 2}]',
            1,
            "is not valid JSON (the name 'a' occurs twice in an object, from line 1 on); expected",
        ),
    ],
)
def test_a_broken_list_is_named_by_row_and_line(tmp_path: Path, text: str, row: int | None, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text, encoding="utf-8")
    for piece in (1, 2, 3, 5, 7, 2**18):
        with pieces_of(piece):
            found = error_of(path)
            assert found[0] == row and found[1].startswith(message)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_other_encodings_with_a_mark_are_named(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    path.write_text(json.dumps([NATIVE]), encoding=encoding)
    assert error_of(path) == (None, f"begins with the byte order mark of {encoding.upper()}; expected a UTF-8 file")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_other_encodings_without_a_mark_are_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([NATIVE]), encoding=encoding)
    message = "begins with NUL bytes, as UTF-16 without a mark would; expected a UTF-8 file"
    assert error_of(path) == (None, message)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_what_is_no_utf8_is_named_by_byte_and_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    path.write_bytes(b'["\n' * (suffix == ".json") + b"a\n" * (suffix == ".csv") + b"\n\nMalm\xf6\n")
    for piece in (1, 4, 2**18):
        with pieces_of(piece), pytest.raises(FactError, match=r"is not valid UTF-8 \(byte 0xf6 in line \d\)"):
            list(load_rows(path))


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, folder, broken = (tmp_path / name for name in ("pipe.json", "folder.json", "broken.json"))
    os.mkfifo(pipe)
    folder.mkdir()
    broken.symlink_to(broken)
    assert error_of(pipe) == (None, "is a pipe; expected a regular file")
    assert error_of(folder) == (None, "is a directory; expected a regular file")
    assert error_of(Path("/dev/null")) == (None, "is a device; expected a regular file")
    with pytest.raises(FactError, match="is not a path"):
        list(load_rows(tmp_path / "a\0.json"))
    with pytest.raises(OSError, match=r"broken\.json"):
        list(load_rows(broken))
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.json")
        assert error_of(Path("socket.json")) == (None, "is a socket; expected a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", [NATIVE])
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"facts\.json"):
        list(load_rows(path))


def test_names_of_files_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[2Ja\u202e.txt"
    path.touch()
    with pytest.raises(FactError) as caught:
        list(load_rows(path))
    assert "\\x1b[2Ja\\u202e.txt: has the suffix" in str(caught.value) and str(caught.value).isprintable()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    long = json.dumps({"subject": "x" * ROW_LIMIT})
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{json.dumps(NATIVE)}\n{long}\n{{}}\n", encoding="utf-8")
    (_, first), (number, error), (last, _) = load_rows(path)
    assert (first, number, last) == (NATIVE, 2, 3)
    assert str(error) == f"{path}, row 2: is a line of 4.0 MiB; expected at most 4 MiB in a row"
    assert len(read_facts(path, strict=False)) == 1

    path = tmp_path / "facts.json"
    path.write_text(f"[{json.dumps(NATIVE)},\n{long}]", encoding="utf-8")
    assert error_of(path) == (2, "is longer than 4 MiB (from line 2 on); expected at most 4 MiB in a row")
    # nor is a row that never ends read to its end
    path.write_text("[" + '["' + "x" * 4 * ROW_LIMIT, encoding="utf-8")
    assert error_of(path) == (1, "is longer than 4 MiB (from line 1 on); expected at most 4 MiB in a row")


def test_a_row_of_a_table_has_a_limit_however_many_lines_it_has(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    cell = '"' + "é" * 2**15 + '\n"'  # half as many letters as bytes
    path.write_text(f"a,b\n{cell},{cell}\n" + ",".join([cell] * 62) + "\n", encoding="utf-8")
    assert [number for number, _ in load_rows(path)] == [2, 5]
    path.write_text(f"a,b\n{cell},{cell}\n" + ",".join([cell] * 66) + "\n", encoding="utf-8")
    message = "is longer than 4 MiB (a quote that is not closed?); expected at most 4 MiB in a row"
    assert error_of(path) == (5, message)


def test_what_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(f"[{json.dumps(NATIVE)}, this is no JSON", encoding="utf-8")
    assert len(read_facts(path, limit=1)) == 1
    with pytest.raises(FactError, match="row 2: is not valid JSON"):
        read_facts(path, strict=False)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    filler = "x" * 2000
    with path.open("w", encoding="utf-8") as stream:
        if suffix == ".csv":
            stream.write("subject,prompt,target_new\n")
        for number in range(4000):
            row = {"subject": f"{number}", "prompt": f"{number} {filler}", "target_new": "a"}
            if suffix == ".csv":
                stream.write(",".join(row.values()) + "\n")
            else:
                stream.write(("[" if number == 0 else ",") * (suffix == ".json") + json.dumps(row) + "\n")
        stream.write("]" * (suffix == ".json"))
    assert path.stat().st_size > 8e6
    tracemalloc.start()
    try:
        with closing(load_rows(path)) as rows:
            assert sum(1 for _ in rows) == 4000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # two pieces of 256 KiB as bytes and text, and a row
    assert peak < 2e6


@pytest.mark.slow
def test_a_line_of_a_gigabyte_needs_no_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"subject": "')
        stream.truncate(2**30)  # zeros, which take no place on the disk
        stream.seek(2**30)
        stream.write(b"\n" + json.dumps(NATIVE).encode() + b"\n")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from lit_moeedit.data.row_files import load_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = list(load_rows(Path(sys.argv[1])))\n"
        "print(rows[0][1]); print(rows[1][1]['subject'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    error, subject, grown = done.stdout.splitlines()
    assert error.endswith("row 1: is a line of 1,024.0 MiB; expected at most 4 MiB in a row") and subject == "Rome"
    assert int(grown) < 32 * 1024  # KiB
