"""The command ``lit-moeedit``: LightningCLI with what this package has for it, and other commands beside it."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.logging import RichHandler
from typing_extensions import override

import lit_moeedit.callbacks  # noqa: F401 - makes callbacks and strategies known by their short names
from lit_moeedit import safe_yaml
from lit_moeedit.atomic_files import appearing
from lit_moeedit.callbacks.resources import on_first_rank
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import check_harmless
from lit_moeedit.data import FactsDataModule
from lit_moeedit.data.check import check
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.families import families
from lit_moeedit.planning.report import plan
from lit_moeedit.pretrained import printable

log = logging.getLogger("lit_moeedit.cli")  # not "__main__", which python -m would make of it

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


class PrintableFormatter(logging.Formatter):
    """Spells out control characters, which texts of others may bring into messages."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class WholeConfigCallback(SaveConfigCallback):
    """Saves the config where Lightning does, wholly or not at all."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # every rank has to ask
        assert folder is not None
        if "://" in folder or not (self.save_to_log_dir and self.overwrite):
            super().setup(trainer, pl_module, stage)
        elif not self.already_saved:
            on_first_rank(trainer, lambda: self._save(Path(folder)))
            self.already_saved = True
            if trainer.is_global_zero:
                self.save_config(trainer, pl_module, stage)

    def _save(self, folder: Path) -> None:
        with appearing(folder / self.config_filename) as beside:
            self.parser.save(self.config, beside, skip_unset=False, overwrite=True, multifile=self.multifile)


class EditingCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data module, ours by default.

    A checkpoint is read as data: one whose reading could run code is refused, unless ``--weights_only=false`` says that
    it can be trusted.
    """

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        settings = self.config.get(self.config.get("subcommand") or "") or Namespace()
        if "ckpt_path" not in settings or settings.get("weights_only") is False:
            return
        # Lightning's own default would run what is in a checkpoint of another host
        settings.weights_only = True
        if settings.ckpt_path:
            _check_checkpoint(settings.ckpt_path)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand is not None and self.config[self.subcommand].get("weights_only"):
            # names such as "last" become paths in the Trainer; it is a partial, because some launchers pickle it
            strategy = trainer.strategy
            strategy.load_checkpoint = partial(_load_checked, strategy.load_checkpoint)  # type: ignore[method-assign]
        return trainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: CSV logs, one device, and results in ``runs``."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.devices": 1,
                "seed_everything": 0,
            }
        )


def _check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint here that is not harmless; what is on another host is left to who reads it as data."""
    if not Path(path).exists():
        return
    try:
        check_harmless(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --weights_only=false reads it all the same, if you trust it") from error


def _load_checked(
    load: Callable[..., dict[str, Any]], checkpoint_path: str | Path, weights_only: bool | None = None
) -> dict[str, Any]:
    """A strategy's ``load_checkpoint`` of what is harmless; some strategies are not told to read it as data."""
    _check_checkpoint(checkpoint_path)
    return load(checkpoint_path, weights_only=True)


def run(args: ArgsType = None) -> EditingCLI | None:
    """Run the command line and return what LightningCLI made, if it was its turn.

    Args:
        args: arguments instead of those of the process.
    """
    handler = RichHandler(show_path=False, omit_repeated_times=False)
    handler.setFormatter(PrintableFormatter("%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # what all ranks would say, the first one says
    level = "INFO" if getattr(rank_zero_only, "rank", 0) in (None, 0) else "WARNING"
    logging.getLogger("lit_moeedit").setLevel(os.environ.get("LIT_MOEEDIT_LOG", level).upper())
    safe_yaml.use()
    given = sys.argv[1:] if args is None else args
    for name in COMMANDS:
        words = name.split()
        if isinstance(given, list) and given[: len(words)] == words:
            _run_command(name, given[len(words) :])
            return None
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    if isinstance(given, list) and given[:1] and given[0] in groups:
        known = ", ".join(f"lit-moeedit {name}" for name in COMMANDS if name.startswith(given[0]))
        raise SystemExit(f"lit-moeedit {given[0]}: expected {known}")
    others = (f"{name} ({(inspect.getdoc(function) or '').splitlines()[0]})" for name, function in COMMANDS.items())
    return EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=WholeConfigCallback,
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
        log.debug("", exc_info=error)
        raise SystemExit(printable(f"lit-moeedit {name}: {_meant(error)}")) from error


def _meant(error: BaseException) -> BaseException:
    """What a class of the config raised; jsonargparse lists it with what is wrong for other types it could be of."""
    while error.__cause__ is not None and str(error).startswith("Does not validate against any of"):
        error = error.__cause__
    return error


def main() -> None:
    """The command ``lit-moeedit``: what is wrong with its input or its outputs needs no traceback.

    What a console script returns becomes the exit code, so nothing is returned.
    """
    try:
        run()
    except (OSError, ValueError, FloatingPointError, MisconfigurationException) as error:
        log.debug("", exc_info=error)
        name = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
        hint = "(LIT_MOEEDIT_LOG=debug shows where it was raised)"
        raise SystemExit(printable(f"{f'lit-moeedit {name}'.strip()}: {_meant(error)}\n{hint}")) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as a shell counts it


if __name__ == "__main__":
    main()
