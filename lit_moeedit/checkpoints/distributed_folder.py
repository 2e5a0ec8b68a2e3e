"""Folders of torch's distributed checkpoints, as Lightning's ``ModelParallelStrategy`` writes them under FSDP2.

Their metadata are a pickle, and single values in their files, such as learning rates, are read by torch in a way that
runs code. Both are checked here without reading them, against a list of what torch writes.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from typing_extensions import override

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.limits import find_globals
from lit_moeedit.checkpoints.tensors import Readable
from lit_moeedit.checkpoints.torch_file import TorchFile, refusing, stored_records

METADATA = ".metadata"
FIELDS = "meta.pt"
"""Lightning's file of everything but weights and optimizers."""
MAX_METADATA = 2**28
"""Maximum size in bytes of the metadata."""
MAX_CHUNKS = 4096
"""Maximum number of chunks of a tensor, of which torch writes one for each rank."""
MAX_VALUE = 2**24
"""Maximum size in bytes of a value that is no tensor."""

_ALLOWED = {
    *(f"torch {name}" for name in ("Size", "bfloat16", "float16", "float32", "float64", "int64", "bool")),
    "torch.serialization _get_layout",
    "torch.distributed.checkpoint.filesystem _StorageInfo",
    "pathlib PosixPath",
    *(
        f"torch.distributed.checkpoint.metadata {name}"
        for name in (
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        )
    ),
}


def is_distributed(path: Path) -> bool:
    """Tell if a path is a folder of a distributed checkpoint."""
    return (path / METADATA).is_file()


def check_distributed(path: Path) -> None:
    """Refuse a distributed checkpoint that torch could not read without running code that it names.

    Raises:
        CheckpointError: naming the file and what is in it.
    """
    metadata = _metadata(path)
    with refusing(path), tempfile.TemporaryDirectory() as folder:
        for index, place in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                copy = Path(folder, "value.pt")
                copy.write_bytes(_bytes(path, place, MAX_VALUE))
                try:
                    TorchFile(copy).check_plain()
                except CheckpointError as error:
                    reason = str(error).replace(str(copy), repr(index.fqn))
                    raise CheckpointError(f"{path / place.relative_path}: {reason}") from error


def read_distributed(path: Path) -> tuple[dict[str, ChunkedTensor], dict[str, Any]]:
    """Read the weights of a LightningModule, by name, and the other fields of its checkpoint.

    Raises:
        CheckpointError: if something is missing, damaged, or not supported.
    """
    metadata = _metadata(path)
    places: dict[str, dict[tuple[int, ...], _Place]] = {}
    found = {}
    with refusing(path):
        for index, info in metadata.storage_data.items():
            places.setdefault(index.fqn, {})[tuple(index.offset or ())] = _Place(path, info)
        for name, own in metadata.state_dict_metadata.items():
            if isinstance(own, TensorStorageMetadata) and name.startswith("state_dict."):
                shape, dtype = torch.Size(own.size), own.properties.dtype
                chunks = tuple(
                    _Chunk(tuple(chunk.offsets), torch.Size(chunk.sizes), places[name][tuple(chunk.offsets)])
                    for chunk in own.chunks
                )
                if not _is_covered(shape, chunks):
                    raise CheckpointError(f"the chunks of {name} are not all of it, each element once")
                found[name.removeprefix("state_dict.")] = ChunkedTensor(shape, dtype, chunks)
    return found, TorchFile(path / FIELDS).read()


