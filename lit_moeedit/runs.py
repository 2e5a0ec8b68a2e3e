"""Runs of the command line: LightningCLI for runs that edit, whose checkpoints are data and whose files stay."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from typing_extensions import override

from lit_moeedit.arguments import cause
from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.callbacks.ending import EndTogether
from lit_moeedit.callbacks.resources import check_files, on_first_rank, read_texts
from lit_moeedit.callbacks.run_folder import run_folder, set_aside
from lit_moeedit.checkpoint_fields import CheckpointError, differences
from lit_moeedit.checkpoints.atomic import AtomicCheckpointIO, save_atomically
from lit_moeedit.checkpoints.distributed_folder import is_distributed
from lit_moeedit.checkpoints.read import check_harmless, check_undamaged
from lit_moeedit.checkpoints.settings import imported_class, no_imports_by, saved_settings
from lit_moeedit.class_errors import explain_raised
from lit_moeedit.commands import Commands
from lit_moeedit.module import LitMoE
from lit_moeedit.run_arguments import EDIT, RunArguments
from lit_moeedit.text import nearest

log = logging.getLogger(__name__)

_MAX_PATH = 4096  # characters; longer strings are texts
_SUMMARIES = {
    "fit": "Train a model, and edit facts in it on the way.",
    "validate": "Evaluate a model on the validation data; 'at: validation' edits it first.",
    "test": "Evaluate a model on the test data; 'at: validation' edits it first.",
    "predict": "Run a model on data.",
}


class WholeConfigCallback(SaveConfigCallback):
    """A callback that saves the config atomically in the run's own folder; that of an earlier run is renamed.

    Loggers get it, too, with the SHA-256 digests of the files with facts and texts that it names: as the config of a
    run of W&B, the hyperparameters of TensorBoard, the parameters of MLflow.
    """

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

    @override
    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        digests = {name: file_digests(config.get(name)) for name in (EDIT, "data")}
        digests["trainer"] = file_digests((config.get("trainer") or {}).get("callbacks"))
        files = {path: digest for found in digests.values() for path, digest in found.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams({**config, "files": files})

    def _save(self, folder: Path) -> None:
        with atomic_file(folder / self.config_filename) as beside:
            self.parser.save(self.config, beside, skip_unset=False, overwrite=True, multifile=self.multifile)
            set_aside(folder / self.config_filename, beside)


class EditingCLI(RunArguments):
    """``fit``, ``validate``, ``test`` and ``predict`` for any module and data module, ours by default.

    A checkpoint is read as data: one whose reading could run code is refused, unless ``--weights_only=false`` says that
    it can be trusted.

    Args:
        args: arguments of ``LightningCLI``.
        commands: further commands that are listed among its own.
        kwargs: likewise.
    """

    @override
    def __init__(self, *args: Any, commands: Commands | None = None, **kwargs: Any) -> None:
        self._commands = commands
        given = kwargs.get("args")
        words = sys.argv[1:] if given is None else given
        # the subcommand, where it is plain which one it is; otherwise all have their parsers
        self._wanted = words[0] if isinstance(words, list) and words and words[0] in self.subcommands() else None
        try:
            super().__init__(*args, **kwargs)
        except (OSError, ValueError) as error:
            raised, settings = cause(error), self.settings
            plain = settings.as_dict() if isinstance(settings, Namespace) else {}
            text = explain_raised(raised, plain, getattr(self.parser, "given", []), {EDIT: KnowledgeEditing})
            if not text:
                raise
            raise (FileNotFoundError if isinstance(raised, FileNotFoundError) else ValueError)(text) from error

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        subcommands: Any = parser._subcommands_action
        for name, summary in _SUMMARIES.items():
            subcommands.choices[name].description = summary
            next(action for action in subcommands._choices_actions if action.dest == name).help = summary
        if self._commands is not None:
            self._commands.add_to(subcommands)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._wanted in (None, subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # another command is run: a quarter of a second is saved, and this one is only named
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self._args = args
        super().parse_arguments(parser, args)
        settings = self.settings
        self._warn_dropped_callbacks()
        if "ckpt_path" not in settings or settings.get("weights_only") is False:
            return
        # Lightning's own default would run what is in a checkpoint of another host
        settings.weights_only = True
        if settings.ckpt_path:
            _check_checkpoint(settings.ckpt_path)

    def _warn_dropped_callbacks(self) -> None:
        """Name the callbacks of one config that are lost because a later one, or an option, gives another list."""
        settings, config = self.settings, self.config
        left = _class_names((settings.get("trainer") or {}).get("callbacks"))
        for path in {
            str(path): path for path in (*(config.get("config") or ()), *(settings.get("config") or ()))
        }.values():
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
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
        settings = self.settings
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
    def instantiate_classes(self) -> None:
        if self.subcommand != "predict":
            trainer = self.settings.get("trainer") or {}
            for edit in (self.settings.get(EDIT), *_edits_among(trainer.get("callbacks"))):
                check_files(edit or {})  # before the model, which takes longer
        super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self._add_edit()
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:
            if "invalid strategy name" not in str(error):
                raise
            name, known = str(self.settings.trainer.strategy), sorted(StrategyRegistry.available_strategies())
            meant = nearest(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"trainer.strategy: there is no strategy {name!r}{meant}") from error
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
        load = partial(_load_checked, strategy, strategy.load_checkpoint, bool(self.settings.get("weights_only")))
        strategy.load_checkpoint = load  # type: ignore[method-assign]
        return trainer

    def _add_edit(self) -> None:
        """Give the trainer what ``edit`` stands for: the callback, and a monitor and a report if it has none.

        Raises:
            ValueError: if the trainer has a callback of the same name.
        """
        edit = self._get(self.config_init, EDIT)
        if edit is None:
            return
        trainer = self._get(self.config_init, "trainer")
        given = trainer.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        editing = KnowledgeEditing(**edit)
        if any(isinstance(other, KnowledgeEditing) and other.name == editing.name for other in given):
            raise ValueError(
                "'edit' and trainer.callbacks both have a KnowledgeEditing: move its settings to 'edit', or give one "
                "of them a 'name' of its own (--edit.name)"
            )
        monitors = [] if any(isinstance(other, RoutingMonitor) for other in given) else self._monitors(edit)
        reports = [] if any(isinstance(other, EditReport) for other in given) else [EditReport()]
        trainer["callbacks"] = [editing, *monitors, *given, *reports]

    def _monitors(self, edit: Namespace) -> list[RoutingMonitor]:
        """Make a monitor of the data module's texts, or of those of the edit; none if there are no texts."""
        if any(hasattr(self.datamodule, name) for name in ("probe_texts", "preservation_texts")):
            return [RoutingMonitor()]
        if edit.get("preservation"):
            return [RoutingMonitor(probe=read_texts(edit.preservation))]
        log.info("routing is not measured, because neither the data module nor edit.preservation has texts")
        return []

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set defaults: one device, seed 0, and results in ``runs``."""
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs",
                "trainer.devices": 1,
                "seed_everything": 0,
            }
        )


def file_digests(settings: Any) -> dict[str, str]:
    """Compute the SHA-256 digests of the files that settings name, by their paths; folders are left out."""
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ()
    found = {path: digest for value in inner for path, digest in file_digests(value).items()}
    if isinstance(settings, str) and len(settings) < _MAX_PATH and "\0" not in settings and Path(settings).is_file():
        with Path(settings).open("rb") as file:
            found[settings] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _class_names(callbacks: Any) -> set[str]:
    """Return the names of the classes that a config gives for callbacks, one or a list, without their modules."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    paths = (given if isinstance(given, str) else (given or {}).get("class_path") for given in listed)
    return {str(path).rpartition(".")[2] for path in paths}


def _edits_among(callbacks: Any) -> list[Any]:
    """Return the settings of each ``KnowledgeEditing`` that a config gives among callbacks."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    paths = {f"{KnowledgeEditing.__module__}.{KnowledgeEditing.__name__}", "lit_moeedit.callbacks.KnowledgeEditing"}
    return [given.get("init_args") for given in listed if given.get("class_path") in paths]


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
    if is_distributed(Path(checkpoint_path)) and not isinstance(strategy, ModelParallelStrategy):
        raise CheckpointError(
            f"{checkpoint_path} is a checkpoint of FSDP2, which needs trainer.strategy: ModelParallelStrategy, got "
            f"{type(strategy).__name__}; in one process give it data_parallel_size and tensor_parallel_size of 1"
        )
    if only_data:
        _check_checkpoint(checkpoint_path)
    # the other checks what it reads
    if Path(checkpoint_path).exists() and not isinstance(strategy._checkpoint_io, AtomicCheckpointIO):
        check_undamaged(Path(checkpoint_path), getattr(strategy, "global_rank", 0))
    return load(checkpoint_path, weights_only=True if only_data else weights_only)
