"""Readers of Lightning's checkpoints: a file of one process, or a folder of DeepSpeed with the shards of all ranks."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, field
from lit_moeedit.checkpoints.distributed_folder import (
    FIELDS,
    METADATA,
    check_distributed,
    is_distributed,
    read_distributed,
)
from lit_moeedit.checkpoints.tensors import Readable, StoredTensor, as_they_are, shapes_in, tensors_in
from lit_moeedit.checkpoints.torch_file import Piece, TorchFile

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

COUNTS = re.compile(r"(^|_)(num|n|number)_.*(layer|block|expert|label|head|group)|layers$|depth")
"""Settings of configs that give the number of modules, or of entries of the config."""
MIN_COUNT = 1000
"""Number that any config may have, since a model of that many layers is made within seconds."""


@dataclass(frozen=True)
class Checkpoint:
    """The state dict of a LightningModule, mapped from its files, and the module's settings.

    Attributes:
        path: path of the checkpoint.
        tensors: the tensors of the state dict.
        hyper_parameters: hyperparameters of the LightningModule; empty if it saved none.
        tokenizer: texts of a tokenizer's files by name, as ``LitMoE`` saves it; empty if there is none.
        callbacks: states of callbacks by their keys; empty if there are none.
    """

    path: Path
    tensors: Mapping[str, Readable]
    hyper_parameters: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    callbacks: Mapping[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of one process (a file), or of DeepSpeed or FSDP2 (a folder).

    Trainable weights that ZeRO shards are read from the float32 master weights, all others from the model weights.

    Args:
        path: path that was given to ``Trainer.save_checkpoint``.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        CheckpointError: if something is missing, damaged, not supported, or inconsistent with the rest.
    """
    if is_distributed(path):
        weights, contents = read_distributed(path)
        return _checkpoint(path, weights, path / FIELDS, contents)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    file = TorchFile(path)
    contents = file.read()
    return _checkpoint(path, as_they_are(file, field(path, contents, "state_dict", dict)), path, contents)


def check_harmless(path: Path) -> None:
    """Refuse a checkpoint that Lightning or DeepSpeed could not read as plain data.

    Lightning can be told to read files as plain data. DeepSpeed runs any code in the files of its folders.

    Args:
        path: a file, or a folder of DeepSpeed.

    Raises:
        CheckpointError: if code would have to run to read it, if it is missing, damaged or not a checkpoint, or if
            there is a link in its folder.
        OSError: if a folder in it cannot be listed.
    """
    if not path.is_dir():
        field(
            path, TorchFile(path).read(), "state_dict", dict
        )  # other fields are checked by the module that reads them
        return
    for folder, folders, files in os.walk(path, onerror=_raised):
        for inner in (Path(folder, name) for name in sorted(folders + files)):
            # DeepSpeed would follow it to files that are not checked here, or that change later
            if inner.is_symlink():
                raise CheckpointError(f"{inner} is a link; expected a checkpoint with all its files in it")
            if inner.name.endswith(METADATA) and inner != path / METADATA:
                raise CheckpointError(f"{inner} is a pickle; only the file {METADATA} of FSDP2's folder may be one")
            if inner.suffix == ".pt" and not inner.is_dir():
                TorchFile(inner).check_plain()
    if is_distributed(path):
        check_distributed(path)
    for name in ("latest", "latest_universal"):
        _named_in(path, name)


