"""Atomic writing of files and folders: they appear complete or not at all."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_AGE = 24 * 3600.0
"""Seconds after which a temporary folder counts as left over, if no lock can tell whether its writer lives."""

_LEFTOVER = re.compile(r"\..*\.([0-9a-f]{8})\.\w{8}\.part")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file moves to ``path`` at the end of the block.

    If the block fails, the temporary file is deleted. Missing folders are made. If several processes write at the same
    time, the last one wins. The file gets the permissions that the umask leaves to a new file, and is on the disk
    before it replaces another.

    Raises:
        NotADirectoryError: there is a file where a folder is needed.
        OSError: the file cannot be written; a previous file at ``path`` is unchanged.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(Path(folder, "new", "file.txt")) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     [path.name for path in Path(folder, "new").iterdir()]
        ['file.txt']
    """
    path = Path(path)
    with _temporary_folder(path) as folder, path_in_errors(path):
        temporary = folder / path.name
        yield temporary
        if temporary.is_file():  # else the error of the move names it
            # some libraries write files that only their owner may read
            temporary.chmod(_new_mode(folder))
            _to_disk(temporary)
        temporary.replace(path)
        _to_disk(path.parent)


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; it moves to ``path`` at the end of the block.

    If the block fails, the temporary folder is deleted. An empty folder at ``path`` is replaced in any case.

    Args:
        path: path of the folder.
        overwrite: whether to replace a folder that is not empty. It stays until the new one is complete.

    Raises:
        NotADirectoryError: there is a file where a folder is needed.
        OSError: the folder cannot be written; a previous one at ``path`` is unchanged.
    """
    path = Path(path)
    _recover(path)
    with _temporary_folder(path) as folder, path_in_errors(path):
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        move_folder(temporary, path, overwrite)


def move_folder(folder: Path, path: Path, overwrite: bool = False) -> None:
    """Move a complete folder to ``path`` in the same file system, where there may be an empty one.

    Args:
        folder: the folder. With ``overwrite`` it may hold what was at ``path`` afterwards.
        path: its new path.
        overwrite: whether to replace a folder that is not empty.

    Raises:
        OSError: it cannot be moved; what was at ``path`` is unchanged.
    """
    _recover(path)
    old = _old(path)
    for file in folder.rglob("*"):
        _to_disk(file)
    if not (overwrite and _exchange(folder, path)):
        try:
            if overwrite and path.exists():
                path.rename(old)
            folder.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    _to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> Path:
    """Return the path of a folder while another takes its place."""
    return path.with_name(f".{path.name}.old")


def _recover(path: Path) -> None:
    """Finish what a writer has left that was killed in the middle of an exchange, or after it."""
    old = _old(path)
    if old.exists():
        if path.exists() and any(path.iterdir()):
            shutil.rmtree(old)
        else:
            old.replace(path)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two existing paths in one step; return ``False`` where the system cannot."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    here, flags = -100, 2  # AT_FDCWD and RENAME_EXCHANGE in the headers of Linux
    return exchange is not None and exchange(here, os.fsencode(one), here, os.fsencode(other), flags) == 0


def remove_leftovers(folder: Path) -> None:
    """Remove temporary folders of killed writers from a folder.

    A writer holds a lock on its temporary folder, which ends with its process. A lock of another machine may be
    invisible here, on some shared file systems. So a folder of another machine is removed only after a day without a
    change, and so is any where the file system has no locks.
    """
    with suppress(OSError):  # a folder that is missing, or cannot be listed, has none that could be removed
        for path in list(folder.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match is not None and path.is_dir() and not path.is_symlink():
                _remove_if_dead(path, is_own=match[1] == _machine())


def _remove_if_dead(path: Path, is_own: bool) -> None:
    with suppress(OSError):  # another process may remove it at the same time
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            is_free: bool | None = _lock(descriptor)
            changed = max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
            is_old = time.time() - changed > MAX_AGE
            if (is_free and is_own) or (is_free is not False and is_old):
                shutil.rmtree(path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Lock an open folder; ``False`` if another process has the lock, ``None`` if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside ``path`` for this process alone: no other process, and no planted link, can redirect it."""
    _make_folder(path.parent)
    remove_leftovers(path.parent)
    # names may have 255 bytes
    name = path.name.encode()[:200].decode(errors="ignore")
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.{_machine()}.", suffix=".part", dir=path.parent))
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        if _lock(descriptor) is not False and folder.exists():
            break
        os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _machine() -> str:
    """Return a name of the running kernel, among whose processes locks are certain to be visible."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        name = socket.gethostname()
    return sha256(name.encode()).hexdigest()[:8]


def _new_mode(folder: Path) -> int:
    """Return the permissions of a new file in a folder; the umask itself cannot be read without changing it."""
    probe = folder / "..mode"
    probe.touch(exist_ok=False)
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    return mode


def _to_disk(path: Path) -> None:
    """Have the system write a file or the list of files in a folder, so that a power cut does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with (
            suppress(OSError) if path.is_dir() else path_in_errors(path)
        ):  # not every file system can do it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def path_in_errors(path: str | Path) -> Iterator[None]:
    """Add ``path`` to an ``OSError`` raised in the block that names no file, as that of a failed write."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Raise ``OSError`` if no file can be written at ``path``, before the work whose result goes there."""
    _make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the path of a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically to a safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(stored, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(
    path: str | Path, names: Sequence[str], form: str, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata that :func:`write_tensors` has written.

    Args:
        path: the file.
        names: names of the tensors that the file must have.
        form: required value of ``format`` in the metadata.
        what: name of the contents, for errors.

    Raises:
        ValueError: the file has other contents, or elements that are not finite.
    """
    try:
        opened = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold {what}: not a safetensors file ({error})") from error
    with opened as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form or set(file.keys()) != set(names):
            raise ValueError(f"{path} does not hold {what}: expected {tuple(names)}, got {sorted(file.keys())}")
        tensors = {name: file.get_tensor(name) for name in names}
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(f"{path} does not hold {what}: {', '.join(wrong)} not finite")
    return tensors, metadata


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{folder} cannot be a folder: it, or a parent of it, is a file") from error
