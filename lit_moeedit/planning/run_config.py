"""Configs of ``lit-moeedit fit``, read for a plan."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from transformers import PretrainedConfig
from typing_extensions import override

from lit_moeedit.arguments import RunParser
from lit_moeedit.callbacks import EditHold, EditReplay, KnowledgeEditing
from lit_moeedit.callbacks.limits import FitLimits
from lit_moeedit.callbacks.schedule import Schedule
from lit_moeedit.data.facts import read_facts
from lit_moeedit.editing import Editor, FineTuning
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.upkeep import Upkeep
from lit_moeedit.pretrained import build_config, pretrained_config
from lit_moeedit.run_arguments import EDIT, RunArguments
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy
from lit_moeedit.text import near_path


class _Parser(RunArguments):
    """A CLI that reads a config as ``fit`` does and makes no Trainer, whose devices are those of another machine."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for option in ("ckpt_path", "weights_only"):  # a saved config has those of 'fit', too
            parser.add_argument(f"--{option}")
        parser.set_defaults({"trainer.devices": 1})  # as for 'fit'

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            reason = parser.explained(str(error)) if isinstance(parser, RunParser) else str(error)
            raise ValueError(f"this is not a config of fit: {' '.join(reason.split())}") from error

    @override
    def instantiate_classes(self) -> None:
        return


@dataclass(frozen=True)
class Run:
    """A run, as its config describes it.

    Attributes:
        module: the module, without a model.
        model: config of the model.
        dtype: dtype of the model weights.
        sharding: sharding of the model.
        editor: the editor.
        rows: number of rows of a training batch, if the config has it.
        edits: number of facts to edit, if the config has it.
        texts: number of preservation texts, if the config has it.
        upkeep: what keeps the edits afterwards.
    """

    module: LitMoE
    model: PretrainedConfig
    dtype: torch.dtype
    sharding: Sharding
    editor: Editor
    rows: int | None
    edits: int | None
    texts: int | None
    upkeep: Upkeep


