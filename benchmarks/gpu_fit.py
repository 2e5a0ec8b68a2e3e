"""Runs of `fit` on one card, edited in the middle, saved and resumed: a process of its own of `benchmarks.gpu`.

DeepSpeed leaves a process group and memory behind, and a run that hangs can be ended only from outside.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from benchmarks import gpu_models
from benchmarks.gpu_checks import check
from benchmarks.training import quiet
from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.data import FactsDataModule
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding.cpu_strategy import DeepSpeedCPUStrategy

ONE = "one device"
STRATEGIES = {ONE: 0, "ZeRO 1": 1, "ZeRO 2": 2, "ZeRO 3": 3}
"""Stages of DeepSpeed by name."""
LAYERS, RESUMED_LAYERS, LEAST_LAYERS = 6, 2, 2
"""Layers of the run that is measured, and of those that are saved and resumed; an edit needs a layer above its own."""
EDITS, EPOCHS = 8, 3
VOCABULARY = 32_768
"""Smaller than the published one, whose embeddings would take the room of a layer."""
BYTES = {True: 22, False: 10}
"""For each parameter while it is trained, with DeepSpeed (bfloat16 weights and gradients, float32 masters, gradients
and moments) and without (all of it bfloat16), and what is used for some moments besides."""
SAVED = {True: 14, False: 6}
"""The same for a checkpoint."""
BASE = 4e9
"""Bytes of a card for activations, second moments and the card's own libraries."""
RESUME_BOUND = 1e-3
"""Largest distance of all weights of a resumed run from those of the uninterrupted one, relative to their size, where
a card's sums are not made in the same order twice."""


class _AtTheEnd(L.Callback):
    """Takes what is wanted of a run before its strategy is torn down."""

    def __init__(self, weights: bool) -> None:
        self.wanted, self.weights, self.peak = weights, dict[str, Tensor](), 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(pl_module.device)
        if not self.wanted:
            return
        parameters = dict(pl_module.named_parameters())
        sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
        gathered: Any = nullcontext()
        if sharded:
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(sharded)
        with gathered:
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