@dataclass(frozen=True)
class _Place:
    """Where a chunk is in the files."""

    folder: Path
    info: Any

    def read(self) -> Tensor:
        with refusing(self.folder / str(self.info.relative_path)):
            data = _bytes(self.folder, self.info)
            contents = io.BytesIO(data)
            stored_records(contents, len(data))  # a compressed one could take any amount of memory
            contents.seek(0)
            value = torch.load(contents, map_location="cpu", weights_only=True)
            if not isinstance(value, Tensor):
                raise CheckpointError(f"there should be a tensor, but it is a {type(value).__name__}")
            return value.detach()


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor."""

    offsets: tuple[int, ...]
    shape: torch.Size
    place: _Place


@dataclass(frozen=True)
class ChunkedTensor(Readable):
    """A tensor in the chunks of a distributed checkpoint, which are read when it is needed.

    Args:
        shape: shape of the whole tensor.
        dtype: its dtype.
        chunks: boxes that make it up.
    """

    chunks: tuple[_Chunk, ...]

    @override
    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """Read the whole tensor, in its own or another dtype.

        Raises:
            CheckpointError: a chunk cannot be read, or has another shape.
        """
        # before memory is taken for what is not there
        for chunk in self.chunks:
            info = chunk.place.info
            size, file = chunk.shape.numel() * self.dtype.itemsize, chunk.place.folder / str(info.relative_path)
            if info.length < size or not file.is_file() or info.length > file.stat().st_size:
                raise CheckpointError(f"a tensor of shape {list(self.shape)} is not in {file} as a whole")
        whole = torch.zeros(self.shape, dtype=dtype or self.dtype)
        for chunk in self.chunks:
            value = chunk.place.read()
            if value.shape != chunk.shape:
                raise CheckpointError(f"a chunk of the shape {list(chunk.shape)} has the shape {list(value.shape)}")
            ends = (start + length for start, length in zip(chunk.offsets, chunk.shape, strict=True))
            whole[tuple(map(slice, chunk.offsets, ends))] = value
        return whole


def _is_covered(shape: torch.Size, chunks: Sequence[_Chunk]) -> bool:
    """Tell if chunks are inside of a tensor, do not overlap, and have all of its elements."""
    boxes = [tuple(zip(chunk.offsets, chunk.shape, strict=True)) for chunk in chunks]
    for box in boxes:
        if len(box) != len(shape) or any(
            start < 0 or length < 0 or start + length > size for (start, length), size in zip(box, shape, strict=True)
        ):
            return False
    boxes = [box for box in boxes if all(length for _, length in box)]
    if len(boxes) > MAX_CHUNKS:
        raise CheckpointError(f"a tensor is in {len(boxes):,} chunks; at most {MAX_CHUNKS:,} are read")
    for one, other in combinations(boxes, 2):
        if all(a < b + m and b < a + n for (a, n), (b, m) in zip(one, other, strict=True)):
            return False
    return sum(chunk.shape.numel() for chunk in chunks) == shape.numel()


def _metadata(path: Path) -> Metadata:
    """Read the metadata, if they name nothing but what torch writes."""
    file = path / METADATA
    with refusing(file):
        if file.stat().st_size > MAX_METADATA:
            raise CheckpointError(f"it has more than {MAX_METADATA:,} bytes")
        unknown = find_globals(file.read_bytes()) - _ALLOWED
        if unknown:
            names = ", ".join(sorted(name.replace(" ", ".") for name in unknown))
            raise CheckpointError(f"it names {names}, whose code would have to run")
        metadata = FileSystemReader(path).read_metadata()
        for index, info in metadata.storage_data.items():
            if index.fqn not in metadata.state_dict_metadata or getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{index.fqn!r} is stored in a way that is not known")
        return metadata


def _bytes(path: Path, info: Any, limit: int | None = None) -> bytes:
    """Read a range of one of the files in a folder."""
    name, start, length = info.relative_path, info.offset, info.length
    file = path / name
    if Path(name).name != name or file.is_symlink() or not file.is_file():
        raise CheckpointError(f"{str(name)[:80]!r} should be a file of the folder")
    if min(start, length) < 0 or start + length > file.stat().st_size or length > (limit or length):
        raise CheckpointError(f"{name} is too short for what should be in it, or a value too large")
    with file.open("rb") as opened:
        opened.seek(start)
        data: bytes = opened.read(length)
    if data[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{name} has no value of torch.save at {start:,}")
    return data
