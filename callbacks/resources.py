"""Resources of a run that callbacks need: processes, tokenizer, facts and texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedTokenizerBase

from lit_moeedit.data.facts import CheckedFacts, Fact, check_facts_file, read_facts, validate_facts
from lit_moeedit.editing import EditMethod
from lit_moeedit.models.experts import (
    ExpertLayer,
    UnsupportedModelError,
    expert_layers,
    find_model,
)
from lit_moeedit.pretrained import check_vocabulary, pretrained_tokenizer, read_lines
from lit_moeedit.sharding.backends import locate, refuse_parallelism
from lit_moeedit.sharding.finite import check_finite
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError


def on_first_rank(trainer: L.Trainer, work: Callable[[], object]) -> None:
    """Do something on the first rank. If it fails there, it fails on all ranks; each of them calls this.

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
    """Call the data module's method ``name``; ``None`` without such a method or data module."""
    method = getattr(getattr(trainer, "datamodule", None), name, None)
    return method(*args) if callable(method) else None


def find_facts(
    trainer: L.Trainer,
    source: str | Path | Sequence[Fact | Mapping[str, Any]] | None,
    tokenizer: PreTrainedTokenizerBase,
    strict: bool,
    columns: Mapping[str, str | Sequence[str]] | None = None,
) -> CheckedFacts:
    """Read and check facts: of a file, of a list, or (``None``) of the data module's ``edit_facts()``.

    A file or a list of objects may have other names for its fields (``columns``).

    Raises:
        MisconfigurationException: if there are none.
        FactError: if a fact cannot be edited.
        OSError: if a file cannot be opened.
    """
    if isinstance(source, str | Path) or (source and columns):
        return read_facts(source, columns=columns, strict=strict, tokenizer=tokenizer)
    found = from_datamodule(trainer, "edit_facts") if source is None else source
    if not found:
        raise MisconfigurationException(
            "KnowledgeEditing has no facts to edit: give 'facts' (a file), or a data module with edit_facts()"
        )
    return validate_facts(found, tokenizer=tokenizer, strict=strict)


def find_texts(trainer: L.Trainer, source: str | list[str] | None) -> list[str]:
    """Find preservation texts: the lines of a file, a list, or (``None``) the data module's ``preservation_texts()``.

    Raises:
        MisconfigurationException: if there are none.
        OSError: if a file cannot be opened.
        ValueError: if a file is not UTF-8.
    """
    texts = read_texts(from_datamodule(trainer, "preservation_texts") or () if source is None else source)
    if not texts:
        raise MisconfigurationException(
            "KnowledgeEditing: the editor needs text whose behaviour is to be kept; give 'preservation' (a text file "
            "with a document per line) or a data module with preservation_texts() that are not empty, or an editor "
            "with preserve: none"
        )
    return texts


def read_texts(source: str | Sequence[str]) -> list[str]:
    """Return the lines of a text file, or the texts of a list.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is not UTF-8.
    """
    if not isinstance(source, str):
        return list(source)
    return read_lines(source, "preservation text")


def check_files(settings: Mapping[str, Any]) -> None:
    """Check the files that an edit reads, before the model is there: that they exist and that their rows can be used.

    Args:
        settings: settings of :class:`~lit_moeedit.callbacks.KnowledgeEditing`.

    Raises:
        FactError: if a facts file cannot be used.
        OSError: if a file cannot be opened.
        ValueError: if the text is not UTF-8.
    """
    facts, preservation = settings.get("facts"), settings.get("preservation")
    if isinstance(facts, str):
        check_facts_file(facts, settings.get("columns"), settings.get("strict", True))
    if isinstance(preservation, str):
        read_texts(preservation)