def check_undamaged(path: Path, rank: int = 0) -> None:
    """Check all that a rank reads of a checkpoint against the checksums in its files.

    Args:
        path: a file, or a folder of DeepSpeed.
        rank: the rank. The shards of others in a folder are left to them.

    Raises:
        CheckpointError: if a record is damaged; the message names it.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.pt"))
    for file in files:
        own = re.search(r"zero_pp_rank_(\d+)_", file.name)
        # older files, which are no archives, have no checksums
        if (own is None or int(own[1]) == rank) and zipfile.is_zipfile(file):
            TorchFile(file).verify_all()


def check_counts(path: Path | str, config: Mapping[str, Any], tensors: Mapping[str, Readable]) -> None:
    """Refuse a model's config with many more layers or experts than its checkpoint, before a model is made of it.

    Args:
        path: where the config is, for errors.
        config: keys of a config of transformers.
        tensors: the tensors of the checkpoint.

    Raises:
        CheckpointError: naming the key.
    """
    largest = max((stored.shape[0] for stored in tensors.values() if stored.shape), default=0)
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_counts(path, value, tensors)
            continue
        count = value if isinstance(value, int) and COUNTS.search(str(key)) else 0
        # some families have a type for each layer, in a list or as a letter in a text, and no number of layers
        if isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in str(key)):
            count = len(value)
        if count > max(MIN_COUNT, len(tensors), largest):
            raise CheckpointError(
                f"{path}: the config has {key} {count:,}, but the checkpoint holds only {len(tensors):,} tensors"
            )


def _raised(error: OSError) -> None:
    raise error


def _checkpoint(path: Path, tensors: Mapping[str, Readable], file: Path, contents: Mapping[str, Any]) -> Checkpoint:
    """Put together a checkpoint of its tensors and, from one of its files, the fields that describe the model."""
    names = ("hyper_parameters", "tokenizer", "callbacks")
    return Checkpoint(path, tensors, *(field(file, contents, name, dict, optional=True) or {} for name in names))


# -- the folder of DeepSpeed ------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> Checkpoint:
    folder = _named_in(path, "latest")
    if any(folder.glob("*expert*_states.pt")):
        raise CheckpointError(f"{folder} holds experts of DeepSpeed's own MoE layers, which transformers does not have")
    files = _by_rank(folder, MODEL_FILE)
    if not files:
        raise CheckpointError(
            f"{folder} holds no file *_model_states.pt; expected is a checkpoint file of Lightning, or the folder that "
            "its DeepSpeedStrategy writes"
        )
    [file] = _of_ranks(folder, files, 1)
    opened = TorchFile(file)
    model = opened.read()
    weights = as_they_are(opened, field(file, model, "module", dict))
    groups = field(file, model, "param_shapes", list, optional=True)
    # without ZeRO every rank holds all weights
    optimizers = [] if groups is None else _optimizers(folder)
    if not optimizers:
        return _checkpoint(path, weights, file, model)
    stage = optimizers[0].stage
    if (stage == 3) != file.name.startswith("zero_"):
        raise CheckpointError(f"{optimizers[0].file} is of ZeRO stage {stage}, which does not go with {file.name}")
    shapes = [shapes_in(file, "param_shapes", group) for group in groups]
    if stage == 3:
        models = _models(folder, files, len(optimizers), opened, model)
        buffers = field(file, model, "buffer_names", list)
        tensors = {name: weights[name] for name in map(str, buffers) if name in weights}
        tensors |= _frozen(models, weights) | _joined(optimizers, shapes, weights)
    else:
        tensors = weights | _concatenated(optimizers, shapes, weights)
    aliases = field(file, model, "shared_params", dict, optional=True) or {}
    tensors |= {str(alias): tensors[str(name)] for alias, name in aliases.items() if str(name) in tensors}
    return _checkpoint(path, tensors, file, model)


def _named_in(path: Path, name: str) -> Path:
    """Return the folder that a file of DeepSpeed's checkpoint names, or the checkpoint itself without such a file."""
    latest = path / name
    if not latest.is_file():
        return path
    with latest.open(encoding="utf-8", errors="replace") as file:
        tag = file.read(1000).strip()
    # a plain name, no path out of the checkpoint
    if tag in ("", ".", "..") or Path(tag).name != tag or len(tag) > 200 or not (path / tag).is_dir():
        raise CheckpointError(f"{latest} should name a folder beside it, but holds {tag[:80]!r}")
    return path / tag


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2]) != 0:
            raise CheckpointError(f"{path} is of a model in several tensor-parallel parts, which cannot be exported")
        rank = int(match[1] or 0)
        if rank in found:
            raise CheckpointError(f"{folder} holds files of two runs: {found[rank].name} and {path.name}")
        found[rank] = path
    return found


