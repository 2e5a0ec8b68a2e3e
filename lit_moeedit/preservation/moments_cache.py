"""Second moments on disk: those of finished passes over text, and how far one came that was broken off."""

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
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.atomic_files import write_tensors
from lit_moeedit.data.encoding import encode
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import decoder_layers
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

FORMAT = "lit_moeedit.moments.1"


class MomentsCache:
    """A folder of tensors in safetensors files, each under a key that says all that they depend on.

    The first rank reads and writes.

    A file that is damaged, foreign or cannot be written costs a warning and the time to compute its contents again.
    Each file appears complete or not at all. While weights are trained, their keys change with every step, and what is
    kept of earlier steps serves only a run that resumes there; so the folder holds a bounded number of files, and the
    ones that were not used for longest go first.

    Args:
        folder: where; made when the first file is written. Several runs may share it, if they run one after the other.
        keep: the largest number of files (of one layer each, or of one pass that was broken off).
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

    def load(self, key: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> bool:
        """Fill in the tensors kept under a key, on all ranks; ``False``, with all as they were, if there are none."""
        found = ranks.any(ranks.rank == 0 and self._read(key, tensors))
        if found:
            ranks.broadcast(*tensors.values())
        return found

    def save(self, key: str, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Keep the first rank's tensors under a key."""
        if ranks.rank == 0:
            self._write(key, tensors)

    def drop(self, key: str, ranks: Ranks) -> None:
        """Remove what is kept under a key."""
        if ranks.rank == 0:
            with suppress(OSError):
                self._path(key).unlink(missing_ok=True)

    def _read(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        path, found = self._path(key), dict[str, Tensor]()
        try:
            if not path.exists():
                return False
            with safe_open(str(path), framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                problem = _problem(key, found, file.metadata() or {}, tensors)
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if problem:
            log.warning("%s is ignored, and computed again: %s", path, problem)
            return False
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
        with suppress(OSError):  # a folder that may only be read serves as well
            path.touch()
        return True

    def _write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(key)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            write_tensors(path, stored, {"format": FORMAT, "key": key, "checksum": _checksum(stored)})
            self._prune(path)
        except OSError as error:
            log.warning("second moments are not kept in %s: %s", self.folder, error)

    def _path(self, key: str) -> Path:
        return self.folder / f"moments-{key}.safetensors"

    def _prune(self, newest: Path) -> None:
        used = {path: path.stat().st_mtime for path in self.folder.glob("moments-*.safetensors") if path != newest}
        for path in sorted(used, key=used.__getitem__, reverse=True)[self.keep - 1 :]:
            path.unlink(missing_ok=True)


def _problem(key: str, found: Mapping[str, Tensor], metadata: Mapping[str, str], wanted: Mapping[str, Tensor]) -> str:
    """What is wrong with the contents of a file, if anything is."""
    shapes, expected = (
        {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} for tensors in (found, wanted)
    )
    if metadata.get("format") != FORMAT or metadata.get("key") != key:
        return "it is not a file of second moments under this key"
    if shapes != expected:
        return f"expected {expected}, got {shapes}"
    if metadata.get("checksum") != _checksum(found):
        return "its checksum is wrong"
    return "" if all(bool(tensor.isfinite().all()) for tensor in found.values()) else "it holds numbers not finite"


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
    """By layer index, a key of everything that the second moments of a layer depend on.

    These are the model's config; all its weights and buffers, but those of layers above and the layer's own
    down-projections, behind which its keys are not seen; the texts in their order, and how they are cut and tokenized;
    whether keys are gated.
    How they are batched, on how many ranks and how the weights are sharded does not matter.
    """
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
    """A key made of everything given."""
    return sha256(json.dumps(parts).encode()).hexdigest()


def _unused(model: PreTrainedModel, layer: ExpertLayer) -> set[int]:
    """Tensors without influence on a layer's keys."""
    stack = decoder_layers(model, layer)
    top = next(i for i, other in enumerate(stack) if other is layer.layer)

    def tensors(first: int, last: int) -> set[int]:
        return {id(x) for module in stack[first:last] for x in chain(module.parameters(), module.buffers())}

    own = {id(x) for name, x in layer.experts.named_parameters(recurse=False) if name.startswith("down_proj")}
    return (tensors(top + 1, len(stack)) - tensors(0, top + 1)) | own


def _text_state(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> str:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    # what the last call left behind, which the next one sets anew
    for name in ("truncation", "padding"):
        state.pop(name, None)
    # settings that are not in the state show in what it does
    some = [encoding.ids for encoding in encode(tokenizer, texts[:32], [""] * len(texts[:32]))]
    return digest(state, some, max_length, list(texts))
