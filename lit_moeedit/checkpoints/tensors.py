"""Files of ``torch.save``, read as nothing but data, and files of safetensors, written tensor by tensor."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, field


class _StandIn:
    """Takes the place of an object of DeepSpeed that says nothing about weights."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What DeepSpeed's files hold besides plain data: known by name, so that none of its code is needed, let alone run.
STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the files of a checkpoint, whole or in the shards of several ranks.

    Args:
        shape: of the whole.
        dtype: that it has in training; the pieces may be those of a master copy in another one.
        pieces: mapped from the files, in order; behind the last number there may be padding.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: Sequence[Tensor]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, as it is in training or in another dtype; in the mapped file itself if it stands there."""
        dtype, numel = dtype or self.dtype, self.shape.numel()
        if len(self.pieces) == 1:
            return self.pieces[0].reshape(-1)[:numel].view(self.shape).to(dtype)
        whole, start = torch.empty(numel, dtype=dtype), 0
        for piece in self.pieces:
            stop = min(start + piece.numel(), numel)
            whole[start:stop] = piece[: stop - start]
            start = stop
        return whole.view(self.shape)


def load(path: Path) -> dict[str, Any]:
    """The contents of a file of ``torch.save``, its tensors mapped and not loaded."""
    check_plain(path)
    with torch.serialization.safe_globals(STAND_INS), _refusing(path):
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} should hold a dict, but holds a {type(contents).__name__}")
    return contents


def check_plain(path: Path) -> None:
    """Raise :class:`CheckpointError` if a file is not one of ``torch.save``, or code would have to run to read it."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    with torch.serialization.safe_globals(STAND_INS), _refusing(path):
        if not zipfile.is_zipfile(path):
            raise CheckpointError("it is not a file of torch.save, or only a part of one")
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unknown:
        raise CheckpointError(
            f"{path} holds objects of {', '.join(sorted(unknown))}, whose code would have to run to read them; nothing "
            "was executed. Only plain data can be read: numbers, texts, lists, dicts and tensors"
        )


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # there is no telling what a damaged or forged file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); nothing in it was executed") from error


def tensors_in(path: Path, name: str, values: Sequence[Any]) -> list[Tensor]:
    """The flat tensors in a field."""
    for value in values:
        if not _is_plain(value) or not value.is_contiguous():
            found = f"a {type(value).__name__}" if not isinstance(value, Tensor) else "one that is not contiguous"
            raise CheckpointError(f"{path}: field {name!r} should hold tensors, but holds {found}")
    return [value.detach().view(-1) for value in values]


def shapes_in(path: Path, name: str, values: Any) -> dict[str, torch.Size]:
    """The shapes of parameters by their names, in a field."""
    sound = isinstance(values, dict) and all(
        isinstance(shape, tuple | list) and all(isinstance(length, int) and length >= 0 for length in shape)
        for shape in values.values()
    )
    if not sound:
        raise CheckpointError(f"{path}: field {name!r} should hold shapes of parameters by their names")
    return {str(key): torch.Size(shape) for key, shape in values.items()}


def as_they_are(state: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Whole tensors; a state dict may hold other things, too, but no weights in them."""
    found = {str(name): value.detach() for name, value in state.items() if _is_plain(value)}
    return {name: StoredTensor(value.shape, value.dtype, (value,)) for name, value in found.items()}


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with all its numbers in the file."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout is torch.strided


class WeightFile:
    """A file of safetensors that is written tensor by tensor, so that none has to wait in memory for the others.

    Args:
        path: of the file; there must be none.
        tensors: names, shapes and dtypes of what will be written, in the order in which it stands in the file.

    Raises:
        OSError: if there is no room for it.
        ValueError: if safetensors does not know a dtype.
    """

    DTYPES: ClassVar = {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
        torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float16: "F16",
        torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    }  # fmt: skip

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            if tensor.dtype not in self.DTYPES:
                raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors does not know")
            start, end = end, end + tensor.nbytes
            shape = list(tensor.shape)
            header[name] = {"dtype": self.DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # the numbers begin at a multiple of 8
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
