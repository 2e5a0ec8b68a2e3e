"""Sizes from a config of ``lit-moeedit fit``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from transformers import AutoConfig, PretrainedConfig
from typing_extensions import override

from lit_moeedit.data import FactsDataModule
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.sizes import EditSize, TrainingSize
from lit_moeedit.sharding.rehearsal import Sharding


class _Parser(LightningCLI):
    """Reads a config as ``fit`` does, and makes nothing of it: the trainer's devices are those of another machine."""

    @override
    def instantiate_classes(self) -> None:
        return


@dataclass(frozen=True)
class Run:
    """What a config says of a run: its model, how that is sharded, trained, and edited by which settings."""

    model: PretrainedConfig
    pretrained: bool
    dtype: torch.dtype
    sharding: Sharding
    training: TrainingSize
    editor: Mapping[str, Any]


def read_run(path: Path, ranks: int | None, model: Path | None, train_tokens: int, counted_tokens: int) -> Run:
    """Read a config.

    Args:
        path: the config.
        ranks: number of processes, if not as many as the config says.
        model: a transformers config, or a folder with one, in place of the config's model.
        train_tokens: length of a row of a batch.
        counted_tokens: tokens of a row that the loss counts.

    Raises:
        FileNotFoundError: if there is no such config.
        ValueError: if the config has no editor or more than one, or names a model or strategy that cannot be planned.
        SystemExit: if ``fit`` would refuse the config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}")
    with warnings.catch_warnings():
        # the arguments of the process are those of another command
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        parsed = _Parser(
            LitMoE,
            FactsDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            run=False,
            seed_everything_default=False,
            args=[f"--config={path}", "--seed_everything=false"],
        )
    config = parsed.parser.dump(parsed.config, format="json", skip_validation=True)
    keys = json.loads(config)
    trainer, module, data = keys["trainer"], keys["model"]["init_args"], (keys.get("data") or {}).get("init_args", {})
    callbacks = trainer.get("callbacks") or []
    editors = [
        callback["init_args"]["editor"]["init_args"]
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if "editor" in callback.get("init_args", {})
    ]
    if len(editors) != 1:
        raise ValueError(f"{path} has {len(editors)} callbacks with an editor; a plan needs exactly one")
    dtype = _dtype(module["dtype"], str(trainer.get("precision") or "32-true"), trainer["strategy"])
    rows = data.get("batch_size", 1)
    return Run(
        model=_model_config(module, model),
        pretrained=module.get("config") is None,
        dtype=dtype,
        sharding=_sharding(trainer, ranks, dtype.itemsize),
        training=TrainingSize(rows, train_tokens, rows * counted_tokens, bool(module.get("router_loss", 0))),
        editor=editors[0],
    )


def edit_size(
    editor: Mapping[str, Any],
    edits: int,
    prompt_tokens: int,
    target_tokens: int,
    texts: int,
    text_tokens: int,
) -> EditSize:
    """The size of an edit by an editor's settings.

    Args:
        editor: arguments of an :class:`~lit_moeedit.editing.Editor`, as a config has them.
        edits: number of facts.
        prompt_tokens: length of a prompt with its context, at most.
        target_tokens: length of a target, at most.
        texts: preservation texts.
        text_tokens: length of each.

    Raises:
        ValueError: if a number is less than 1.
    """
    given = {"edits": edits, "prompt_tokens": prompt_tokens, "target_tokens": target_tokens}
    for name, value in (given | {"texts": texts, "text_tokens": text_tokens}).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    targets = (editor.get("targets") or {}).get("init_args", {})
    solver = editor.get("solver") or {"class_path": "Woodbury"}
    iterative = solver["class_path"].endswith("BlockCoordinateDescent")
    return EditSize(
        edits=edits,
        contexts=len(editor["contexts"]),
        neutral=bool(editor["neutral"]),
        prompt_tokens=prompt_tokens,
        target_tokens=target_tokens,
        layers=tuple(sorted(editor["layers"])),
        preserve=editor["preserve"] != "none",
        texts=texts,
        text_tokens=text_tokens,
        token_budget=editor["token_budget"],
        target_budget=targets.get("token_budget", 16384),
        steps=targets.get("steps", 25),
        passes=solver.get("init_args", {}).get("passes", 4) if iterative else 0,
        reset_moments=editor["reset_moments"],
    )


def _dtype(named: str, precision: str, strategy: Any) -> torch.dtype:
    """What the weights are in; DeepSpeed makes half-precision weights for mixed precision, too."""
    if precision.endswith("-true") or (precision.endswith("-mixed") and "deepspeed" in _strategy(strategy)[0]):
        bits = precision.partition("-")[0]
        half = {"bf16": torch.bfloat16, "16": torch.float16}
        return half.get(bits, getattr(torch, named))
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def _strategy(strategy: Any) -> tuple[str, dict[str, Any]]:
    """Name of a strategy and its arguments."""
    if isinstance(strategy, str):
        if strategy not in StrategyRegistry:
            return strategy, {}
        entry = StrategyRegistry[strategy]
        kind = "deepspeed" if issubclass(entry["strategy"], DeepSpeedStrategy) else strategy
        kind += "_cpu" if "cpu" in strategy else ""
        return kind, entry["init_params"]
    name = strategy["class_path"].rpartition(".")[2].lower()
    return name.replace("deepspeedcpu", "deepspeed_cpu"), strategy.get("init_args", {})


def _sharding(trainer: Mapping[str, Any], ranks: int | None, itemsize: int) -> Sharding:
    if ranks is None:
        try:
            ranks = int(trainer["devices"]) * int(trainer.get("num_nodes") or 1)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the config says {trainer['devices']!r} for the number of devices: give --ranks"
            ) from error
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    name, settings = _strategy(trainer["strategy"])
    on_cpu = trainer["accelerator"] == "cpu" or "cpu" in name
    if "deepspeed" not in name:
        if "fsdp" in name:
            raise ValueError(f"the strategy {name!r} cannot be planned, because it cannot be edited")
        return Sharding(ranks, None, itemsize, on_cpu=on_cpu)
    given = settings.get("config")
    if isinstance(given, str):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    zero = settings if given is None else given.get("zero_optimization", {"stage": 0})
    offloads = ("offload_optimizer", "offload_parameters", "offload_param")
    if any(settings.get(key) or zero.get(key) for key in offloads):
        raise ValueError("a plan does not know offloading: what it puts to main memory depends on the machine")
    small = 10_000_000 if "cpu" in name else 200_000_000  # the strategies' own defaults
    return Sharding(
        ranks=ranks,
        stage=zero.get("stage", 2),
        itemsize=itemsize,
        sub_group=zero.get("sub_group_size", 10**12 if given is None else 10**9),
        bucket=zero.get("reduce_bucket_size", small if given is None else 500_000_000),
        overlap=zero.get("overlap_comm", "cpu" not in name),
        on_cpu=on_cpu,
    )


def _model_config(module: Mapping[str, Any], path: Path | None) -> PretrainedConfig:
    if path is not None:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    if module.get("config") is not None:
        keys = dict(module["config"])
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    name = module["pretrained"]
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except OSError as error:
        raise ValueError(
            f"{name!r} is no local folder, and its config.json is not in the cache of the hub; a plan asks no server: "
            f"run `hf download {name} config.json` first, or give --model with a config.json"
        ) from error
