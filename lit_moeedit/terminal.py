"""Progress of a command on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each phase of a command, where the log is on a terminal and tells what is done.

    Yields:
        A function to call with a phase's name, the number of steps done, and their total number.
    """
    # the console of the log: a message of another one would end up within the bars
    console = get_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    is_shown = console.is_terminal and log.isEnabledFor(logging.INFO)  # of several ranks one tells it
    with Bar(*columns, console=console, transient=True, disable=not is_shown) as bar:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield show
