"""Checkpoints that Lightning wrote, read as data: nothing in them is executed, and weights stay in the files."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: says which file, which field of it, and what was expected."""


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


@dataclass(frozen=True)
class Checkpoint:
    """The state dict of a LightningModule, left in its files, and what the module was made with.

    Args:
        path: where it was read.
        tensors: by their names in the state dict.
        hyper_parameters: of the LightningModule; empty if it saved none.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of one process (a file) or of DeepSpeed (a folder).

    Trainable weights that ZeRO shards come from the fp32 master copies, all others as they are in training.

    Args:
        path: what ``Trainer.save_checkpoint`` wrote.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        CheckpointError: if something is missing, damaged, not understood, or does not agree with the rest.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    contents = _load(path)
    state = _get(path, contents, "state_dict", dict)
    hyper_parameters = _get(path, contents, "hyper_parameters", dict, default={})
    return Checkpoint(path, _as_they_are(state), hyper_parameters)


# -- files ------------------------------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    """The contents of a file of ``torch.save``, its tensors mapped and not loaded."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is not a file of torch.save, or only a part of one; nothing in it was executed")
    with torch.serialization.safe_globals(STAND_INS):
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            contents = None if unknown else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # there is no telling what a damaged or forged file raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"{path} cannot be read ({reason}); nothing in it was executed") from error
    if unknown:
        raise CheckpointError(
            f"{path} holds objects of {', '.join(sorted(unknown))}, which would have to be executed to read them; "
            "nothing was executed. Save plain data instead: numbers, texts, lists, dicts and tensors"
        )
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} should hold a dict, but holds a {type(contents).__name__}")
    return contents


def _get(path: Path, contents: Mapping[str, Any], name: str, kind: type | tuple[type, ...], **default: Any) -> Any:
    """A field of a file, checked for its type; ``default`` if it is missing or ``None``."""
    value = contents.get(name)
    if value is None and default:
        return default["default"]
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected, found = " or ".join(one.__name__ for one in kinds), type(value).__name__
        raise CheckpointError(f"{path}: field {name!r} should be a {expected}, but is {found}")
    return value


def _tensors(path: Path, name: str, values: Sequence[Any]) -> list[Tensor]:
    for value in values:
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: field {name!r} should hold tensors, but holds a {type(value).__name__}")
    return [value.detach().view(-1) for value in values]


def _shapes(path: Path, name: str, values: Any) -> dict[str, torch.Size]:
    if not isinstance(values, dict) or not all(isinstance(shape, torch.Size) for shape in values.values()):
        raise CheckpointError(f"{path}: field {name!r} should hold shapes by name")
    return dict(values)


