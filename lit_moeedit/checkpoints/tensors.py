"""Tensors in the files of a checkpoint, and files of safetensors that are written tensor by tensor."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype
from typing_extensions import override

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.torch_file import Piece, TorchFile


@dataclass(frozen=True)
class Readable(ABC):
    """A weight that is read, or computed, when it is needed.

    Args:
        shape: shape of the whole tensor.
        dtype: dtype of the model weights.
    """

    shape: torch.Size
    dtype: torch.dtype

    @property
    def is_repeated(self) -> bool:
        """Tell whether elements occur several times in the tensor, but once in the file."""
        return False

    @abstractmethod
    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor, in its own or another dtype."""


@dataclass(frozen=True)
class LoadedTensor(Readable):
    """A tensor in memory.

    Args:
        shape: its shape.
        dtype: its dtype.
        tensor: the tensor.
    """

    tensor: Tensor

    @override
    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensor.to(dtype or self.dtype)


@dataclass(frozen=True)
class StoredTensor(Readable):
    """A tensor in the files of a checkpoint, whole or in the shards of several ranks.

    Args:
        shape: shape of the whole tensor.
        dtype: dtype of the model weights. Pieces of master weights may have another one.
        pieces: pieces that are mapped from the files, in order. There may be padding after the last element.
    """

    pieces: Sequence[Piece]

    @property
    @override
    def is_repeated(self) -> bool:
        return any(piece.tensor.nbytes > piece.tensor.untyped_storage().nbytes() for piece in self.pieces)

    @override
    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the whole tensor, in its own or another dtype. The result is a view of the mapped file if possible.

        Raises:
            CheckpointError: it is damaged in the file.
        """
        dtype, numel = dtype or self.dtype, self.shape.numel()
        if len(self.pieces) == 1:
            return self.pieces[0].read().reshape(-1)[:numel].view(self.shape).to(dtype)
        whole, start = torch.empty(numel, dtype=dtype), 0
        for piece in self.pieces:
            stop = min(start + piece.numel(), numel)
            whole[start:stop] = piece.read()[: stop - start]
            start = stop
        return whole.view(self.shape)


def tensors_in(file: TorchFile, name: str, values: Sequence[Any]) -> list[Piece]:
    """Read the flat tensors in a field."""
    for value in values:
        if not _is_plain(value) or not value.is_contiguous():
            found = f"a {type(value).__name__}" if not isinstance(value, Tensor) else "one that is not contiguous"
            raise CheckpointError(f"{file.path}: field {name!r} should hold tensors, but holds {found}")
    return [Piece(value.detach().view(-1), file) for value in values]


def shapes_in(path: Path, name: str, values: Any) -> dict[str, torch.Size]:
    """Read the shapes of parameters by their names, in a field."""
    sound = isinstance(values, dict) and all(
        isinstance(shape, tuple | list) and all(isinstance(length, int) and length >= 0 for length in shape)
        for shape in values.values()
    )
    if not sound:
        raise CheckpointError(f"{path}: field {name!r} should hold shapes of parameters by their names")
    return {str(key): torch.Size(shape) for key, shape in values.items()}


def as_they_are(file: TorchFile, state: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict. Its other entries hold no weights."""
    found = {str(name): value.detach() for name, value in state.items() if _is_plain(value)}
    return {name: StoredTensor(value.shape, value.dtype, (Piece(value, file),)) for name, value in found.items()}


def _is_plain(value: Any) -> bool:
    """Tell if a value is a tensor with all elements in the file."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout is torch.strided


class WeightFile:
    """A file of safetensors that is written tensor by tensor, so that memory is needed for one tensor only.

    Args:
        path: path of the file, which must not exist.
        tensors: names, shapes and dtypes of the tensors, in the order in which they are stored.

    Raises:
        OSError: if there is no room for it.
        ValueError: if safetensors does not support a dtype.
    """

    DTYPES: ClassVar = {dtype: name for name, dtype in str_to_torch_dtype.items()}

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            if tensor.dtype not in self.DTYPES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors does not support")
            start, end = end, end + tensor.nbytes
            shape = list(tensor.shape)
            header[name] = {"dtype": self.DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # the data begin at a multiple of 8
        text += b" " * (-len(text) % 8)
        self._starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors."""
        with self.path.open("r+b") as file:
            file.seek(self._starts[name])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