def read_run(paths: Sequence[Path], ranks: int | None = None, model: Path | None = None) -> Run:
    """Read a config.

    Args:
        paths: the config, and configs that overlay it.
        ranks: number of processes; by default that of the config.
        model: a transformers config, or a folder with one, in place of the config's model.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if ``fit`` would refuse the config, if it edits nothing, or if its strategy cannot be planned.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no config {path}{near_path(path)}")
    name = " with ".join(map(str, paths))
    with warnings.catch_warnings():
        # the arguments of the process are those of another command
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        cli = _Parser(
            save_config_callback=None,
            run=False,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
            args=[*(f"--config={path}" for path in paths), "--seed_everything=false"],
        )
    config = cli.config
    kind = resolve_name(config.model.class_path)
    if isinstance(kind, type) and not issubclass(kind, LitMoE):  # made, it might load its weights
        raise ValueError(f"a plan knows the training step of LitMoE, not of {kind.__name__}")
    callbacks, replays, holds = _callbacks(config)
    edit = config.get(EDIT)
    count = len(callbacks) + (edit is not None)
    if count != 1:
        raise ValueError(f"{name} has {count} callbacks with an editor ('edit' or KnowledgeEditing); a plan needs one")
    for kind, found in ((EditReplay, replays), (EditHold, holds)):
        if len(found) > 1:
            raise ValueError(f"{name} has {len(found)} {kind.__name__} callbacks; a plan knows one")
    settings = callbacks[0].init_args if edit is None else edit
    wanted = Namespace(model=config.model, trainer=Namespace(callbacks=callbacks + replays + holds))
    if edit is not None:
        wanted[EDIT] = edit
    if not isinstance(config.trainer.strategy, str):
        wanted.trainer.strategy = config.trainer.strategy
    try:
        made = cli.parser.instantiate(wanted)
        callback: Any = KnowledgeEditing(**made[EDIT]) if EDIT in made else made.trainer.callbacks[0]
        strategy = made.trainer.get("strategy") or _strategy(config.trainer.strategy)
    except (MisconfigurationException, ImportError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(made.model, LitMoE):
        raise ValueError(f"a plan knows the training step of LitMoE, not of {type(made.model).__name__}")
    if made.model.hparams["adapter"] is not None:
        raise ValueError(f"{name}: a plan knows training of all weights, not of an adapter alone")
    owners: int = made.model.hparams["expert_parallel_size"]
    if owners > 1:
        raise ValueError(
            f"{name}: a plan knows no expert parallelism, but model.expert_parallel_size is {owners}; set it to 1 in "
            "an overlay for a plan of FSDP2, which shards the same weights over the same ranks; what a rank holds and "
            "sends in a forward is in lit_moeedit.planning.ExpertParallelCost"
        )
    editor = callback.editor
    if isinstance(editor, FineTuning):
        raise ValueError(f"a plan knows the phases of Editor, not of {type(editor).__name__}")
    data = (config.get("data") or Namespace()).get("init_args", Namespace())
    corpus = (data.get("corpus") or Namespace()).get("init_args", Namespace())
    dtype = _dtype(made.model, str(config.trainer.precision or ""), strategy)
    sharding = _sharding(config.trainer, strategy, ranks, dtype.itemsize)
    replay = made.trainer.callbacks[len(callbacks)] if replays else None
    hold = made.trainer.callbacks[-1] if holds else None
    if sharding.stage == 3:
        _refuse_further_forward(name, replay, hold)
    steps = _steps_after_edit(callback.schedule, config.trainer, data, sharding.ranks)
    return Run(
        module=made.model,
        model=_model_config(made.model, model),
        dtype=dtype,
        sharding=sharding,
        editor=editor,
        rows=data.get("batch_size"),
        edits=_count_facts(settings) if settings.get("facts") else corpus.get("edits"),
        texts=None if settings.get("preservation") else data.get("preservation_samples"),
        upkeep=Upkeep(callback.renewal, callback.curve, replay, hold, steps),
    )


def _refuse_further_forward(name: str, replay: EditReplay | None, hold: EditHold | None) -> None:
    """Refuse what needs a second forward in each step, which DeepSpeed ZeRO stage 3 does not allow."""
    fails = "needs a second forward in each step, which fails under DeepSpeed ZeRO stage 3"
    if replay is not None and replay.weight is not None:
        raise ValueError(
            f"{name}: weight of EditReplay {fails}; leave weight out to add statements as rows of the batch"
        )
    if hold is not None:
        raise ValueError(f"{name}: EditHold {fails}; EditReplay without weight needs none")


def _steps_after_edit(schedule: Schedule, trainer: Namespace, data: Namespace, ranks: int) -> int | None:
    """Return the maximum number of optimizer steps after the first edit; ``None`` if the config does not tell."""
    samples, rows = data.get("samples_per_epoch"), data.get("batch_size")
    batches = ceil(samples / (rows * ranks)) if samples and rows else 0
    if isinstance(trainer.limit_train_batches, int):
        batches = min(batches, trainer.limit_train_batches)
    per_epoch = ceil(batches / trainer.accumulate_grad_batches)
    by_epochs = trainer.max_epochs * per_epoch if trainer.max_epochs not in (None, -1) and per_epoch else None
    by_steps = trainer.max_steps if trainer.max_steps != -1 else None
    ends = [end for end in (by_epochs, by_steps) if end is not None]
    return max(0, min(ends) - schedule.first_step(FitLimits(steps_per_epoch=per_epoch))) if ends else None


def _count_facts(settings: Namespace) -> int | None:
    """Count the facts of a file or a list; ``None`` for a file that is not here.

    Raises:
        FactError: if the file cannot be read.
    """
    facts, strict = settings.facts, settings.get("strict", True)
    if isinstance(facts, str):
        return len(read_facts(facts, columns=settings.get("columns"), strict=strict)) if Path(facts).is_file() else None
    return len(facts)


def _callbacks(config: Namespace) -> tuple[list[Namespace], ...]:
    """Return the trainer's callbacks that have an editor, those that state edited facts, and those that hold them."""
    callbacks = config.trainer.callbacks or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    editing = [callback for callback in callbacks if "editor" in (callback.get("init_args") or ())]
    kinds = [resolve_name(callback.class_path) for callback in callbacks]
    keeping = (
        [own for own, kind in zip(callbacks, kinds, strict=True) if isinstance(kind, type) and issubclass(kind, wanted)]
        for wanted in (EditReplay, EditHold)
    )
    return editing, *keeping


