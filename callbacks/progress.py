"""A progress bar of an edit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def edit_progress(trainer: L.Trainer) -> Iterator[Any]:
    """A progress bar of the phases of an edit, where the trainer shows progress too."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield None
        return
    columns = (TextColumn("Edit: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield show
