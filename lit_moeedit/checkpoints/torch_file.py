"""A file of ``torch.save``, read as plain data: a zip archive with a pickle and a record for each tensor's storage."""

from __future__ import annotations

import io
import logging
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler
from torch.storage import TypedStorage, UntypedStorage

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.limits import check_pickle, check_values

log = logging.getLogger(__name__)

MAX_PICKLE = 2**28
"""Maximum size in bytes of the pickle, which has everything but the tensors."""
_CHUNK = 2**26


class _StandIn:
    """A placeholder for objects of DeepSpeed that hold no weights."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Classes in DeepSpeed's files, known by name, so that none of its code is needed or run.
STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class _Record:
    """A record of the archive: where its contents begin, their size in bytes, and their CRC-32."""

    name: str
    start: int
    size: int
    checksum: int


class TorchFile:
    """A file of ``torch.save``, with its tensors mapped and not loaded.

    The archive's structure and the sizes of all records are checked when it is opened. The checksum of a tensor's
    record is checked by :meth:`verify`, so that only what is needed is read, and only once.

    Args:
        path: path of the file.

    Raises:
        CheckpointError: it is not a file of ``torch.save``, or an incomplete or damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        with refusing(path), path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise CheckpointError("it is not a file of torch.save, or an incomplete one")
            size = path.stat().st_size
            self._records = stored_records(file, size)
            self._mapped = UntypedStorage.from_file(str(path), False, size)
            self._by_start = {record.start: record for record in self._records.values() if record.size}
            self._verified: set[str] = set()
            self._has_checksums = any(record.checksum for record in self._records.values())
        if not self._has_checksums:
            log.info("%s was saved without checksums; only the sizes of its records are checked", path)

    def check_plain(self) -> None:
        """Check that the contents can be read as plain data, within limits of memory and time.

        Raises:
            CheckpointError: they are too large, or code would have to run to read them.
        """
        with torch.serialization.safe_globals(STAND_INS), refusing(self.path):
            check_pickle(self._pickle())
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
        if unknown:
            raise CheckpointError(
                f"{self.path} holds objects of {', '.join(sorted(unknown))}, whose code would have to run to read "
                "them; nothing was executed. Only plain data can be read: numbers, strings, lists, dicts and tensors"
            )

    def read(self) -> dict[str, Any]:
        """Read the contents, which must be a dict.

        Raises:
            CheckpointError: they are something else, or cannot be read; see :meth:`check_plain`.
        """
        self.check_plain()
        with torch.serialization.safe_globals(STAND_INS), refusing(self.path):
            unpickler: Any = Unpickler(io.BytesIO(self._pickle()), encoding="utf-8")
            storages: dict[str, TypedStorage] = {}

            def storage(identity: Any) -> TypedStorage:
                _, kind, key, _, count = identity
                dtype = torch.uint8 if kind is UntypedStorage else kind.dtype
                if key not in storages:
                    storages[key] = self._storage(str(key), dtype, count)
                return storages[key]

            unpickler.persistent_load = storage
            contents = unpickler.load()
            check_values(contents)
        if not isinstance(contents, dict):
            raise CheckpointError(f"{self.path} should hold a dict, but holds a {type(contents).__name__}")
        return contents

    def verify(self, tensor: Tensor) -> None:
        """Check the checksum of the record that a tensor of this file is in, when it is first asked for.

        Raises:
            CheckpointError: the record is damaged.
        """
        start = tensor.untyped_storage().data_ptr() - self._mapped.data_ptr()
        record = self._by_start.get(start)
        if record is not None and tensor.numel():
            self._verify(record)

    def verify_all(self) -> None:
        """Check the checksums of all records.

        Raises:
            CheckpointError: a record is damaged.
        """
        for record in self._records.values():
            self._verify(record)

    def _verify(self, record: _Record) -> None:
        if not self._has_checksums or record.name in self._verified:
            return
        value, contents = 0, self._bytes(record)
        for start in range(0, record.size, _CHUNK):
            value = zlib.crc32(contents[start : start + _CHUNK], value)
        if value != record.checksum:
            raise CheckpointError(
                f"{self.path}: the record {record.name!r} is damaged: its checksum is {value:08x}, but "
                f"{record.checksum:08x} was saved"
            )
        self._verified.add(record.name)

    def _bytes(self, record: _Record) -> memoryview:
        part = self._mapped[record.start : record.start + record.size]
        found: memoryview = torch.empty(0, dtype=torch.uint8).set_(part).numpy().data
        return found

    def _record(self, name: str) -> _Record:
        if name not in self._records:
            raise CheckpointError(f"the record {name!r} is missing")
        return self._records[name]

    def _pickle(self) -> bytes:
        record = self._record("data.pkl")
        if record.size > MAX_PICKLE:
            raise CheckpointError(f"the record 'data.pkl' has {record.size:,} bytes; at most {MAX_PICKLE:,} are read")
        self._verify(record)
        if "byteorder" in self._records:
            order = bytes(self._bytes(self._records["byteorder"])[:10]).decode("ascii", "replace")
            if order != sys.byteorder:
                raise CheckpointError(f"its numbers have the byte order {order!r}; expected {sys.byteorder!r}")
        return bytes(self._bytes(record))

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> TypedStorage:
        record = self._record(f"data/{key}")
        if record.size != count * dtype.itemsize:
            raise CheckpointError(
                f"the record {record.name!r} has {record.size:,} bytes, but {count:,} elements of {dtype} have "
                f"{count * dtype.itemsize:,}"
            )
        part = self._mapped[record.start : record.start + record.size]
        return TypedStorage(wrap_storage=part, dtype=dtype, _internal=True)


@dataclass(frozen=True)
class Piece:
    """A part of a mapped tensor, whose record is verified when it is read."""

    tensor: Tensor
    file: TorchFile

    def numel(self) -> int:
        """Return the number of elements."""
        return self.tensor.numel()

    def part(self, start: int, stop: int) -> Piece:
        """Return a range of a piece of one dimension."""
        return Piece(self.tensor[start:stop], self.file)

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            CheckpointError: its record in the file is damaged.
        """
        self.file.verify(self.tensor)
        return self.tensor


def stored_records(file: Any, size: int) -> dict[str, _Record]:
    """Find the records of an archive, all of them stored as they are and apart from each other, by name.

    Args:
        file: an open file of ``torch.save``.
        size: its size in bytes.

    Raises:
        CheckpointError: a record is compressed, or not where it should be.
    """
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    root = next((entry.filename.removesuffix("data.pkl") for entry in entries if _is_pickle(entry.filename)), None)
    if root is None:
        raise CheckpointError("the record 'data.pkl' is missing")
    found: dict[str, _Record] = {}
    end = 0
    for entry in entries:
        name = entry.filename.removeprefix(root)
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"the record {name!r} is compressed, which torch.save does not do")
        file.seek(entry.header_offset)
        header = file.read(30)
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        if header[:4] != b"PK\x03\x04" or entry.header_offset < end or start + entry.file_size > size:
            raise CheckpointError(f"the record {name!r} is not where the list of records says")
        if name in found:
            raise CheckpointError(f"there are two records {name!r}")
        found[name] = _Record(name, start, entry.file_size, entry.CRC)
        end = start + entry.file_size
    return found


def _is_pickle(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn any error that reading a file raises into a ``CheckpointError`` that names the file."""
    try:
        yield
    except Exception as error:  # a damaged or forged file may raise any error
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        reason = f"{kind}{error}".splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); nothing in it was executed") from error
