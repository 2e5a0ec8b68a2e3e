"""The command ``edit``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

from rich.console import Console

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.reports import ConsoleReport, Report
from lit_moeedit.standalone.run import TooFewFactsError, edit
from lit_moeedit.terminal import progress

log = logging.getLogger(__name__)

TOO_FEW = 3
"""Exit code if too few facts are generated."""


def edit_model(
    model: Path,
    facts: Path,
    output: Path,
    *,
    preservation: Path | None = None,
    layers: Literal["auto"] | list[int] = "auto",
    token: Literal["auto"] | EditToken = "auto",
    min_efficacy: float = 0.5,
    chat: bool = False,
    columns: dict[str, str | list[str]] | None = None,
    dry_run: bool = False,
    edit_name: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    measure: list[str] | None = None,
) -> None:
    """Edit facts in a model's folder, and write the edited model with a report.

    Layers and token are found by trials, unless they are given. Only the edited weights are rewritten; all others are
    copied byte by byte. Started by torchrun, its processes share the work. The exit code is 3 if too few facts are
    generated afterwards; nothing is written then.

    Args:
        model: local folder of a Mixture-of-Experts model in safetensors. Nothing that comes with it is executed.
        facts: facts file; lit-moeedit facts check says what is wrong with one.
        output: the folder to write, which plain transformers loads. It appears when it is complete, with the folder
            "edits" (see lit-moeedit edits), a model card, report.html and edits.jsonl.
        preservation: text file with one document per line, on which the model keeps its behavior. Without it a small
            neutral text is used; your own is better.
        layers: layers to edit, for example [3,4,5], or auto.
        token: token to edit, subject_last or last, or auto.
        min_efficacy: smallest share of edited prompts that the model continues with the new answer; with less, nothing
            is written. (Of an edit in a run it is the share for which the new answer is more likely than the old one.)
        chat: whether to ask in the tokenizer's chat template.
        columns: field names to column names of the facts file, such as '{target_new: new, paraphrases: [p1, p2]}'.
        dry_run: whether to edit in memory only, and write nothing.
        edit_name: name of the edit; edit-0001 and so on by default.
        overwrite: whether to replace an existing output.
        device: auto (a GPU if there is one), cpu, cuda or cuda:1.
        measure: further measures for the report, such as '[generation, portability, fluency]'; see the page on metrics.

    Raises:
        ValueError: if a setting, a fact or the model cannot be used.
        FileExistsError: if the output exists already.
        OSError: if a folder cannot be read or written.

    Example:
        lit-moeedit edit my-model facts.jsonl my-edited-model
    """
    try:
        with progress() as show:
            report = edit(
                model,
                facts,
                output,
                preservation=preservation,
                layers=layers,
                token=token,
                min_efficacy=min_efficacy,
                chat=chat,
                columns=columns,
                dry_run=dry_run,
                name=edit_name,
                overwrite=overwrite,
                device=device,
                progress=show,
                measure=measure or (),
            )
    except TooFewFactsError as error:
        if not _is_first():  # with an exit code, torchrun would end the first rank while it prints
            return
        _show(error.report)
        log.error("%s", error)
        raise SystemExit(TOO_FEW) from error
    _show(report)
    if dry_run:
        log.info("nothing is written (--dry-run)")


def _show(report: Report) -> None:
    """Print the table on the first rank."""
    if _is_first() and log.isEnabledFor(logging.INFO):
        Console(markup=False, emoji=False, highlight=False).print(ConsoleReport(report))


def _is_first() -> bool:
    """Tell if this is the first of the processes that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
