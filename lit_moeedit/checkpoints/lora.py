"""Checkpoints of models with LoRA adapters: the base, the adapter, and the weights into which it is folded."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from lit_moeedit.adapters import ADAPTER, BaseNames, add_lora, frozen_names, lora_settings, module_names
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.read import Checkpoint
from lit_moeedit.checkpoints.tensors import LoadedTensor, Readable
from lit_moeedit.checkpoints.weights import find_weights, saved_weights
from lit_moeedit.edits.histories import STATE_KEY, histories_of, make_all
from lit_moeedit.sharding.loading import pretrained_model
from lit_moeedit.text import first_few

if TYPE_CHECKING:
    from peft import PeftModel


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldedTensor(Readable):
    """A weight with its adapter added, which is computed in float32 and rounded once when it is read.

    Args:
        shape: its shape.
        dtype: dtype of the base's weight.
        base: the weight of the base.
        tuner: peft's module that changes it, with empty weights.
        parameter: the name of the weight in peft's base layer.
        adapter: the adapter's weights, by their names in ``tuner``.
    """

    base: Readable
    tuner: Any
    parameter: str
    adapter: Mapping[str, Readable]

    @override
    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the weight, in its own or another dtype.

        Raises:
            CheckpointError: a part of it is damaged in the file.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        owner = self.tuner.get_base_layer()
        places = {(owner, self.parameter): self.base}
        for name, weight in self.adapter.items():
            path, _, leaf = name.rpartition(".")
            places[self.tuner.get_submodule(path), leaf] = weight
        empty = {place: getattr(*place) for place in places}
        try:
            for (module, name), weight in places.items():
                # a copy, because what is read may be mapped from the file
                setattr(module, name, nn.Parameter(weight.read(wide).clone(), requires_grad=False))
            self.tuner.merge(adapter_names=[ADAPTER])
            merged: Tensor = getattr(owner, self.parameter).detach()
        finally:
            for (module, name), parameter in empty.items():
                setattr(module, name, parameter)
            self.tuner.merged_adapters = []
        return merged.to(dtype or self.dtype)


@dataclass(frozen=True)
class LoraWeights:
    """The weights of a model with LoRA adapters.

    Attributes:
        base: the weights of the base, by their names in it.
        stored: the weights in the checkpoint, by their names in ``model``.
    """

    base: Mapping[str, Readable]
    stored: Mapping[str, Readable]
    _settings: Mapping[str, Any]
    _model: PeftModel
    _names: BaseNames

    def folded(self) -> dict[str, Readable]:
        """Return the weights of the base, with the adapter added."""
        copies = {base: self.stored[name] for name, base in self._names.saved.items()}
        modules = {id(module): name for name, module in self._model.named_modules()}
        result: dict[str, Readable] = {}
        for name, weight in self.base.items():
            tuner = self._names.tuners.get(name)
            result[name] = copies.get(name, weight)
            if tuner is not None:
                start = f"{modules[id(tuner)]}."
                inner = f"{start}base_layer."
                adapter = {
                    key.removeprefix(start): stored
                    for key, stored in self.stored.items()
                    if key.startswith(start) and not key.startswith(inner)
                }
                result[name] = FoldedTensor(weight.shape, weight.dtype, weight, tuner, name.rpartition(".")[2], adapter)
        return result

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as ``PeftModel.from_pretrained`` reads it.

        Raises:
            OSError: it cannot be written.
        """
        frozen = frozen_names(self._model)
        trained = {name: stored.read() for name, stored in self.stored.items() if name not in frozen}
        config: Any = self._model.peft_config[ADAPTER]
        config.init_lora_weights = self._settings.get("init_lora_weights", True)
        config.base_model_name_or_path = ""  # any path of this machine would be wrong on another
        try:
            self._model.save_pretrained(str(folder), state_dict=trained, save_embedding_layers=False)
        except SafetensorError as error:  # of a full disk, too
            raise OSError(f"the adapter cannot be written: {error}") from error
        (folder / "README.md").unlink(missing_ok=True)  # peft's template, which says nothing of this adapter


