"""The outputs of a run's report: its files, its tables and pictures for loggers, and what is printed at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console, RenderableType
from rich.progress import Progress

from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.callbacks.run_folder import RunFile
from lit_moeedit.interrupts import uninterrupted
from lit_moeedit.reports import FactRow, Report, facts_table, markdown, write_report

log = logging.getLogger(__name__)

PAGES = ("edits.jsonl", "report.html")


class RunFiles:
    """The files of one run: the summary, and those of the report.

    Args:
        summary: name of the summary.

    Raises:
        ValueError: if it is not the plain name of a file.
    """

    def __init__(self, summary: str) -> None:
        self._summary, self._pages = RunFile(summary), {name: RunFile(name) for name in PAGES}

    def locate(self, trainer: L.Trainer) -> None:
        """Find where the trainer's run writes them; every rank calls this.

        Raises:
            OSError: if one could not be written.
        """
        for file in (self._summary, *self._pages.values()):
            file.locate(trainer)

    def write_report(self, report: Report) -> None:
        """Write ``edits.jsonl`` and ``report.html``; a failure is no reason to lose a run: log a warning."""
        try:
            with TemporaryDirectory() as folder:
                for path in write_report(report, folder):
                    self._pages[path.name].write(path.read_bytes())
        except Exception as error:  # of a disk that is full, or a figure that cannot be drawn
            reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            log.warning("EditReport could not write %s: %s", " and ".join(PAGES), reason)
            log.debug("", exc_info=error)

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write the summary and return its path.

        Raises:
            OSError: if it cannot be written.
        """
        return self._summary.write(json.dumps(summary, indent=2) + "\n")


def log_tables(trainer: L.Trainer, rows: Sequence[FactRow], max_rows: int) -> None:
    """Give the table of facts to the loggers that show tables; a later one takes the place of an earlier one.

    Args:
        trainer: the trainer, with its loggers.
        rows: the facts.
        max_rows: maximum number of rows; the failed facts come first.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            columns, cells = facts_table(rows)
            logger.log_table("edits", columns=columns, data=cells[:max_rows])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("edits", markdown(rows, max_rows), trainer.global_step)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            logger.experiment.log_text(logger.run_id, markdown(rows, max_rows), "edits.md")


def log_routing(trainer: L.Trainer) -> None:
    """Give W&B a plot of the routing similarity by layer for each ``RoutingMonitor``, if there is matplotlib."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    for monitor in callbacks_of(trainer, RoutingMonitor) if loggers else ():
        with uninterrupted():  # matplotlib may lose an interrupt
            figure = monitor.figure()
            for logger in loggers if figure is not None else ():
                logger.log_image(monitor.metrics_prefix, [figure])


def show(trainer: L.Trainer, parts: Iterable[RenderableType]) -> None:
    """Print tables and texts where the trainer shows its progress."""
    # a live display would erase what another console prints below it; nothing is left to be shown there
    display = getattr(trainer.progress_bar_callback, "progress", None)
    if isinstance(display, Progress):
        display.stop()
    console = Console(emoji=False)
    for part in parts:
        is_text = isinstance(part, str)
        console.print(part, markup=not is_text, soft_wrap=is_text)
