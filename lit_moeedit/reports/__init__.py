"""Reports on edits, fact by fact: rows, a table for the console, and a page that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from lit_moeedit.reports.autopsy import LossByPart, MissingAutopsy, PartPutBack
from lit_moeedit.reports.console import ConsoleReport
from lit_moeedit.reports.held import Held
from lit_moeedit.reports.html import write_html
from lit_moeedit.reports.jsonl import read_rows, write_rows
from lit_moeedit.reports.outcomes import Outcome, Totals, outcome_of
from lit_moeedit.reports.replay import Replayed
from lit_moeedit.reports.report import Cost, Guard, Model, Place, Report, Retention, Routing, State
from lit_moeedit.reports.rows import FactRow, Measured, Moment
from lit_moeedit.reports.survival import SurvivalPoint, Survivors
from lit_moeedit.reports.table import facts_table, markdown

__all__ = [
    "ConsoleReport",
    "Cost",
    "FactRow",
    "Guard",
    "Held",
    "LossByPart",
    "Measured",
    "MissingAutopsy",
    "Model",
    "Moment",
    "Outcome",
    "PartPutBack",
    "Place",
    "Replayed",
    "Report",
    "Retention",
    "Routing",
    "State",
    "SurvivalPoint",
    "Survivors",
    "Totals",
    "facts_table",
    "markdown",
    "outcome_of",
    "read_rows",
    "write_report",
    "write_rows",
]


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write ``edits.jsonl`` and ``report.html`` into a folder, in place of those of an earlier moment.

    Each file appears complete or not at all. The folder is made if it is missing.

    Args:
        report: The report.
        folder: The folder.

    Returns:
        The paths of the files.

    Raises:
        OSError: If a file cannot be written.
    """
    return [write_rows(report.rows, folder), write_html(report, folder)]