def lora_weights(
    source: Checkpoint, skeleton: PreTrainedModel, prefix: str | None, origin: object
) -> LoraWeights | None:
    """Find the weights of a checkpoint of a model with LoRA adapters; ``None`` for one without.

    Args:
        source: the checkpoint. Its hyperparameter ``adapter`` has the settings of the adapter, as ``LitMoE`` saves it.
        skeleton: the base without weights.
        prefix: prefix of the names in the checkpoint; ``None`` to find it.
        origin: path or hub id of the base, which is read if the checkpoint holds the trained weights only.

    Raises:
        ModuleNotFoundError: peft is not installed.
        CheckpointError: a setting or a weight is missing, or of another model.
        OSError: the base cannot be read.
    """
    settings = source.hyper_parameters.get("adapter")
    if settings is None:
        if any(".lora_A." in name for name in source.tensors):
            raise CheckpointError(
                f"{source.path} holds LoRA adapters, but its field 'hyper_parameters' has no 'adapter' with their "
                "settings; a module of yours saves them by save_hyperparameters({'adapter': lora_settings(config)}) of "
                "lit_moeedit.adapters, or call merge_and_unload() of the PeftModel before it is saved"
            )
        return None
    base = copy.deepcopy(skeleton)  # the other stays as it is
    before = module_names(base)
    try:
        checked = lora_settings(settings, f"{source.path}: 'adapter' in the field 'hyper_parameters'")
        with torch.device("meta"):
            adapted = add_lora(base, {**checked, "init_lora_weights": False})
    except ValueError as error:
        raise CheckpointError(f"{error}") from error
    names, frozen = BaseNames.of(adapted, before), frozen_names(adapted)
    state, saved = adapted.state_dict(), saved_weights(skeleton)
    wanted = {name: value for name, value in state.items() if name not in names.own or names.own[name] in saved}
    kind = f"{type(skeleton).__name__} with LoRA"
    found = find_weights(source, kind, wanted, state.keys(), prefix, frozen & wanted.keys())
    own: dict[str, Readable] = {names.own[name]: stored for name, stored in found.items() if name in names.own}
    if lacking := {names.own[name] for name in wanted.keys() - found.keys()}:
        trained = [
            stored.dtype for name, stored in found.items() if name not in frozen and stored.dtype.is_floating_point
        ]
        own |= _read_base(source, origin, {name: saved[name] for name in lacking}, trained)
    return LoraWeights({name: own[name] for name in saved}, found, checked, adapted, names)


def _read_base(
    source: Checkpoint, origin: object, wanted: Mapping[str, Tensor], trained: list[torch.dtype]
) -> dict[str, LoadedTensor]:
    """Read the weights of the base that a checkpoint of trained weights does not hold, in the dtype of the run."""
    if not isinstance(origin, str):
        raise CheckpointError(
            f"{source.path} holds trained weights only; name the model that the training started from with --model "
            "(edits autopsy: --base)"
        )
    named = getattr(torch, str(source.hyper_parameters.get("dtype")), None)
    dtypes = [*trained, *([named] if isinstance(named, torch.dtype) else [])]
    # precision=bf16-true rounds the base and the adapter, whatever the module's dtype is
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    base = pretrained_model(origin, dtype)
    _make_edits(source, base)
    state = base.state_dict()
    wrong = [name for name, value in wanted.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise CheckpointError(f"{origin} is another model than that of {source.path}: {first_few(wrong)} do not fit")
    return {name: LoadedTensor(state[name].shape, state[name].dtype, state[name]) for name in wanted}


def _make_edits(source: Checkpoint, base: PreTrainedModel) -> None:
    """Make the edits of frozen experts in the base, which the checkpoint has as changes of low rank.

    Raises:
        CheckpointError: a callback says that there were edits, but the changes are in no state.
        EditConflictError: the base is another one than that of the edits.
    """
    states = {key: state for key, state in source.callbacks.items() if isinstance(state, Mapping)}
    state = states.get(STATE_KEY, {})
    histories, unedited = histories_of(state, f"{source.path}: the state of {STATE_KEY}") if state else ({}, {})
    edited = [key for key, state in states.items() if state.get("applied")]
    if edited and not histories:
        raise CheckpointError(
            f"{source.path} holds trained weights only, and not the experts in which {first_few(edited)} made its "
            "edits: an export of it would lose them; export a checkpoint of the whole model"
        )
    if count := make_all(base, histories, unedited) if state else 0:
        log.info("made %d changes of frozen experts, which the checkpoint has beside the trained weights", count)
