"""What callbacks look for in the run they are part of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import PreTrainedTokenizerBase

from lit_moeedit.models.experts import UnsupportedModelError, expert_layers, find_model
from lit_moeedit.pretrained import blamed_on, check_vocabulary, pretrained_tokenizer
from lit_moeedit.sharding.ranks import Ranks


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """All callbacks of the trainer."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def ranks_of(trainer: L.Trainer) -> Ranks:
    """The processes as the callback that edits has them, if there is one; else made anew, by all of them together.

    A rank that fails meets the others where they agree next, so all callbacks must agree in the same place.
    """
    found = (getattr(callback, "ranks", None) for callback in callbacks_of(trainer))
    return next((ranks for ranks in found if isinstance(ranks, Ranks)), None) or Ranks()


def on_first_rank(trainer: L.Trainer, work: Callable[[], object]) -> None:
    """Do something on the first rank; where it fails, it fails on all ranks. Each calls this.

    Raises:
        Exception: what was raised on the first rank, there.
        OSError: with its message, on the others.
    """
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            work()
        except Exception as caught:  # whatever it is, the others wait
            error = caught
    message = trainer.strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if message is not None:
        raise OSError(f"the first rank failed: {message}")


def from_datamodule(trainer: L.Trainer, name: str, *args: Any) -> Any:
    """The result of the data module's method ``name``; ``None`` without such a method or data module."""
    method = getattr(getattr(trainer, "datamodule", None), name, None)
    return method(*args) if callable(method) else None


def read_documents(path: str) -> list[str]:
    """The lines of a text file, without empty ones.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not UTF-8.
    """
    with blamed_on(f"the preservation text {path} cannot be read as UTF-8"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def find_tokenizer(
    trainer: L.Trainer, pl_module: L.LightningModule, source: str | None, wanted_by: str
) -> PreTrainedTokenizerBase:
    """The tokenizer at ``source`` (a path or hub id), or else the one of the module or the data module.

    Raises:
        MisconfigurationException: if there is none; the message names ``wanted_by``.
        OSError: if there is nothing at ``source``.
        ValueError: if it cannot be used, or has tokens that the model does not embed.
    """
    found = None if source is None else pretrained_tokenizer(source)
    for owner in (pl_module, getattr(trainer, "datamodule", None)):
        found = found if found is not None else getattr(owner, "tokenizer", None)
    if found is None:
        raise MisconfigurationException(
            f"{wanted_by} needs the model's tokenizer: give 'tokenizer' (a path), or an attribute 'tokenizer' of "
            f"{type(pl_module).__name__} or of the data module"
        )
    check_vocabulary(found, find_model(pl_module))
    return found


def keep_experts_together(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Have DeepSpeed see the experts of a layer as one module, whatever is called inside of it.

    Under ZeRO stage 3 DeepSpeed notes in which order modules are called, and fails if ranks differ in that. They do
    where experts call their activation one by one, for as many experts as got a token. What is one module to it (a
    "leaf module") has no order inside; for some families DeepSpeed has that by itself. This is for modules that exist
    before the Trainer sets its strategy up; one that is made in ``configure_model`` can do the same there.
    """
    if not (isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.strategy.zero_stage_3):
        return
    try:
        layers = expert_layers(find_model(pl_module))
    except UnsupportedModelError:
        return  # not there yet; what cannot be edited is said when the run starts
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers.values():
        set_z3_leaf_module(layer.experts, True)
