"""The command ``lit-moeedit``: LightningCLI for runs that edit, and further commands beside it."""

from __future__ import annotations

import inspect
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.logging import RichHandler
from typing_extensions import override

import lit_moeedit
import lit_moeedit.callbacks  # makes callbacks and strategies known by their short names
from lit_moeedit import safe_yaml
from lit_moeedit.arguments import CommandParser, RunParser
from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.callbacks.ending import EndTogether
from lit_moeedit.callbacks.resources import on_first_rank
from lit_moeedit.callbacks.run_folder import run_folder, set_aside
from lit_moeedit.checkpoint_fields import CheckpointError, differences
from lit_moeedit.checkpoints.atomic import AtomicCheckpointIO, save_atomically
from lit_moeedit.checkpoints.export import export
from lit_moeedit.checkpoints.read import check_harmless, check_undamaged
from lit_moeedit.checkpoints.settings import imported_class, no_imports_by, saved_settings
from lit_moeedit.data import FactsDataModule
from lit_moeedit.data.check import check
from lit_moeedit.edits.commands import apply_edits, list_edits, show_edits, undo_edits, verify_edits
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.families import families
from lit_moeedit.planning.report import plan
from lit_moeedit.recipes import recipes, with_recipe_paths
from lit_moeedit.text import printable

log = logging.getLogger(__name__)

COMMANDS: dict[str, Callable[..., None]] = {
    "edits apply": apply_edits,
    "edits list": list_edits,
    "edits show": show_edits,
    "edits undo": undo_edits,
    "edits verify": verify_edits,
    "export": export,
    "facts check": check,
    "families": families,
    "plan": plan,
    "recipes": recipes,
}
"""Commands besides training and evaluation, of one word or two: functions whose arguments and docstrings are their
help."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C has ended, as a shell counts it."""


class PrintableFormatter(logging.Formatter):
    """A formatter that spells out control characters, which data and models of others may bring into messages."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


class WholeConfigCallback(SaveConfigCallback):
    """A callback that saves the config atomically in the run's own folder; that of an earlier run is renamed."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        if "://" in folder or not (self.save_to_log_dir and self.overwrite):
            super().setup(trainer, pl_module, stage)
        elif not self.already_saved:
            on_first_rank(trainer, lambda: self._save(Path(folder)))
            self.already_saved = True
            if trainer.is_global_zero:
                self.save_config(trainer, pl_module, stage)

    def _save(self, folder: Path) -> None:
        with atomic_file(folder / self.config_filename) as beside:
            self.parser.save(self.config, beside, skip_unset=False, overwrite=True, multifile=self.multifile)
            set_aside(folder / self.config_filename, beside)


class EditingCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data module, ours by default.

    A checkpoint is read as data: one whose reading could run code is refused, unless ``--weights_only=false`` says that
    it can be trusted.
    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **({"parser_class": RunParser} | kwargs))
        except (OSError, ValueError) as error:
            missing = _meant(error)
            if not isinstance(missing, FileNotFoundError) or missing.filename is None:
                raise
            settings = self._settings().items()
            option = next((key for key, value in settings if str(value) == str(missing.filename)), None)
            remedy = f"give the path of yours by --{option}" if option else "the config names it"
            raise FileNotFoundError(f"No such file or directory: {str(missing.filename)!r}; {remedy}") from error

    def _settings(self) -> Any:
        """The arguments of the subcommand; empty before they are parsed."""
        config: Any = getattr(self, "config", {})
        return config.get(config.get("subcommand") or "") or {}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self._args = args
        super().parse_arguments(parser, args)
        settings = self._settings()
        self._warn_dropped_callbacks()
        if "ckpt_path" not in settings or settings.get("weights_only") is False:
            return
        # Lightning's own default would run what is in a checkpoint of another host
        settings.weights_only = True
        if settings.ckpt_path:
            _check_checkpoint(settings.ckpt_path)

    def _warn_dropped_callbacks(self) -> None:
        """Name the callbacks of one config that are lost because a later one, or an option, gives another list."""
        settings, config = self._settings(), self.config
        left = _class_names((settings.get("trainer") or {}).get("callbacks"))
        for path in (*(config.get("config") or ()), *(settings.get("config") or ())):
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None
            given = (given or {}).get(config.get("subcommand")) or given or {}
            dropped = _class_names((given.get("trainer") or {}).get("callbacks")) - left
            if dropped:
                log.warning(
                    "trainer.callbacks of %s are replaced by a later list, so this run has no %s; 'callbacks+:' in a "
                    "config (--trainer.callbacks+= as an option) adds to the list instead",
                    path,
                    ", ".join(sorted(dropped)),
                )

    @override
    def _parse_ckpt_path(self) -> None:
        """Complete the module's settings with those in the checkpoint; what the user gives has priority.

        Lightning's own gives priority to the checkpoint, and imports whatever class that names.
        """
        settings = self._settings()
        if not settings.get("ckpt_path") or not settings.get("model") or not Path(settings.ckpt_path).exists():
            return
        path = Path(settings.ckpt_path)
        try:
            class_path, saved = saved_settings(path)
        except CheckpointError as error:
            if settings.weights_only:
                raise
            log.warning("no settings of the module are taken from the checkpoint: %s", error)
            return
        model = settings.model
        kind = imported_class(path, model.class_path)
        if class_path not in (None, model.class_path) and imported_class(path, str(class_path)) is not kind:
            log.warning("%s is of the class %s; %s has only the settings of this run", path, class_path, kind.__name__)
            return
        given = self._given_settings()
        if not given.keys().isdisjoint(("pretrained", "config")):  # of which there may be only one
            saved = {name: value for name, value in saved.items() if name not in ("pretrained", "config")}
        own = model.init_args.as_dict()
        used = {name: own[name] for name in given if name in own}
        for line in differences(saved, used, "--model.init_args.") if not issubclass(kind, LitMoE) else ():
            log.warning("%s", line)  # LitMoE tells it itself, of any checkpoint
        taken = {name: value for name, value in saved.items() if name in own and name not in given}
        merged = {"class_path": model.class_path, "init_args": own | taken}
        with no_imports_by(path, taken):
            self.config = self.parser.parse_object({self.config.subcommand: {"model": merged}}, self.config)

    def _given_settings(self) -> dict[str, Any]:
        """Return the settings of the module that the user gives, in configs or on the command line."""
        parse: Callable[..., Any] = (
            self.parser.parse_object if isinstance(self._args, dict | Namespace) else self.parser.parse_args
        )
        given = parse(self._args, defaults=False).get(self.config.subcommand).get("model")
        found: dict[str, Any] = {} if given is None else (given.get("init_args") or Namespace()).as_dict()
        return found

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise ValueError(f"{str(error).partition('.')[0]}: give each a 'name' of its own") from error
        EndTogether.add_to(trainer)
        for logger in trainer.loggers:
            _keep_metrics(logger)
        strategy = trainer.strategy
        save_atomically(strategy)
        # names such as "last" become paths in the Trainer; it is a partial, because some launchers pickle it
        load = partial(_load_checked, strategy, strategy.load_checkpoint, bool(self._settings().get("weights_only")))
        strategy.load_checkpoint = load  # type: ignore[method-assign]
        return trainer

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set defaults: one device, seed 0, and results in ``runs``."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.devices": 1,
                "seed_everything": 0,
            }
        )