def find_tokenizer(
    trainer: L.Trainer, pl_module: L.LightningModule, source: str | None, wanted_by: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer at ``source`` (a path or hub id), or take the one of the module or the data module.

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


def check_parallelism(trainer: L.Trainer, pl_module: L.LightningModule, wanted_by: str) -> None:
    """Check that a backend holds the model as it is sharded; called before anything runs or reads the model.

    Raises:
        MisconfigurationException: naming what was found; the message names ``wanted_by``.
    """
    try:
        refuse_parallelism(pl_module, trainer.strategy)
    except UnsupportedShardingError as error:
        raise MisconfigurationException(f"{wanted_by}: {error}") from error
    # Lightning evaluates in inference mode, unless the backend is gloo; FSDP2 would keep buffers of that mode
    evaluates = trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)
    if evaluates and isinstance(trainer.strategy, ModelParallelStrategy) and dist.get_backend() != "gloo":
        loop = trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.test_loop
        if loop.inference_mode:
            raise MisconfigurationException(
                f"{wanted_by}: under FSDP2 no forward outside of inference mode can follow one in it; "
                "give the Trainer inference_mode=False"
            )


def check_structure(
    trainer: L.Trainer, pl_module: L.LightningModule, editors: Sequence[EditMethod]
) -> list[list[ExpertLayer]]:
    """Check everything about the layers that needs no forward; return the layers that each of the editors edits.

    Raises:
        MisconfigurationException: if a layer cannot be edited, its weights are sharded in a way that is unsupported, or
            a setting of an editor does not fit.
    """
    check_parallelism(trainer, pl_module, "KnowledgeEditing")
    try:
        found = [editor.find_layers(find_model(pl_module)) for editor in editors]
        for layer in chain(*found):
            locate(layer.down_proj, optimizers_of(trainer))
        return found
    except (UnsupportedShardingError, ValueError) as error:  # UnsupportedModelError is a ValueError
        raise MisconfigurationException(f"KnowledgeEditing: {error}") from error


def check_model(pl_module: L.LightningModule, editors: Sequence[EditMethod], ranks: Ranks) -> list[list[ExpertLayer]]:
    """Check by forwards that the model is finite and that editors can edit it; return the layers of each of them.

    Raises:
        MisconfigurationException: if a layer cannot be edited, or its weights are sharded in a way that is unsupported.
        FloatingPointError: if the model is not finite.
    """
    try:
        model = find_model(pl_module)
        check_finite(model, ranks)
        return [editor.check(model, ranks) for editor in editors]
    except (UnsupportedModelError, UnsupportedShardingError) as error:
        raise MisconfigurationException(f"KnowledgeEditing: {error}") from error


def refuse_contradictions(facts: Mapping[str, Sequence[Fact]]) -> None:
    """Check that no callback would undo another's edit.

    Args:
        facts: by the callback's label.

    Raises:
        MisconfigurationException: if two callbacks have different targets for a prompt.
    """
    first: dict[str, tuple[str, Fact]] = {}
    for label, fact in ((label, fact) for label, own in facts.items() for fact in own):
        other, known = first.setdefault(fact.prompt, (label, fact))
        if known.target_new != fact.target_new:
            raise MisconfigurationException(
                f"KnowledgeEditing: {other} and {label} would undo each other's edit: for the prompt {fact.prompt!r} "
                f"the one has the target {known.target_new!r}, the other {fact.target_new!r}"
            )


def optimizers_of(trainer: L.Trainer) -> list[Any]:
    """Return the optimizers with master weights; outside of ``fit`` the trainer may have those of the last fit."""
    return list(trainer.optimizers) if trainer.state.fn == TrainerFn.FITTING else []


def keep_experts_together(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Make the experts of a layer one module ("leaf module") for DeepSpeed, whatever is called inside of it.

    Under ZeRO stage 3 DeepSpeed records the order in which modules are called, and fails if ranks differ in it. They
    do where experts call their activation one by one, for as many experts as got a token. A leaf module has no order
    inside; DeepSpeed makes the experts of some families leaf modules by itself. This is for modules that exist before
    the Trainer sets its strategy up; one that is made in ``configure_model`` can do the same there.
    """
    if not (isinstance(trainer.strategy, DeepSpeedStrategy) and trainer.strategy.zero_stage_3):
        return
    try:
        layers = expert_layers(find_model(pl_module))
    except UnsupportedModelError:
        return  # made later; a model that cannot be edited is refused when the run starts
    from deepspeed.utils import set_z3_leaf_module

    for layer in layers.values():
        set_z3_leaf_module(layer.experts, True)
