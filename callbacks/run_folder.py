"""The folder of a run's own results, and files of earlier runs that stay."""

from __future__ import annotations

import os
import shutil
from functools import partial
from itertools import count
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lit_moeedit.atomic_files import atomic_file, check_writable
from lit_moeedit.callbacks.resources import on_first_rank


def run_folder(trainer: L.Trainer) -> str:
    """Return the folder for what belongs to this run alone; a broadcast, so every rank takes part.

    It is where the first logger keeps its metrics (``trainer.log_dir`` of CSV and TensorBoard loggers). For other
    loggers, of which many runs share one ``save_dir``, it is the folder in which Lightning saves the run's checkpoints,
    ``save_dir/name/version``. Without a logger it is ``default_root_dir``.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or isinstance(logger, DummyLogger):
        folder = trainer.default_root_dir
    elif isinstance(logger, CSVLogger | TensorBoardLogger):
        folder = logger.log_dir
    else:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = f"{logger.save_dir or trainer.default_root_dir}/{logger.name}/{version}"  # may be a URL
    return str(trainer.strategy.broadcast(str(folder)))


def set_aside(path: Path, replacement: Path | None = None) -> None:
    """Rename an earlier run's file, ``summary.json`` to ``summary-v1.json`` or the next number that is free.

    Args:
        path: the file, which need not exist.
        replacement: the file that takes its place; if they do not differ, nothing happens.
    """
    if not path.is_file() or (replacement is not None and path.read_bytes() == replacement.read_bytes()):
        return
    numbered = (path.with_name(f"{path.stem}-v{number}{path.suffix}") for number in count(1))
    path.rename(next(name for name in numbered if not name.exists()))


class RunFile:
    """A file in the run's own folder, of which ``default_root_dir`` has that of the latest run.

    It may be written several times; only files of earlier runs are kept under other names.

    Args:
        filename: name of the file.

    Raises:
        ValueError: if ``filename`` is not the plain name of a file.
    """

    def __init__(self, filename: str) -> None:
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename must be the name of a file without a folder, got {filename!r}")
        self.filename = filename
        self._paths: list[Path] = []  # the run's own, then that of the latest run
        self._written: set[Path] = set()

    def locate(self, trainer: L.Trainer) -> None:
        """Find where the trainer's run writes the file; every rank calls this.

        Raises:
            OSError: if it could not be written.
        """
        folder, root = run_folder(trainer), Path(trainer.default_root_dir)
        folders = dict.fromkeys([root if "://" in folder else Path(folder), root])
        self._paths = [folder / self.filename for folder in folders]
        for path in self._paths:
            on_first_rank(trainer, partial(check_writable, path))

    def write(self, content: str | bytes) -> Path:
        """Write the run's own file and return its path; the same file becomes that of the latest run."""
        own, *others = self._paths
        with atomic_file(own) as beside:
            beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            if own not in self._written:
                set_aside(own, beside)
        for latest in others:
            with atomic_file(latest) as beside:
                _link_or_copy(own, beside)
                if latest not in self._written and not _is_also_elsewhere(latest):
                    set_aside(latest, beside)
        self._written = {own, *others}
        return own


def _is_also_elsewhere(path: Path) -> bool:
    """Tell if a file has a second name, as one of :func:`_link_or_copy` has until the other is deleted."""
    return path.is_file() and path.stat().st_nlink > 1


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
