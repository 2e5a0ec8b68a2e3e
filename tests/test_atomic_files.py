"""Tests of atomic writing: a file appears complete or not at all, whatever happens during the writing."""

from __future__ import annotations

import errno
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lit_moeedit import atomic_files
from lit_moeedit.atomic_files import (
    MAX_AGE,
    atomic_file,
    atomic_folder,
    check_writable,
    read_tensors,
    remove_leftovers,
    write_tensors,
)


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


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_permissions_are_those_of_a_new_file(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(2)}, {"format": "f"})
        with atomic_file(tmp_path / "text") as beside:
            beside.write_text("it")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "it").touch()
    finally:
        os.umask(before)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == {
        "tensors": mode, "text": mode, "it": mode, "folder": mode | (mode & 0o444) >> 2
    }  # fmt: skip


# -- folders ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic_files, "_exchange", lambda *_: False)
    path = tmp_path / "new" / "it"
    for text in ("first", "second"):
        with atomic_folder(path, overwrite=True) as beside:
            (beside / text).write_text(text)
    assert contents(tmp_path) == {"new/it/second": "second"} and [child.name for child in path.parent.iterdir()] == [
        "it"
    ]
    with pytest.raises(OSError, match="not empty"), atomic_folder(path):
        pass
    with pytest.raises(ValueError, match="no"), atomic_folder(path, overwrite=True):
        raise ValueError("no")
    assert contents(tmp_path) == {"new/it/second": "second"} and [child.name for child in path.parent.iterdir()] == [
        "it"
    ]


@pytest.mark.parametrize("was_moved", [True, False])
def test_a_writer_that_was_killed_during_the_exchange(tmp_path: Path, was_moved: bool) -> None:
    old = tmp_path / ".it.old"
    old.mkdir()
    (old / "file").write_text("old")
    if not was_moved:
        (tmp_path / "it").mkdir()
        (tmp_path / "it" / "file").write_text("new")
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "it", overwrite=True):
        raise ValueError("stop")
    assert contents(tmp_path) == {"it/file": "old" if was_moved else "new"} and not old.exists()


# -- writers that were killed -----------------------------------------------------------------------------------------


def kill_a_writer(path: Path, kind: Callable[[Path], Any]) -> Path:
    """Kill a process that writes to ``path``; returns what it has left behind."""
    child = os.fork()
    if child == 0:
        with kind(path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (leftover,) = path.parent.glob(".*.part")
    return leftover


@pytest.mark.parametrize("kind", [atomic_file, atomic_folder])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    leftover = kill_a_writer(tmp_path / "one", kind)
    (tmp_path / ".mine.part").mkdir()
    (tmp_path / ".mine.part" / "it").write_text("of somebody else")
    with atomic_file(tmp_path / "other") as beside:
        beside.write_text("it")
    assert not leftover.exists()
    assert contents(tmp_path) == {"other": "it", ".mine.part/it": "of somebody else"}


def test_a_writer_that_lives_keeps_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "one"
    with atomic_file(path) as beside:
        beside.write_text("mine")
        for entry in (beside, beside.parent):
            os.utime(entry, (0, 0))
        remove_leftovers(tmp_path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("why", ["no locks", "of another machine"])
def test_what_no_lock_can_tell_is_removed_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    leftover = kill_a_writer(tmp_path / "one", atomic_file)
    if why == "no locks":

        def fail(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", fail)
    else:
        monkeypatch.setattr(atomic_files, "_machine", lambda: "0123abcd")
    remove_leftovers(tmp_path)
    assert leftover.exists()
    some = leftover / "inner"
    some.touch()
    past = leftover.stat().st_mtime - MAX_AGE - 10
    os.utime(leftover, (past, past))
    remove_leftovers(tmp_path)
    assert leftover.exists()  # something in it is newer
    os.utime(some, (past, past))
    remove_leftovers(tmp_path)
    assert not leftover.exists()


def test_a_folder_that_is_taken_for_a_leftover_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = atomic_files.tempfile.mkdtemp, []

    def taken(**options: Any) -> str:
        made.append(make(**options))
        if len(made) < 3:
            remove_leftovers(tmp_path)
        return made[-1]

    monkeypatch.setattr("tempfile.mkdtemp", taken)
    with atomic_file(tmp_path / "one") as beside:
        beside.write_text("it")
    assert len(made) == 3 and contents(tmp_path) == {"one": "it"}
