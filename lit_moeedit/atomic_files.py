"""Files that appear wholly or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def appearing(path: str | Path) -> Iterator[Path]:
    """A file near ``path`` to write into, which takes its place when the block ends, and is gone if that fails.

    Folders on the way are made. Of several writers at the same time the last one wins.

    Raises:
        NotADirectoryError: if there is a file where a folder is needed.
        OSError: if the file cannot be written; whatever was at ``path`` is still there.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with appearing(Path(folder, "new", "file.txt")) as beside:
        ...         _ = beside.write_text("all of it")
        ...     [path.name for path in Path(folder, "new").iterdir()]
        ['file.txt']
    """
    path = Path(path)
    _make_folder(path.parent)
    # in a folder of this writer alone: no other one, and no link that was laid in wait, is written into
    with tempfile.TemporaryDirectory(
        prefix=f".{path.name}.", suffix=".part", dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        beside = Path(folder, path.name)
        with naming(path):
            yield beside
        beside.replace(path)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have an ``OSError`` of this block name a file or folder, which that of a failed write does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Raise ``OSError`` if a file could not appear at ``path`` now, before the work whose result it is to hold."""
    _make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file is to be written there")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; the file appears complete or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with appearing(path) as beside:
        try:
            save_file(stored, beside, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(
    path: str | Path, names: Sequence[str], form: str, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write_tensors` wrote: tensors and metadata.

    Args:
        path: the file.
        names: of the tensors that it must hold.
        form: what its metadata must have as ``format``.
        what: names the contents in an error.

    Raises:
        ValueError: if the file holds something else, or numbers that are not finite.
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
        raise NotADirectoryError(f"{folder} cannot be a folder: there is a file of that name, or on the way") from error
