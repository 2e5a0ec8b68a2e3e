"""Atomic writing of files: a file appears complete or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; the file moves to ``path`` at the end of the block.

    If the block fails, the temporary file is deleted. Missing folders are made. If several processes write at the same
    time, the last one wins.

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
    _make_folder(path.parent)
    # a folder of this process alone: no other process, and no planted link, can redirect the writing
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        temporary = Path(folder, path.name)
        with path_in_errors(path):
            yield temporary
        temporary.replace(path)


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
