"""Second moments on disk, of finished passes over text and of interrupted ones."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.atomic_files import read_tensors, remove_leftovers, write_tensors
from lit_moeedit.data.encoding import encode
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import decoder_layers
from lit_moeedit.sharding.backends import settle
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.owners import Part
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

FORMAT = "lit_moeedit.moments.1"


class MomentsCache:
    """A folder of safetensors files, each under a key that is a digest of everything its tensors depend on.

    The first rank reads and writes the files. Each file appears complete or not at all. If a file is damaged, was
    written by another program or cannot be written, a warning is logged, and its contents are computed again.

    While weights are trained, their keys change at every step, and files of earlier steps serve only a run that resumes
    there. So the number of files is bounded, and the least recently used ones are removed first.

    Args:
        folder: path of the folder, which is made when the first file is written. Several runs may share it one after
            the other.
        keep: maximum number of files. Each holds one layer, or one interrupted pass.
        save_every: seconds between saves of an unfinished pass.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, folder: str | Path, keep: int = 32, save_every: float = 300.0) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if not save_every >= 0:
            raise ValueError(f"save_every must be at least 0 seconds, got {save_every}")
        self.folder, self.keep, self.save_every = Path(folder), keep, save_every

    def load(
        self, key: str, tensors: Mapping[str, Tensor], ranks: Ranks, parts: Mapping[str, Part] | None = None
    ) -> bool:
        """Read the tensors under a key into those given, on all ranks; return ``False`` if there are none.

        Args:
            key: the key.
            tensors: tensors by name.
            ranks: the processes that edit together.
            parts: by name, the part that a rank has of a tensor whose entries are of experts. A file always has those
                of all experts, so that it does not depend on the number of ranks that share them.
        """
        if ranks.rank == 0:
            remove_leftovers(self.folder)  # a run that finds all it needs writes nothing
        found = self._read(key, tensors, parts) if ranks.rank == 0 else None
        if not ranks.any(found is not None):
            return False
        for name, tensor in tensors.items():
            _part(parts, name).scatter(None if found is None else found[name], tensor, ranks)
        return True

    def save(
        self, key: str, tensors: Mapping[str, Tensor], ranks: Ranks, parts: Mapping[str, Part] | None = None
    ) -> None:
        """Write the first rank's tensors under a key, and the other ranks' parts of them; see :meth:`load`."""
        stored = {name: _part(parts, name).gather(tensor.detach(), ranks) for name, tensor in tensors.items()}
        if ranks.rank:
            return
        path = self._path(key)
        stored = {name: tensor.contiguous() for name, tensor in stored.items()}
        try:
            write_tensors(path, stored, {"format": FORMAT, "key": key, "checksum": _checksum(stored)})
            self._prune(path)
        except OSError as error:
            log.warning("second moments are not kept in %s: %s", self.folder, error)

    def drop(self, key: str, ranks: Ranks) -> None:
        """Remove the file of a key."""
        if ranks.rank == 0:
            with suppress(OSError):
                self._path(key).unlink(missing_ok=True)

    def _read(
        self, key: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Part] | None
    ) -> dict[str, Tensor] | None:
        path = self._path(key)
        try:
            if not path.exists():
                return None
            found, metadata = read_tensors(path, list(tensors), FORMAT, "second moments")
            expected = {name: (_part(parts, name).whole_shape(x), x.dtype) for name, x in tensors.items()}
            if any((found[name].shape, found[name].dtype) != form for name, form in expected.items()):
                raise ValueError(f"{path} holds second moments of other shapes")
            if (metadata.get("key"), metadata.get("checksum")) != (key, _checksum(found)):
                raise ValueError(f"{path} holds second moments of another key, or its checksum is wrong")
        except (OSError, ValueError, SafetensorError) as error:
            log.warning("%s is ignored, and computed again: %s", path, error)
            return None
        with suppress(OSError):  # a read-only folder will do
            path.touch()
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"moments-{key}.safetensors"

    def _prune(self, newest: Path) -> None:
        used = {path: path.stat().st_mtime for path in self.folder.glob("moments-*.safetensors") if path != newest}
        for path in sorted(used, key=used.__getitem__, reverse=True)[self.keep - 1 :]:
            path.unlink(missing_ok=True)


def _part(parts: Mapping[str, Part] | None, name: str) -> Part:
    return (parts or {}).get(name, Part())


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def moment_keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[ExpertLayer],
    texts: Sequence[str],
    max_length: int,
    gated: bool,
    ranks: Ranks,
) -> dict[int, str]:
    """Return a key for the second moments of each layer, by layer index.

    It is a digest of everything on which they depend: the model's config, its weights and buffers, the texts in their
    order, their truncation, the tokenizer, and whether keys are gated. Weights of layers above the layer, and its own
    down-projections, do not affect its keys, and are left out. The key does not depend on batches, the number of ranks
    or sharding either.
    """
    settle(model)
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    states = fingerprints(tensors, ranks)
    text = _text_state(tokenizer, texts, max_length)
    config = model.config.to_json_string(use_diff=False)
    keys = {}
    for layer in layers:
        unused = _unused(model, layer)
        used = sorted((name, state) for name, state in states.items() if id(tensors[name]) not in unused)
        keys[layer.index] = digest(FORMAT, layer.name, config, used, text, gated)
    return keys


def digest(*parts: Any) -> str:
    """Compute the SHA-256 digest of values that JSON can represent."""
    return sha256(json.dumps(parts).encode()).hexdigest()


def _unused(model: PreTrainedModel, layer: ExpertLayer) -> set[int]:
    """Return the ids of the tensors that do not affect a layer's keys."""
    stack = decoder_layers(model, layer)
    top = next(i for i, other in enumerate(stack) if other is layer.layer)

    def tensors(first: int, last: int) -> set[int]:
        return {id(x) for module in stack[first:last] for x in chain(module.parameters(), module.buffers())}

    own = {id(x) for name, x in layer.experts.named_parameters(recurse=False) if name.startswith("down_proj")}
    return (tensors(top + 1, len(stack)) - tensors(0, top + 1)) | own


def _text_state(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> str:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # left from the last call, and set again by the next one
    for name in ("truncation", "padding"):
        state.pop(name, None)
    # settings that are not in the state show in the tokens of some texts
    some = [encoding.ids for encoding in encode(tokenizer, texts[:32], [""] * len(texts[:32]))]
    return digest(state, some, max_length, list(texts))
