"""Tests of atomic writing: a file appears complete or not at all, whatever happens during the writing."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lit_moeedit.atomic_files import atomic_file, check_writable, read_tensors, write_tensors


@pytest.mark.parametrize("old", [None, "what was there"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("other")], ids=repr
)
def test_an_error_leaves_what_was_there(tmp_path: Path, old: str | None, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(type(error)) as raised, atomic_file(path) as beside:
        beside.write_text("half of")
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])
    if isinstance(error, OSError):
        assert isinstance(raised.value, OSError)
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)


def test_the_new_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    for text in ("first", "second"):
        with atomic_file(path) as beside:
            beside.write_text(text)
            assert not path.exists() or path.read_text() == "first"
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, other = tmp_path / "file.txt", tmp_path / "other.txt"
    other.write_text("of somebody else")
    (tmp_path / ".file.txt.part").symlink_to(other)
    before = os.umask(0o027)
    try:
        with atomic_file(path) as first, atomic_file(path) as second:
            first.write_text("first")
            second.write_text("second")
    finally:
        os.umask(before)
    assert path.read_text() == "first" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert other.read_text() == "of somebody else"
    assert {child.name for child in tmp_path.iterdir()} == {"file.txt", "other.txt", ".file.txt.part"}


def _in_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "new.txt"


def _deep_in_a_file(folder: Path) -> Path:
    return _in_a_file(folder) / "deeper" / "new.txt"


def _a_folder(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_in_a_file, "file cannot be a folder: it, or a parent of it, is a file"),
        (_deep_in_a_file, "deeper cannot be a folder"),
        (_a_folder, "folder is a folder; expected the path of a file"),
    ],
)
def test_where_no_file_can_be(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=message):
        check_writable(path)
    with pytest.raises(OSError, match=r"cannot be a folder|Is a directory"), atomic_file(path) as beside:
        beside.write_text("new")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_where_a_file_can_be_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    check_writable(tmp_path / "old.txt")
    check_writable(tmp_path / "new" / "file.txt")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old.txt"]
    assert (tmp_path / "old.txt").read_text() == "old"


def test_no_room_for_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it.safetensors"
    write_tensors(path, {"a": torch.ones(2)}, {"format": "f"})

    def full(tensors: Any, beside: Path, **_: Any) -> None:
        beside.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lit_moeedit.atomic_files.save_file", full)
    with pytest.raises(OSError, match=r"it\.safetensors cannot be written: .*No space left"):
        write_tensors(path, {"a": torch.zeros(2)}, {"format": "f"})
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(read_tensors(path, ["a"], "f", "numbers")[0]["a"], torch.ones(2))


def test_tensors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "it", {"a": torch.tensor([1.0, torch.nan])}, {"format": "f"})
    with pytest.raises(ValueError, match="it does not hold numbers: a not finite"):
        read_tensors(tmp_path / "it", ["a"], "f", "numbers")
