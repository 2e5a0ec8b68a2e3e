"""The command ``lit-moeedit``: LightningCLI for runs that edit, and further commands beside it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.logging import RichHandler
from typing_extensions import override

import lit_moeedit
import lit_moeedit.callbacks  # makes callbacks and strategies known by their short names
from lit_moeedit import safe_yaml
from lit_moeedit.arguments import cause
from lit_moeedit.checkpoints.export import export
from lit_moeedit.commands import PROGRAM, Commands
from lit_moeedit.data.check import check
from lit_moeedit.editing import FailedEditError
from lit_moeedit.edits.commands import apply_edits, list_edits, show_edits, undo_edits, verify_edits
from lit_moeedit.locating import locate
from lit_moeedit.planning.families import families
from lit_moeedit.planning.report import plan
from lit_moeedit.recipes import recipes
from lit_moeedit.runs import EditingCLI, WholeConfigCallback
from lit_moeedit.sharding.ranks import RankError
from lit_moeedit.standalone.autopsy import autopsy_edits
from lit_moeedit.standalone.command import edit_model
from lit_moeedit.text import printable

log = logging.getLogger(__name__)

COMMANDS: dict[str, Callable[..., None]] = {
    "edit": edit_model,
    "edits apply": apply_edits,
    "edits autopsy": autopsy_edits,
    "edits list": list_edits,
    "edits show": show_edits,
    "edits undo": undo_edits,
    "edits verify": verify_edits,
    "export": export,
    "facts check": check,
    "families": families,
    "locate": locate,
    "plan": plan,
    "recipes": recipes,
}
"""Commands besides training and evaluation, of one word or two: functions whose arguments and docstrings are their
help."""
GROUPS = {
    "edits": "Edits that are files: apply, list, show, undo and verify them, and find out why training lost them.",
    "facts": "Facts files: check them.",
}
"""Descriptions of the first words of commands that have two."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C has ended, as a shell counts it."""


class PrintableFormatter(logging.Formatter):
    """A formatter that spells out control characters, which data and models of others may bring into messages."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def run(args: ArgsType = None) -> EditingCLI | None:
    """Run the command line.

    Args:
        args: arguments instead of those of the process.

    Returns:
        The CLI with module, data and trainer of a run; ``None`` for the other commands.
    """
    handler = RichHandler(show_path=False, omit_repeated_times=False)
    handler.setFormatter(PrintableFormatter("%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # one rank logs what all ranks know
    level = "INFO" if getattr(rank_zero_only, "rank", 0) in (None, 0) else "WARNING"
    logging.getLogger("lit_moeedit").setLevel(os.environ.get("LIT_MOEEDIT_LOG", level).upper())
    safe_yaml.install()
    given = sys.argv[1:] if args is None else args
    words = given if isinstance(given, list) else []
    commands = Commands(COMMANDS, GROUPS)
    if words and words[0] in commands.first_words:
        name = commands.find(words)
        if name is None:
            commands.parser(words[0]).parse_args(words[1:])  # which prints help, or what is wrong
        else:
            _run_command(commands, name, words[len(name.split()) :])
        return None
    return EditingCLI(
        commands=commands,
        save_config_callback=WholeConfigCallback,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": PROGRAM,
            "description": "Edit facts in the weights of Mixture-of-Experts language models, also while they train.",
            "usage": f"{PROGRAM} [-c CONFIG] COMMAND ...",
            "version": lit_moeedit.__version__,
            **{name: {"usage": f"{PROGRAM} {name} [--config CONFIG] [OPTIONS]"} for name in EditingCLI.subcommands()},
        },
        args=args,
    )


def _run_command(commands: Commands, name: str, args: list[str]) -> None:
    """Run one of the functions; an error in its files or options ends the process without a traceback."""
    try:
        commands.call(name, args)
    except (OSError, ValueError, FloatingPointError, ImportError, RankError) as error:
        log.debug("", exc_info=error)
        raise SystemExit(printable(f"{PROGRAM} {name}: {cause(error)}", keep="\n")) from error


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwind at SIGTERM, so that no half-written file is left, where no trainer has a handler of its own."""
    if signal.getsignal(number) is _terminate:  # Lightning's handler calls that which was there before
        raise SIGTERMException(128 + number)


def main() -> None:
    """Run the command ``lit-moeedit``; an error in its input or output ends the process without a traceback.

    A console script exits with what its function returns, so nothing is returned.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    if not sys.stderr.isatty():  # where a bar would be many lines of a log
        transformers.utils.logging.disable_progress_bar()
    try:
        run()
    except (
        OSError,
        ValueError,
        FloatingPointError,
        MisconfigurationException,
        ModuleNotFoundError,
        FailedEditError,
    ) as error:
        log.debug("", exc_info=error)
        name = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
        hint = "(LIT_MOEEDIT_LOG=debug shows where it was raised)"
        raise SystemExit(printable(f"{f'lit-moeedit {name}'.strip()}: {cause(error)}\n{hint}", keep="\n")) from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has ended the run, with exit code 1
            raise SystemExit(INTERRUPTED) from None
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