def _as_they_are(state: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Whole tensors; a state dict may hold other things, too, but no weights in them."""
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    return {name: StoredTensor(value.shape, value.dtype, (value,)) for name, value in tensors.items()}


# -- the folder of DeepSpeed ------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> Checkpoint:
    folder = _newest(path)
    if any(folder.glob("*expert*_states.pt")):
        raise CheckpointError(f"{folder} holds experts of DeepSpeed's own MoE layers, which transformers does not know")
    files = _by_rank(folder, MODEL_FILE)
    if not files:
        raise CheckpointError(
            f"{folder} holds no file *_model_states.pt; expected is a checkpoint file of Lightning, or the folder that "
            "its DeepSpeedStrategy writes"
        )
    sharded = 0 in files and files[0].name.startswith("zero_")
    file = _of_all_ranks(folder, files, 1)[0]
    model = _load(file)
    working = _as_they_are(_get(file, model, "module", dict))
    hyper_parameters = _get(file, model, "hyper_parameters", dict, default={})
    groups = _get(file, model, "param_shapes", list, default=None)
    if groups is None:
        # stage 0: every rank has everything
        return Checkpoint(path, working, hyper_parameters)
    shapes = [_shapes(file, "param_shapes", group) for group in groups]
    optimizers = _optimizers(folder)
    if optimizers is None:
        return Checkpoint(path, working, hyper_parameters)
    if sharded:
        models = _models(folder, files, len(optimizers), model)
        buffers = _get(file, model, "buffer_names", list)
        tensors = {name: working[name] for name in buffers if name in working}
        tensors |= _frozen(models, working)
        tensors |= _joined(optimizers, shapes, working)
    else:
        tensors = {**working, **_concatenated(optimizers, shapes, working)}
    for alias, name in _get(file, model, "shared_params", dict, default={}).items():
        if name in tensors:
            tensors.setdefault(alias, tensors[name])
    return Checkpoint(path, tensors, hyper_parameters)


def _newest(path: Path) -> Path:
    """The folder inside of a checkpoint that DeepSpeed wrote last; the checkpoint itself if it names none."""
    latest = path / "latest"
    if not latest.is_file():
        return path
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    # a name, and not the way out of the checkpoint
    if tag in ("", ".", "..") or Path(tag).name != tag or not (path / tag).is_dir():
        raise CheckpointError(f"{latest} should name a folder beside it, but says {tag[:80]!r}")
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
            raise CheckpointError(f"{folder} holds files of two runs, {found[rank].name} and {path.name}; delete one's")
        found[rank] = path
    return found


def _of_all_ranks(folder: Path, files: Mapping[int, Path], count: int) -> list[Path]:
    """The files of ranks 0, 1, … in order."""
    some = next(iter(files.values())).name
    names = [re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", some) for rank in range(count)]
    missing = [name for rank, name in enumerate(names) if rank not in files]
    if missing:
        raise CheckpointError(f"{folder} is of {count} ranks, but lacks {', '.join(missing)}")
    return [files[rank] for rank in range(count)]


@dataclass(frozen=True)
class _Optimizer:
    """What one rank's file of DeepSpeed's optimizer says."""

    file: Path
    stage: int
    ranks: int
    masters: list[Tensor]
    paddings: list[list[int]]
    steps: set[float]


def _optimizers(folder: Path) -> list[_Optimizer] | None:
    """The files of all ranks in order; ``None`` if the optimizer does not share its work by ZeRO."""
    files = _by_rank(folder, OPTIMIZER_FILE)
    if not files:
        raise CheckpointError(f"{folder} lacks the master weights: zero_pp_rank_0_mp_rank_00_optim_states.pt and others")
    file = _of_all_ranks(folder, files, 1)[0]
    state = _get(file, _load(file), "optimizer_state_dict", dict)
    if "zero_stage" not in state:
        return None
    first = _optimizer(file)
    optimizers = [first, *(_optimizer(file) for file in _of_all_ranks(folder, files, first.ranks)[1:])]
    for other in optimizers[1:]:
        for name, what in (("stage", "ZeRO stage"), ("ranks", "number of ranks"), ("steps", "optimizer step")):
            mine, others = getattr(first, name), getattr(other, name)
            if mine != others:
                raise CheckpointError(
                    f"{other.file} does not belong to {first.file.name}: its {what} is {others}, and not {mine}"
                )
        if len(other.masters) != len(first.masters):
            raise CheckpointError(f"{other.file} holds {len(other.masters)} groups, not {len(first.masters)}")
    return optimizers


def _optimizer(file: Path) -> _Optimizer:
    state = _get(file, _load(file), "optimizer_state_dict", dict)
    stage = _get(file, state, "zero_stage", int)
    if "ds_zero_partition_groups" in state or stage not in (1, 2, 3):
        raise CheckpointError(f"{file}: shards of ZeRO stage {stage} in groups of ranks are not understood")
    counts = _get(file, state, "partition_count", (int, list))
    counts = counts if isinstance(counts, list) else [counts]
    if not counts or len(set(counts)) > 1 or not isinstance(counts[0], int) or counts[0] < 1:
        raise CheckpointError(f"{file}: field 'partition_count' should be one number of ranks, but is {counts}")
    name = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    masters = _tensors(file, name, _get(file, state, name, list))
    inner = _get(file, state, "optimizer_state_dict" if stage == 3 else "base_optimizer_state", (dict, list), default={})
    states = inner.get("state", {}).values() if isinstance(inner, dict) else inner
    steps = {float(one["step"]) for one in states if isinstance(one, dict) and "step" in one}
    return _Optimizer(
        file, stage, counts[0], masters, _get(file, state, "param_alignment_paddings", list, default=[]), steps
    )


def _models(folder: Path, files: Mapping[int, Path], ranks: int, first: dict[str, Any]) -> list[tuple[Path, Any]]:
    """The model files of all ranks, which stage 3 writes."""
    paths = _of_all_ranks(folder, files, ranks)
    models = [(paths[0], first), *((path, _load(path)) for path in paths[1:])]
    for path, model in models[1:]:
        for name in ("param_shapes", "frozen_param_shapes", "global_steps"):
            if model.get(name) != first.get(name):
                raise CheckpointError(f"{path} does not belong to {paths[0].name}: their fields {name!r} differ")
    return models


# -- putting shards together ------------------------------------------------------------------------------------------


def _runs(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[list[Tensor]]:
    """Cut flat tensors, laid end to end, into runs of the given sizes; a run is in one or more pieces."""
    index = start = 0
    for size in sizes:
        run = []
        while size:
            piece = tensors[index][start : start + size]
            run.append(piece)
            size, start = size - piece.numel(), start + piece.numel()
            if start == tensors[index].numel():
                index, start = index + 1, 0
        yield [piece for piece in run if piece.numel()]


def _joined(
    optimizers: Sequence[_Optimizer], groups: Sequence[dict[str, torch.Size]], working: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Stage 3: every parameter is cut in as many equal parts as there are ranks, the last of them padded."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    widths = [ceil(shape.numel() / len(optimizers)) for shape in shapes.values()]
    pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for optimizer in optimizers:
        _check_size(optimizer.file, sum(master.numel() for master in optimizer.masters), sum(widths), 0)
        for name, run in zip(shapes, _runs(optimizer.masters, widths), strict=True):
            pieces[name] += run
    return {name: _stored(name, shape, pieces[name], working) for name, shape in shapes.items()}


def _concatenated(
    optimizers: Sequence[_Optimizer], groups: Sequence[dict[str, torch.Size]], working: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Stages 1 and 2: all parameters of a group lie end to end, and the whole is cut in one part for each rank."""
    first, found = optimizers[0], {}
    if len(first.masters) != len(groups):
        raise CheckpointError(f"{first.file} holds {len(first.masters)} groups, but the model's file {len(groups)}")
    for index, shapes in enumerate(groups):
        numels = [shape.numel() for shape in shapes.values()]
        paddings = first.paddings[index] if first.paddings else [0] * len(numels)
        if not isinstance(paddings, list) or len(paddings) != len(numels):
            raise CheckpointError(f"{first.file}: field 'param_alignment_paddings' does not fit the model's parameters")
        sizes = [numel + padding for numel, padding in zip(numels, paddings, strict=True)]
        parts = [optimizer.masters[index] for optimizer in optimizers]
        # older versions leave the padding that makes the parts equal in the file
        _check_size(first.file, sum(part.numel() for part in parts), sum(sizes), 2 * len(parts))
        for (name, shape), run in zip(shapes.items(), _runs(parts, sizes), strict=True):
            if name in working and working[name].shape != shape:
                raise CheckpointError(f"{name} has shape {tuple(shape)} in the file of the model's parameters, but is {tuple(working[name].shape)}")
            found[name] = _stored(name, shape, run, working)
    return found


def _frozen(models: Sequence[tuple[Path, Any]], working: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Stage 3: parameters that no optimizer knows, cut as the others are; none if they were not saved."""
    file, first = models[0]
    shapes = _shapes(file, "frozen_param_shapes", _get(file, first, "frozen_param_shapes", dict, default={}))
    found = {}
    for name, shape in shapes.items():
        pieces = []
        for path, model in models:
            parts = _get(path, model, "frozen_param_fragments", dict)
            pieces += _tensors(path, "frozen_param_fragments", [parts.get(name)])
        _check_size(file, sum(piece.numel() for piece in pieces), shape.numel(), len(models))
        found[name] = _stored(name, shape, pieces, working)
    return found


def _stored(name: str, shape: torch.Size, pieces: Sequence[Tensor], working: Mapping[str, StoredTensor]) -> StoredTensor:
    """A tensor in pieces; the module holds at least a placeholder of the working copy's dtype."""
    dtype = working[name].dtype if name in working else pieces[0].dtype
    return StoredTensor(shape, dtype, pieces)


def _check_size(file: Path, found: int, expected: int, slack: int) -> None:
    if not expected <= found <= expected + slack:
        raise CheckpointError(f"{file} and those of the other ranks hold {found} numbers, but {expected} are expected")