def _class_names(callbacks: Any) -> set[str]:
    """Return the names of the classes that a config gives for callbacks, one or a list, without their modules."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    paths = (given if isinstance(given, str) else (given or {}).get("class_path") for given in listed)
    return {str(path).rpartition(".")[2] for path in paths}


def _keep_metrics(logger: Logger) -> None:
    """Give a CSV logger a version that is free: Lightning's deletes the metrics of an earlier run of the same one."""
    if not isinstance(logger, CSVLogger) or not (Path(logger.log_dir) / ExperimentWriter.NAME_METRICS_FILE).exists():
        return
    given = logger.version
    versions = (f"{given if isinstance(given, str) else f'version_{given}'}-v{number}" for number in count(1))
    logger._version = next(name for name in versions if not (Path(logger.root_dir) / name).exists())
    log.info("the folder of version %s has metrics of an earlier run; this run has version %s", given, logger.version)


def _check_checkpoint(path: str | Path) -> None:
    """Refuse a local checkpoint that is not harmless; one on another host is checked when it is read."""
    try:
        if Path(path).exists():
            check_harmless(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --weights_only=false reads it all the same, if you trust it") from error


def _load_checked(
    strategy: Strategy,
    load: Callable[..., dict[str, Any]],
    only_data: bool,
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Call a strategy's ``load_checkpoint`` on an undamaged checkpoint; some strategies ignore ``weights_only``."""
    if only_data:
        _check_checkpoint(checkpoint_path)
    # the other checks what it reads
    if Path(checkpoint_path).exists() and not isinstance(strategy._checkpoint_io, AtomicCheckpointIO):
        check_undamaged(Path(checkpoint_path), getattr(strategy, "global_rank", 0))
    return load(checkpoint_path, weights_only=True if only_data else weights_only)


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
    known = [name for name in COMMANDS if name.split()[:1] == words[:1]]
    for name in known:
        count = len(name.split())
        if words[:count] == name.split():
            _run_command(name, words[count:])
            return None
    if known:
        raise SystemExit(f"lit-moeedit {words[0]}: expected {', '.join(f'lit-moeedit {name}' for name in known)}")
    others = (f"{name} ({(inspect.getdoc(function) or '').splitlines()[0]})" for name, function in COMMANDS.items())
    return EditingCLI(
        LitMoE,
        FactsDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=WholeConfigCallback,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lit-moeedit",
            "version": lit_moeedit.__version__,
            **{name: {"usage": f"lit-moeedit {name} [--config CONFIG] [OPTIONS]"} for name in EditingCLI.subcommands()},
            "epilog": f"Besides: {'; '.join(others)}. Each has its own --help.",
        },
        args=args,
    )


def _run_command(name: str, args: list[str]) -> None:
    """Run one of the functions; an error in its files or options ends the process without a traceback."""
    function = COMMANDS[name]
    # not auto_cli, which takes a --config for itself
    description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    parser = CommandParser(prog=f"lit-moeedit {name}", description=description)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    try:
        # jsonargparse spells a further element of a list --config+
        given = [re.sub(r"^--config(?=$|=)", "--config+", arg) for arg in with_recipe_paths(args)]
        function(**parser.parse_args(given).as_dict())
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        log.debug("", exc_info=error)
        raise SystemExit(printable(f"lit-moeedit {name}: {_meant(error)}", keep="\n")) from error


def _meant(error: BaseException) -> BaseException:
    """Return the error that a class of the config raised; jsonargparse wraps it into one about types."""
    while error.__cause__ is not None and str(error).startswith("Does not validate against any of"):
        error = error.__cause__
    return error


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
    try:
        run()
    except (OSError, ValueError, FloatingPointError, MisconfigurationException, ModuleNotFoundError) as error:
        log.debug("", exc_info=error)
        name = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
        hint = "(LIT_MOEEDIT_LOG=debug shows where it was raised)"
        raise SystemExit(printable(f"{f'lit-moeedit {name}'.strip()}: {_meant(error)}\n{hint}", keep="\n")) from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning has ended the run, with exit code 1
            raise SystemExit(INTERRUPTED) from None
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