def _strategy(name: str) -> Any:
    """Make the Trainer's strategy of a name; ``None`` for one that it chooses by the devices."""
    if name == "auto":
        return None
    if name not in StrategyRegistry:
        raise ValueError(f"there is no strategy {name!r}")
    return StrategyRegistry.get(name)


def _dtype(module: LitMoE, precision: str, strategy: Any) -> torch.dtype:
    """Return the dtype of the model weights, which is half precision for DeepSpeed's mixed precision, too."""
    bits, _, kind = precision.partition("-")
    half = {"bf16": torch.bfloat16, "16": torch.float16}
    if bits in half and (kind == "true" or isinstance(strategy, DeepSpeedStrategy)):
        return half[bits]
    dtype: torch.dtype = getattr(torch, module.hparams["dtype"])
    return dtype


def _sharding(trainer: Namespace, strategy: Any, ranks: int | None, itemsize: int) -> Sharding:
    if ranks is None:
        try:
            ranks = int(trainer.devices) * int(trainer.num_nodes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the config has {trainer.devices!r} as number of devices: give --ranks") from error
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    on_cpu = trainer.accelerator == "cpu" or isinstance(strategy, DeepSpeedCPUStrategy)
    if strategy is None or type(strategy) in (DDPStrategy, SingleDeviceStrategy):
        return Sharding(ranks, None, itemsize, on_cpu=on_cpu)
    if isinstance(strategy, ModelParallelStrategy):
        _refuse_tensor_parallelism(strategy)
        return Sharding(ranks, None, itemsize, on_cpu=on_cpu, fsdp2=True)
    if not isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{type(strategy).__name__} cannot be planned: a plan knows one process, DDP, DeepSpeed, and FSDP2 "
            "(ModelParallelStrategy)"
        )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings: Any = strategy.config
    zero = DeepSpeedZeroConfig(**settings.get("zero_optimization", {}))
    if zero.offload_optimizer is not None or zero.offload_param is not None:
        raise ValueError("a plan does not know offloading, which depends on the machine's main memory")
    return Sharding(
        ranks=ranks,
        stage=int(zero.stage),
        itemsize=itemsize,
        sub_group=int(zero.sub_group_size),
        bucket=int(zero.reduce_bucket_size),
        overlap=bool(zero.overlap_comm),
        on_cpu=on_cpu,
    )


def _refuse_tensor_parallelism(strategy: ModelParallelStrategy) -> None:
    found = strategy._tensor_parallel_size
    if found != 1:
        raise ValueError(
            f"ModelParallelStrategy with tensor_parallel_size {found!r} cannot be planned, nor a model edited under "
            "it; set it to 1, and data_parallel_size to the number of processes"
        )


def _model_config(module: LitMoE, path: Path | None) -> PretrainedConfig:
    if path is None and module.hparams["config"] is not None:
        return build_config(module.hparams["config"])
    name = module.hparams["pretrained"] if path is None else path
    try:
        return pretrained_config(name, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"{name} is not a local folder with a config.json, and none is in the cache of the hub; a plan asks no "
            "server: download the model's config.json (`hf download MODEL config.json`) or give --model with one"
        ) from error
