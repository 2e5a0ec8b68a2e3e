"""The command ``lit-moeedit``: LightningCLI with what this package has for it, and other commands beside it."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.logging import RichHandler

import lit_moeedit.callbacks  # noqa: F401 - makes callbacks and strategies known by their short names
from lit_moeedit.data import FactsDataModule
from lit_moeedit.data.check import check
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.families import families
from lit_moeedit.planning.report import plan
from lit_moeedit.sharding.export import export

COMMANDS: dict[str, Callable[..., None]] = {
    "export": export,
    "facts check": check,
    "families": families,
    "plan": plan,
}
"""What the command does besides training and evaluation, under one word or two: functions whose arguments and
docstrings are their help."""


class CommandParser(ArgumentParser):
    """Takes ``--option`` for ``--option=true``."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; one that is true or false may be given without a value."""
        if kwargs.get("type") is bool:
            kwargs |= {"nargs": "?", "const": True}
        return super().add_argument(*args, **kwargs)


class EditingCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data module, ours by default."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: CSV logs, one device, and results in ``runs``."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.devices": 1,
                "seed_everything": 0,
            }
        )


def run(args: ArgsType = None) -> EditingCLI | None:
    """Run the command line and return what LightningCLI made, if it was its turn.

    Args:
        args: arguments instead of those of the process.
    """
    handler = RichHandler(show_path=False, omit_repeated_times=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    # what all ranks would say, the first one says
    level = "INFO" if getattr(rank_zero_only, "rank", 0) in (None, 0) else "WARNING"
    logging.getLogger("lit_moeedit").setLevel(os.environ.get("LIT_MOEEDIT_LOG", level).upper())
    given = sys.argv[1:] if args is None else args
    for name in COMMANDS:
        words = name.split()
        if isinstance(given, list) and given[: len(words)] == words:
            _run_command(name, given[len(words) :])
            return None
    others = (f"{name} ({(inspect.getdoc(function) or '').splitlines()[0]})" for name, function in COMMANDS.items())
    return EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"epilog": f"Besides: {'; '.join(others)}. Each has its own --help."},
        args=args,
    )


def _run_command(name: str, args: list[str]) -> None:
    """Run one of the functions; what is wrong with its files or options needs no traceback."""
    function = COMMANDS[name]
    # not auto_cli, which takes a --config for itself
    what = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    parser = CommandParser(prog=f"lit-moeedit {name}", description=what)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    options = parser.parse_args(args).as_dict()
    try:
        function(**options)
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).debug("", exc_info=error)
        raise SystemExit(f"lit-moeedit {name}: {error}") from error


def main() -> None:
    """The command ``lit-moeedit``; what a console script returns becomes the exit code, so nothing is returned."""
    run()


if __name__ == "__main__":
    main()