def _of_ranks(folder: Path, files: Mapping[int, Path], count: int) -> list[Path]:
    """Return the files of the first ``count`` ranks in order."""
    some = next(iter(files.values())).name
    missing = (re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", some) for rank in range(count) if rank not in files)
    names = list(islice(missing, 5))
    if names:
        raise CheckpointError(f"{folder} is of {count} rank(s), but lacks {', '.join(names)}")
    return [files[rank] for rank in range(count)]


@dataclass(frozen=True)
class _Optimizer:
    """Contents of one rank's optimizer file."""

    file: Path
    stage: int
    ranks: int
    masters: list[Piece]
    paddings: list[list[int]]
    steps: set[float]


def _optimizers(folder: Path) -> list[_Optimizer]:
    """Read the optimizer files of all ranks, in order; empty if the optimizer is not sharded by ZeRO."""
    files = _by_rank(folder, OPTIMIZER_FILE)
    if not files:
        raise CheckpointError(f"{folder} lacks the files *_optim_states.pt, which hold the master weights of all ranks")
    [file] = _of_ranks(folder, files, 1)
    first = _optimizer(file)
    if first is None:
        return []
    found = [first]
    for file in _of_ranks(folder, files, first.ranks)[1:]:
        other = _optimizer(file)
        for name, what in (("stage", "ZeRO stage"), ("ranks", "number of ranks"), ("steps", "optimizer step")):
            mine, others = getattr(first, name), getattr(other, name, None)
            if mine != others:
                raise CheckpointError(f"{file} does not belong to {first.file.name}: {what} {others}, not {mine}")
        assert other is not None
        if len(other.masters) != len(first.masters):
            raise CheckpointError(f"{file} holds {len(other.masters)} groups of weights, not {len(first.masters)}")
        found.append(other)
    return found


def _optimizer(file: Path) -> _Optimizer | None:
    opened = TorchFile(file)
    state = field(file, opened.read(), "optimizer_state_dict", dict)
    stage = field(file, state, "zero_stage", int, optional=True)
    if stage is None:
        return None
    if stage not in (1, 2, 3) or "ds_zero_partition_groups" in state:
        raise CheckpointError(f"{file}: shards of ZeRO stage {stage} in groups of ranks are not supported")
    counts = field(file, state, "partition_count", (int, list))
    counts = counts if isinstance(counts, list) else [counts]
    if not counts or any(not isinstance(count, int) or count < 1 or count != counts[0] for count in counts):
        raise CheckpointError(f"{file}: field 'partition_count' should be a number of ranks, but is {counts}")
    name = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    masters = tensors_in(opened, name, field(file, state, name, list))
    paddings = field(file, state, "param_alignment_paddings", list, optional=True) or []
    inner = state.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    states = inner.get("state") if isinstance(inner, dict) else inner
    states = states.values() if isinstance(states, dict) else states or []
    steps = (one.get("step") for one in states if isinstance(one, dict))
    numbers = {
        float(step) for step in steps if isinstance(step, int | float | Tensor) and torch.as_tensor(step).ndim == 0
    }
    return _Optimizer(file, stage, counts[0], masters, paddings, numbers)


def _models(
    folder: Path, files: Mapping[int, Path], ranks: int, opened: TorchFile, first: dict[str, Any]
) -> list[tuple[TorchFile, dict[str, Any]]]:
    """Read the model files of all ranks, which stage 3 writes."""
    others = [TorchFile(path) for path in _of_ranks(folder, files, ranks)[1:]]
    models = [(opened, first), *((file, file.read()) for file in others)]
    for file, model in models[1:]:
        for name in ("param_shapes", "frozen_param_shapes", "global_steps"):
            if model.get(name) != first.get(name):
                raise CheckpointError(
                    f"{file.path} does not belong to {opened.path.name}: their fields {name!r} differ"
                )
    return models


# -- putting shards together ------------------------------------------------------------------------------------------


def _runs(tensors: Sequence[Piece], sizes: Sequence[int]) -> Iterator[list[Piece]]:
    """Cut flat tensors, laid end to end, into ranges of the given sizes, each of one or more pieces."""
    index = start = 0
    for size in sizes:
        run = []
        while size:
            piece = tensors[index].part(start, start + size)
            size, start = size - piece.numel(), start + piece.numel()
            if start == tensors[index].numel():
                index, start = index + 1, 0
            run += [piece] if piece.numel() else []
        yield run


def _joined(
    optimizers: Sequence[_Optimizer], groups: Sequence[dict[str, torch.Size]], weights: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Join the shards of stage 3, which cuts each parameter into equal parts, one per rank, the last one padded."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    widths = [ceil(shape.numel() / len(optimizers)) for shape in shapes.values()]
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for optimizer in optimizers:
        _check_size(optimizer.file, "fp32_flat_groups", optimizer.masters, sum(widths))
        for name, run in zip(shapes, _runs(optimizer.masters, widths), strict=True):
            pieces[name] += run
    return {name: _stored(name, shape, pieces[name], weights) for name, shape in shapes.items()}


def _concatenated(
    optimizers: Sequence[_Optimizer], groups: Sequence[dict[str, torch.Size]], weights: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Join the shards of stages 1 and 2, which lay a group's parameters end to end and cut that into equal parts."""
    first, found = optimizers[0], {}
    if len(first.masters) != len(groups):
        raise CheckpointError(f"{first.file} holds {len(first.masters)} groups of weights, the model's {len(groups)}")
    for index, shapes in enumerate(groups):
        numels = [shape.numel() for shape in shapes.values()]
        paddings = first.paddings[index] if index < len(first.paddings) else [0] * len(numels)
        if len(paddings) != len(numels) or not all(isinstance(n, int) and n >= 0 for n in paddings):
            raise CheckpointError(f"{first.file}: field 'param_alignment_paddings' does not fit the model's parameters")
        sizes = [numel + padding for numel, padding in zip(numels, paddings, strict=True)]
        parts = [optimizer.masters[index] for optimizer in optimizers]
        # some versions save the padding that makes the parts equal
        _check_size(first.file, "single_partition_of_fp32_groups", parts, sum(sizes), 2 * len(parts))
        for (name, shape), run in zip(shapes.items(), _runs(parts, sizes), strict=True):
            found[name] = _stored(name, shape, run, weights)
    return found


def _frozen(models: Sequence[tuple[TorchFile, Any]], weights: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Join the shards of stage 3 of frozen parameters, cut as the others are; none if they were not saved."""
    file, first = models[0]
    shapes = shapes_in(file.path, "frozen_param_shapes", first.get("frozen_param_shapes") or {})
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for file, model in models if shapes else ():
        fragments = field(file.path, model, "frozen_param_fragments", dict)
        for name, shape in shapes.items():
            fragment = tensors_in(file, "frozen_param_fragments", [fragments.get(name)])
            _check_size(file.path, "frozen_param_fragments", fragment, ceil(shape.numel() / len(models)))
            pieces[name] += fragment
    return {name: _stored(name, shape, pieces[name], weights) for name, shape in shapes.items()}


def _stored(name: str, shape: torch.Size, pieces: Sequence[Piece], weights: Mapping[str, StoredTensor]) -> StoredTensor:
    """Return a tensor in pieces, with the dtype of the model weights, of which there is at least a placeholder."""
    dtype = weights[name].dtype if name in weights else next((piece.tensor.dtype for piece in pieces), torch.float32)
    return StoredTensor(shape, dtype, pieces)


def _check_size(file: Path, name: str, tensors: Sequence[Piece], expected: int, slack: int = 0) -> None:
    found = sum(tensor.numel() for tensor in tensors)
    if not expected <= found <= expected + slack:
        raise CheckpointError(f"{file}: field {name!r} holds {found} elements, but {expected} are expected")
