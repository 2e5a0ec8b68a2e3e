"""A model's folder as it is stored: where each weight lies in its files, and a copy of it with other weights."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lit_moeedit.atomic_files import path_in_errors
from lit_moeedit.text import brief, first_few, near_path

log = logging.getLogger(__name__)

EDITS = "edits"
"""Folder of the edits in a model's folder."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000
"""Maximum size of the header of a safetensors file in bytes, as the library has it."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".pkl"}
"""Ends of the names of files that may hold weights."""
CARD = "README.md"
ORIGINAL = "README.base.md"
"""The card of the base in an edited folder, which has one of its own."""
_OURS = (CARD, "report.html", "edits.jsonl")
"""Files that an edited folder has of its own."""


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a file.

    Attributes:
        file: name of the file.
        dtype: dtype as safetensors spells it.
        shape: shape.
        start: first byte in the file.
        size: number of bytes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class StoredModel:
    """The weights in a local folder of ``from_pretrained``, in safetensors.

    Args:
        folder: the folder.

    Attributes:
        folder: the folder.
        files: names of the files with the weights that ``from_pretrained`` reads.
        places: the place of every tensor in them.

    Raises:
        FileNotFoundError: if the folder, its config or its weights are missing.
        NotADirectoryError: if the folder is a file.
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise NotADirectoryError(f"{self.folder} is a file; expected the local folder of a model")
        if not self.folder.is_dir():
            near = near_path(self.folder)
            raise FileNotFoundError(f"there is no folder {self.folder}{near}: expected the local folder of a model")
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{self.folder} has no config.json: expected a local folder of from_pretrained")
        if (self.folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{self.folder} has an adapter (adapter_config.json) beside the model: merge it into the weights, or "
                "move it out of the folder"
            )
        self.files = self._find_files()
        self.places: dict[str, Place] = {}
        for file in self.files:
            self.places |= _read_header(self.folder, file)

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():  # as from_pretrained, which looks for it first
            return [SINGLE]
        if not index.is_file():
            found = sorted(path.name for path in self.folder.iterdir() if path.suffix in _WEIGHTS)
            others = f" (there are {first_few(found)})" if found else ""
            raise FileNotFoundError(f"{self.folder} has no weights in safetensors{others}; other formats are not read")
        try:
            weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: expected the field 'weight_map', an object of file names") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: field 'weight_map' has {str(name)[:80]!r}, expected a .safetensors file")
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"{index} names {name}, which is not in {self.folder}")
        return names

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the weights."""
        sizes: Counter[str] = Counter()
        for place in self.places.values():
            sizes[place.dtype] += place.size
        return next((_DTYPES[name] for name, _ in sizes.most_common() if name in _DTYPES), torch.float32)

    @property
    def size(self) -> int:
        """The number of bytes of all weights."""
        return sum(place.size for place in self.places.values())

    def find(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Check that tensors have a place of their own dtype and shape.

        Raises:
            ValueError: if one has none.
        """
        for name, value in values:
            place = self.places.get(name)
            if place is None:
                raise ValueError(f"{self.folder} has no weight {name}")
            stored = f"{place.dtype} {list(place.shape)}"
            if place.shape != tuple(value.shape) or _DTYPES.get(place.dtype) != value.dtype:
                raise ValueError(f"{name} is stored as {stored}, and is {value.dtype} {list(value.shape)} in memory")

    def check_dtype(self, model: PreTrainedModel, parameters: Iterable[str]) -> None:
        """Check that parameters of a model can be written in the dtype in which they are stored; quick.

        Raises:
            ValueError: if the folder has weights in several dtypes, and a parameter is not of the one that was loaded.
        """
        dtypes = sorted({place.dtype for place in self.places.values() if place.dtype in _DTYPES})
        if len(dtypes) < 2:
            return
        weights = dict(model.named_parameters())
        for name in parameters:
            empty = {name: torch.empty_like(weights[name], device="meta")}
            for stored_name, value in revert_weight_conversion(model, empty).items():
                place = self.places.get(stored_name)
                if place is not None and _DTYPES.get(place.dtype) != value.dtype:
                    raise ValueError(
                        f"{self.folder} has weights in several dtypes ({', '.join(dtypes)}), and {stored_name} in "
                        "another than most: save it in one dtype first"
                    )

    def converted(self, model: PreTrainedModel, parameter: str) -> list[tuple[str, Tensor]]:
        """Return a parameter of a model as this folder has it: under other names, in parts, or as it is.

        Raises:
            ValueError: if it has no place in the files.
        """
        weights = dict(model.named_parameters())
        values = [*revert_weight_conversion(model, {parameter: weights[parameter].detach()}).items()]
        self.find(values)
        return values

    def copy(
        self,
        target: Path,
        changed: Iterable[Iterable[tuple[str, Tensor]]],
        report: Callable[[int, int], object] = lambda done, total: None,
    ) -> int:
        """Copy the folder, with other values of some weights; everything else is copied byte by byte.

        Memory is needed for one group of values at a time.

        Args:
            target: an existing folder.
            changed: groups of weights, by their names in the files.
            report: called with the number of files copied, and their total number.

        Returns:
            The number of weights that have other bytes than before.

        Raises:
            ValueError: if a weight has no place in the files.
            OSError: if a file cannot be read or written.
        """
        names = self.other_files()
        for number, name in enumerate((*self.files, *names), 1):
            copy_file(self.folder, target, name)
            report(number, len(self.files) + len(names))
        written = 0
        for group in changed:
            for name, value in group:
                self.find([(name, value)])
                place = self.places[name]
                data = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
                with path_in_errors(target / place.file), (target / place.file).open("r+b") as file:
                    file.seek(place.start)
                    if file.read(place.size) != data:
                        file.seek(place.start)
                        file.write(data)
                        written += 1
        return written

    def other_files(self) -> list[str]:
        """Return the names of the files to copy besides the weights, also of those in folders (``folder/file``).

        They are copied as data and never run, code too: ``from_pretrained`` reads all of it with
        ``trust_remote_code``, and the templates in ``additional_chat_templates`` always. Weights in other files, and
        folders that have some (``original``, ``onnx``, checkpoints), would be those before the edit, so they are left
        out, with a warning. Hidden files, links to folders and what an edit has of its own are left out, too.
        """
        kept: list[str] = []
        weights: list[str] = []
        is_edited = (self.folder / EDITS).is_dir()
        for path in sorted(self.folder.iterdir()):
            if path.name in self.files or path.name.startswith(".") or path.name == EDITS:
                continue
            if path.name in _OURS and (is_edited or path.name != CARD):
                continue  # of other facts
            if path.is_dir():
                inner = [] if path.is_symlink() else list(_files_in(path))
                has_weights = any(_holds_weights(file) for file in inner)
                weights += [f"{path.name}/"] if has_weights else []
                kept += [] if has_weights else [file.relative_to(self.folder).as_posix() for file in inner]
            elif path.name == INDEX:
                kept += [] if self.files == [SINGLE] else [path.name]  # that of files that are not copied
            elif _holds_weights(path):
                weights.append(path.name)
            elif path.is_file():  # what a link leads to may be a device
                kept.append(path.name)
        if weights:
            log.warning("not copied, because they hold the weights before the edit: %s", first_few(weights))
        return kept


