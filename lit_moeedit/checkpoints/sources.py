"""Models from folders and checkpoints, and their weights, read again one by one when they are needed."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from typing_extensions import override

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.export import make_skeleton, save_tokenizer
from lit_moeedit.checkpoints.lora import lora_weights
from lit_moeedit.checkpoints.read import Checkpoint, read_checkpoint
from lit_moeedit.checkpoints.tensors import Readable
from lit_moeedit.checkpoints.weights import find_weights, saved_weights
from lit_moeedit.edits.folders import load_model
from lit_moeedit.edits.stored import StoredModel
from lit_moeedit.models.parts import stored_tensors
from lit_moeedit.pretrained import pretrained_tokenizer
from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)


class StoredWeights(Mapping[str, Part]):
    """The weights in a model's folder by their names in the model, each read when it is asked for.

    Transformers stores some weights in parts and under other names. Where they lie is found by converting the indices
    of a weight's elements as if they were the weight.

    Args:
        stored: the folder.
        model: a model that was loaded from it. It may be on the meta device.

    Raises:
        ValueError: if a weight is stored in a way in which it cannot be read alone, or is not stored.
    """

    def __init__(self, stored: StoredModel, model: PreTrainedModel) -> None:
        self._stored, self._model = stored, model
        self._shapes = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
        for name in self._shapes:
            self._places(name, torch.device("meta"))

    @override
    def __getitem__(self, name: str) -> Part:
        """Read a weight.

        Raises:
            KeyError: if the model has none of this name.
            OSError: if it cannot be read.
        """
        places = self._places(name, torch.device("cpu"))
        parts = {stored: self._read(stored) for stored in places}
        if len(parts) == 1:
            [part], [place] = parts.values(), places.values()
            if part.shape == self._shapes[name] and _is_ascending(place):
                return Part.of(part)
        first = next(iter(parts.values()))
        whole = torch.empty(self._shapes[name].numel(), dtype=first.dtype)
        for stored, place in places.items():
            whole[place.reshape(-1)] = parts.pop(stored).reshape(-1)
        return Part.of(whole.view(self._shapes[name]))

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    @override
    def __len__(self) -> int:
        return len(self._shapes)

    def _places(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """Return the indices in a weight of the elements of each tensor that is stored of it."""
        shape = self._shapes[name]
        kind = torch.int32 if shape.numel() < 2**31 else torch.int64
        index = torch.arange(shape.numel(), dtype=kind, device=device).view(shape)
        found: dict[str, Tensor] = revert_weight_conversion(self._model, {name: index})
        for stored, place in found.items():
            known = self._stored.places.get(stored)
            if known is None or known.shape != tuple(place.shape):
                raise ValueError(f"{self._stored.folder} does not have {stored} of {name}, or in another shape")
        if sum(place.numel() for place in found.values()) != shape.numel():
            raise ValueError(f"{name} is not stored element by element in {self._stored.folder}")
        return found

    def _read(self, stored: str) -> Tensor:
        path = self._stored.folder / self._stored.places[stored].file
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor


def _is_ascending(place: Tensor) -> bool:
    flat = place.reshape(-1)
    return bool((flat[1:] > flat[:-1]).all())


class CheckpointWeights(Mapping[str, Part]):
    """The weights of a model in a checkpoint, each read when it is asked for.

    Args:
        weights: by the names under which ``save_pretrained`` would write them.
        model: the model, also on the meta device. A tied weight may have any of its names.
    """

    def __init__(self, weights: Mapping[str, Readable], model: PreTrainedModel) -> None:
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._weights: dict[str, Readable] = {}
        for name, tensor in stored_tensors(model).items():
            known = next((other for other in (name, *names.get(id(tensor), ())) if other in weights), None)
            if known is not None:
                self._weights[name] = weights[known]

    @override
    def __getitem__(self, name: str) -> Part:
        """Read a weight; it may be mapped from the file, so that it must not be changed.

        Raises:
            KeyError: if there is none of this name.
            CheckpointError: if it is damaged.
        """
        return Part.of(self._weights[name].read())

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    @override
    def __len__(self) -> int:
        return len(self._weights)


@dataclass(frozen=True)
class ModelSource:
    """A model in a folder of ``from_pretrained``, or in a checkpoint of Lightning.

    Attributes:
        path: the folder or the checkpoint.
        stored: the folder; ``None`` if it is a checkpoint.
        checkpoint: the checkpoint; ``None`` if it is a folder.
        base: local folder of the model that the training started from, for checkpoints that do not tell the config, or
            hold only what was trained.
    """

    path: Path
    stored: StoredModel | None
    checkpoint: Checkpoint | None
    base: str | None = None

    @classmethod
    def find(cls, path: Path, base: Path | None = None) -> ModelSource:
        """Open a folder or a checkpoint; nothing but headers is read.

        Args:
            path: the folder, the file, or the folder of DeepSpeed.
            base: as the attribute.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be read.
        """
        if (path / "config.json").is_file() or not path.exists():
            return cls(path, StoredModel(path), None)
        return cls(path, None, read_checkpoint(path.resolve()), None if base is None else str(base))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights of a folder, or of the first of a checkpoint."""
        if self.stored is not None:
            return self.stored.dtype
        assert self.checkpoint is not None
        dtypes = (tensor.dtype for tensor in self.checkpoint.tensors.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def load(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> tuple[PreTrainedModel, Mapping[str, Part]]:
        """Load the model, and return its weights as they can be read again, after the model has changed or is gone.

        Args:
            dtype: dtype of the weights; by default the one of the files.
            device: device of the model; by default the CPU.

        Returns:
            The model in evaluation mode, and the weights by name.

        Raises:
            ValueError: if it cannot be loaded.
            OSError: if a file cannot be read.
        """
        if self.stored is not None:
            model = load_model(self.stored, dtype, device)
            try:
                return model, StoredWeights(self.stored, without_weights(model))
            except ValueError as error:
                log.info("a second copy of the model stays in memory: %s", error)
                return model, {name: Part.of(tensor).to("cpu") for name, tensor in stored_tensors(model).items()}
        assert self.checkpoint is not None
        skeleton = make_skeleton(self.checkpoint, self.base)
        origin = self.base if self.base is not None else self.checkpoint.hyper_parameters.get("pretrained")
        lora = lora_weights(self.checkpoint, skeleton, None, origin)
        found: Mapping[str, Readable]
        if lora is None:
            known = skeleton.state_dict().keys()
            found = find_weights(self.checkpoint, type(skeleton).__name__, saved_weights(skeleton), known, None)
        else:
            found = lora.folded()
        weights = CheckpointWeights(found, skeleton)
        model = _filled(skeleton, weights, dtype or self.dtype)
        return model if device is None else model.to(device), weights  # type: ignore[arg-type]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read the tokenizer beside the model.

        Raises:
            OSError: if there is none.
            ValueError: if it cannot be used.
        """
        if self.checkpoint is None:
            return pretrained_tokenizer(self.path)
        with tempfile.TemporaryDirectory() as folder:
            origin = self.base if self.base is not None else self.checkpoint.hyper_parameters.get("pretrained")
            save_tokenizer(None, self.checkpoint, origin, Path(folder))
            return pretrained_tokenizer(folder)


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model on the meta device, with its names, shapes and format of files."""
    memo: dict[int, Any] = {}
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    copied: PreTrainedModel = copy.deepcopy(model, memo)
    return copied


def _filled(skeleton: PreTrainedModel, weights: Mapping[str, Part], dtype: torch.dtype) -> PreTrainedModel:
    """Make a model of a config and weights."""
    # without the implementation of attention that the skeleton has, which is for an export only
    config = type(skeleton.config).from_dict(skeleton.config.to_dict())
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    tensors = stored_tensors(model)
    lacking = [name for name in tensors if name not in weights]
    if lacking:
        raise CheckpointError(f"the checkpoint lacks weights of {type(model).__name__}: {first_few(lacking)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name].elements.view(tensor.shape))
    model.eval()
    return model