class _CountingEditor(Editor):
    """Counts its edits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = 0

    def edit(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return super().edit(*args, **kwargs)


def trainer_of(stage: int, device: torch.device, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """A trainer of one process."""
    strategy: Any = "auto"
    if stage and device.type == "cuda":
        # Lightning's default copies all gradients of a rank to float32 at once
        strategy = DeepSpeedStrategy(stage=stage, sub_group_size=100_000_000)
    elif stage:
        strategy = DeepSpeedCPUStrategy(stage=stage)
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        strategy=strategy,
        # the masters of DeepSpeed are float32; one device has room for six layers only if all is bfloat16
        precision="bf16-mixed" if stage else "bf16-true",
        max_epochs=EPOCHS,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        num_sanity_val_steps=0,
    )


def fit(
    stage: int,
    device: torch.device,
    config: dict[str, Any],
    folder: Path,
    save: Path | None = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Train for some epochs and edit before the second.

    Args:
        stage: of DeepSpeed, 0 to do without it.
        device: where.
        config: of the model.
        folder: of the summary.
        save: a folder for a checkpoint of the end of the second epoch.
        resume: a checkpoint to go on from.
    """
    L.seed_everything(0, verbose=False)
    layers = tuple(range(max(1, config["num_hidden_layers"] // 2)))
    editor = _CountingEditor(layers, targets=TargetOptimizer(steps=10, learning_rate=0.1))
    editing = KnowledgeEditing(editor, at={"epoch": 1}, on_failure="keep")
    end = _AtTheEnd(weights=save is not None or resume is not None)
    callbacks: list[L.Callback] = [editing, RoutingMonitor(max_texts=16), EditReport(console=False), end]
    if save is not None:
        callbacks.append(
            ModelCheckpoint(save, filename="kept", every_n_epochs=EPOCHS - 1, save_on_train_epoch_end=True)
        )
    trainer = trainer_of(stage, device, folder, callbacks)
    module = LitMoE(config=config, dtype="bfloat16", learning_rate=1e-5)
    data = FactsDataModule(
        gpu_models.small_corpus(EDITS),
        vocab_size=gpu_models.VOCABULARY,
        batch_size=16,
        samples_per_epoch=32,
        preservation_samples=128,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    seconds = time.perf_counter() - start
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = {
        "seconds": seconds,
        "edit": summary["seconds"],
        # an edit resets the card's own peak
        "peak": max([end.peak, *summary["memory"].values()]),
        "edits made": editor.count,
        "weights": end.weights,
        "sound": sound(summary),
    }
    # cycles of the trainer would keep the model on the card
    del trainer, module, data, callbacks, editing, end
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def sound(summary: dict[str, Any]) -> bool:
    """Check that a summary holds the edit, and numbers of all that was measured around it."""
    numbers = [*summary["perplexity"].values(), summary["routing"]["similarity"], summary["after"]["efficacy"]]
    finite = all(number is not None and math.isfinite(number) for number in numbers)
    return summary["edits"] == EDITS and finite and summary["after_training"] is not None


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of all weights, relative to their size."""
    difference = sum(float((first[name].float() - second[name].float()).square().sum()) for name in first)
    return (difference / sum(float(value.float().square().sum()) for value in first.values())) ** 0.5


def measure(
    name: str, device: torch.device, config: dict[str, Any], parent: Path, record: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """The run that is measured, which is also recorded at once, and one that is saved and resumed."""
    stage = STRATEGIES[name]
    missing = [package for package in ("deepspeed", "accelerate") if importlib.util.find_spec(package) is None]
    if stage and missing:
        raise gpu_models.LeftOutError(f"{' and '.join(missing)} not installed")
    room = gpu_models.free_memory(device) - BASE
    wanted = min(LAYERS, config["num_hidden_layers"])
    layers = wanted
    if device.type == "cuda":
        layers = gpu_models.layers_that_fit(config, wanted, room, BYTES[stage > 0])
    if layers < LEAST_LAYERS:
        raise gpu_models.LeftOutError(f"{layers} layers have room on this card; an edit needs {LEAST_LAYERS}")
    # within the folder of the parent, which removes it if this process is killed
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary)
        config = {**config, "num_hidden_layers": layers}
        # what is saved is small: writing and reading it takes longer than the runs
        small = {**config, "num_hidden_layers": RESUMED_LAYERS}
        run = fit(stage, device, config, folder / "measured", save=folder / "kept" if config == small else None)
        found = {name: run[name] for name in ("seconds", "edit", "peak")}
        found |= {"layers": layers, "layers left out": wanted - layers}
        found["checks"] = [
            check("edits made", run["edits made"], passed=run["edits made"] == 1),
            check("facts in a summary without gaps", EDITS, passed=run["sound"]),
        ]
        needed = gpu_models.parameters_of(config, RESUMED_LAYERS) * SAVED[stage > 0]
        free = shutil.disk_usage(folder).free
        if needed > 0.8 * free:
            found["resume left out"] = f"a checkpoint has {needed / 1e9:.0f} GB, {folder.parent} {free / 1e9:.0f} free"
            return found
        record(found | {"unfinished": True})
        whole = run if config == small else fit(stage, device, small, folder / "whole", save=folder / "kept")
        again = fit(stage, device, small, folder / "again", resume=folder / "kept/kept.ckpt")
    away = distance(whole["weights"], again["weights"])
    same = all(torch.equal(weight, again["weights"][name]) for name, weight in whole["weights"].items())
    found["resume"] = {
        "layers": RESUMED_LAYERS,
        "seconds": [whole["seconds"], again["seconds"]],
        "bit for bit": same,
    }
    found["checks"] += [
        check("distance of a resumed run's weights from the uninterrupted one's", away, RESUME_BOUND),
        check("edits made again by the resumed run", again["edits made"], 0),
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder for a file of each strategy")
    arguments = parser.parse_args()
    quiet()
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    config = gpu_models.case_of(gpu_models.QWEN3, arguments.tiny).config
    config = {**config, "vocab_size": min(VOCABULARY, config["vocab_size"])}
    if arguments.tiny:
        config["num_hidden_layers"] = RESUMED_LAYERS
    for name in arguments.strategies:
        file = arguments.output / f"{name}.json"

        def record(found: dict[str, Any], file: Path = file) -> None:
            file.write_text(json.dumps(found), encoding="utf-8")

        try:
            record(measure(name, torch.device(arguments.device), config, arguments.output, record))
        except gpu_models.LeftOutError as error:
            record({"left out": str(error)})
        except Exception as error:  # the other strategies are run all the same
            sys.stderr.write(traceback.format_exc())
            record({"failed": traceback.format_exception_only(error)[-1].strip()})


if __name__ == "__main__":
    main()