def copy_file(source: Path, target: Path, name: str) -> None:
    """Copy a file of a folder to another one, in which its own folder may be missing.

    Raises:
        OSError: if it cannot be read or written.
    """
    with path_in_errors(target / name):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its folders, without hidden ones and links to folders."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from () if path.is_symlink() else _files_in(path)
        elif path.is_file():
            yield path


def _holds_weights(path: Path) -> bool:
    return path.suffix in _WEIGHTS or path.name.endswith(".index.json")


def _read_header(folder: Path, file: str) -> dict[str, Place]:
    """Read where the tensors of a file lie."""
    path = folder / file
    try:
        with safe_open(path, framework="pt"):  # checks the header
            pass
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER:
                raise ValueError(f"its header has {length:,} bytes")
            header = json.loads(stream.read(length))
        places = {
            str(name): Place(file, str(entry["dtype"]), tuple(entry["shape"]), 8 + length + start, stop - start)
            for name, entry in header.items()
            if name != "__metadata__"
            for start, stop in (entry["data_offsets"],)
        }
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is damaged: {brief(error)}") from error
    wrong = [
        name
        for name, place in places.items()
        if place.dtype in _DTYPES and place.size != prod(place.shape) * _DTYPES[place.dtype].itemsize
    ]
    if wrong:
        raise ValueError(f"{path} is damaged: {first_few(wrong)} has another size than its shape")
    return places
