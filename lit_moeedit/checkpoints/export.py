"""The command ``export``: a checkpoint of a training run as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lit_moeedit.atomic_files import naming
from lit_moeedit.pretrained import brief
from lit_moeedit.sharding.loading import no_hoarding
from lit_moeedit.checkpoints.read import Checkpoint, read_checkpoint
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.tensors import StoredTensor, WeightFile

log = logging.getLogger(__name__)


def export(
    checkpoint: Path,
    output: Path,
    model: str | None = None,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str = "5GB",
    prefix: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of a training run as a folder that from_pretrained reads.

    Reads what Lightning saves, in one process or through DeepSpeed (ZeRO stages 0 to 3, without DeepSpeed itself), and
    writes safetensors in the weight format of the hub. Nothing in the checkpoint is executed. It goes weight by weight:
    memory is needed for the largest one and what it becomes in that format, whatever the size of the files.

    Args:
        checkpoint: a file or, of DeepSpeed, a folder that Lightning's Trainer saved.
        output: the folder to write; it appears when it is complete.
        model: local path or hub id of a model with the same config; by default the checkpoint says it.
        tokenizer: local path or hub id of the tokenizer to put beside the weights; by default the one in the checkpoint
            or, if there is none, that of the model the training started from.
        dtype: of the weights; by default that which they have in training.
        max_shard_size: size of the largest file, for example 500MB; a weight that is larger gets its own.
        prefix: of the model's weights in the checkpoint, for example "model."; by default it is found.
        overwrite: whether to replace an output that is there already.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if there is an output already.
        CheckpointError: if the checkpoint cannot be read, or is not of this model.
        ValueError: if an option is wrong.
        OSError: if the output cannot be written.

    Example:
        lit-moeedit export runs/checkpoints/last.ckpt my-model --dtype=bfloat16
    """
    checkpoint, output = checkpoint.resolve(), output.resolve()
    _check_output(checkpoint, output, overwrite)
    source = read_checkpoint(checkpoint)
    origin = model if model is not None else source.hyper_parameters.get("pretrained")
    skeleton = _skeleton(source, model)
    weights = _weights(source, skeleton, prefix)
    chosen = {name: _dtype(skeleton, name, weight, dtype) for name, weight in weights.items()}
    empty = {name: _empty(weight.shape, chosen[name]) for name, weight in weights.items()}
    with _appearing(output, overwrite) as folder, naming(output), no_hoarding():
        _save_config(skeleton, origin, chosen, folder)
        _save_tokenizer(tokenizer, source, origin, folder)
        files = _save_weights(skeleton, weights, empty, max_shard_size, folder)
    log.info("%s: %d parameters in %d file(s)", output, skeleton.num_parameters(), files)


# -- the model --------------------------------------------------------------------------------------------------------


def _skeleton(source: Checkpoint, path: str | None) -> PreTrainedModel:
    """The model without weights, made by nothing but the code of transformers."""
    saved = source.hyper_parameters.get("config")
    pretrained = source.hyper_parameters.get("pretrained")
    try:
        if path is None and isinstance(saved, Mapping) and isinstance(saved.get("model_type"), str):
            origin = f"the field 'hyper_parameters' of {source.path}"
            config = AutoConfig.for_model(**saved)
        elif path is not None or isinstance(pretrained, str):
            origin = str(path if path is not None else pretrained)
            config = AutoConfig.from_pretrained(origin, trust_remote_code=False)
        else:
            raise CheckpointError(
                f"{source.path}: field 'hyper_parameters' should have 'config' (with 'model_type') or 'pretrained', "
                f"but has {sorted(source.hyper_parameters)}; say with --model what model it is"
            )
        for part in (config, config.get_text_config()):
            # what was trained is neither quantised nor of code from elsewhere
            for name in ("quantization_config", "auto_map"):
                vars(part).pop(name, None)
        with torch.device("meta"):
            # implementations of attention can be code from the hub
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # there is no telling where a foreign config fails
        raise CheckpointError(
            f"no causal language model can be made of {origin}, or of what --model says: {brief(error)}"
        ) from error
    return model


def _weights(source: Checkpoint, skeleton: PreTrainedModel, prefix: str | None) -> dict[str, StoredTensor]:
    """The weights that are saved, by their names in the model."""
    known = {name: value for name, value in skeleton.state_dict().items() if isinstance(value, Tensor)}
    wanted = dict(known)
    for name in skeleton._keys_to_ignore_on_save or ():
        wanted.pop(name, None)
    wanted = remove_tied_weights_from_state_dict(wanted, skeleton)
    start = _prefix(source, list(wanted)) if prefix is None else prefix
    where = f"{source.path}, read as {type(skeleton).__name__} behind the prefix {start!r}"
    missing = [name for name in wanted if start + name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{where}: {_some(missing)} missing (frozen weights are, if they were excluded when it was saved)"
        )
    unknown = [name for name in source.tensors if name.startswith(start) and name[len(start) :] not in known]
    if unknown:
        raise CheckpointError(f"{where}: {_some(unknown)} not of that model; is it another one, or a prefix missing?")
    found = {name: source.tensors[start + name] for name in wanted}
    wrong = [
        f"{name} {tuple(weight.shape)} instead of {tuple(wanted[name].shape)}"
        for name, weight in found.items()
        if weight.shape != wanted[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{where}: {_some(wrong)} of another shape")
    return found


def _prefix(source: Checkpoint, wanted: list[str]) -> str:
    """What stands before the model's names in the checkpoint."""
    starts = {
        key.removesuffix(name) for name in wanted[:1] + wanted[-1:] for key in source.tensors if key.endswith(name)
    }
    counts = {
        start: sum(start + name in source.tensors for name in wanted)
        for start in sorted(starts)
        if start == "" or start.endswith(".")
    }
    best = [start for start, count in counts.items() if count == max(counts.values())]
    if len(best) > 1:
        raise CheckpointError(f"{source.path} holds several such models; say with --prefix which: {', '.join(best)}")
    return best[0] if best else ""


def _some(names: Sequence[str]) -> str:
    """A few of many names, with a verb behind them."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _dtype(skeleton: PreTrainedModel, name: str, weight: StoredTensor, dtype: str | None) -> torch.dtype:
    """The dtype of a weight in the output; what is no float stays, and what transformers keeps in float32."""
    if dtype is None or not weight.dtype.is_floating_point:
        return weight.dtype
    wanted = getattr(torch, dtype)
    kept = any(part in name for part in skeleton._keep_in_fp32_modules_strict or ())
    return torch.promote_types(weight.dtype, wanted) if kept else wanted


# -- what is written --------------------------------------------------------------------------------------------------


def _save_config(model: PreTrainedModel, origin: Any, chosen: Mapping[str, torch.dtype], folder: Path) -> None:
    dtype = next((one for one in chosen.values() if one.is_floating_point), torch.float32)
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if not model.can_generate():
        return
    try:
        settings = GenerationConfig.from_pretrained(origin) if isinstance(origin, str) else model.generation_config
    except OSError:
        settings = model.generation_config
    settings.save_pretrained(folder)


def _save_tokenizer(path: str | None, source: Checkpoint, origin: Any, folder: Path) -> None:
    """The tokenizer that is asked for, or else that of the checkpoint or of the model the training started from."""
    with tempfile.TemporaryDirectory() as own:
        for name, text in source.tokenizer.items():
            # whatever the checkpoint says, these are files in this folder and hold text
            if not isinstance(text, str) or not re.fullmatch(r"\w[\w-]*\.(json|txt|jinja)", str(name)):
                wrong = f"{str(name)[:80]!r} ({type(text).__name__})"
                raise CheckpointError(f"{source.path}: field 'tokenizer' should hold texts of files, but has {wrong}")
            (Path(own) / name).write_text(text, encoding="utf-8", errors="replace")
        wanted = path if path is not None else own if source.tokenizer else origin
        if not isinstance(wanted, str):
            log.info("no tokenizer is known, so none is written; --tokenizer says one")
            return
        try:
            tokenizer = AutoTokenizer.from_pretrained(wanted, trust_remote_code=False)
            # of a config alone transformers makes a tokenizer without a vocabulary
            if len(tokenizer) <= len(tokenizer.get_added_vocab()):
                raise ValueError("it has no vocabulary")
        except Exception as error:  # there is no telling where a foreign tokenizer fails
            if path is not None:
                raise ValueError(f"--tokenizer: {path} cannot be used: {brief(error)}") from error
            whose = "the checkpoint" if wanted == own else wanted
            log.warning("the tokenizer of %s is not written (%s); --tokenizer says another", whose, brief(error))
            return
        tokenizer.save_pretrained(folder)


def _save_weights(
    model: PreTrainedModel,
    weights: Mapping[str, StoredTensor],
    empty: Mapping[str, Tensor],
    max_shard_size: str,
    folder: Path,
) -> int:
    """Write the files one after the other, and an index if there are several; returns how many there are."""
    parts = _parts(model, empty)
    planned = {name: value for _, converted in parts for name, value in converted.items()}
    try:
        plan = split_torch_state_dict_into_shards(
            planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"max_shard_size should be a size such as 5GB or 500MB: {error}") from error
    files = {
        file: WeightFile(folder / file, {name: planned[name] for name in names})
        for file, names in plan.filename_to_tensors.items()
    }
    for part, _ in track(parts, description=f"Writing {len(files)} file(s)"):
        values = revert_weight_conversion(model, {name: weights[name].read(empty[name].dtype) for name in part})
        for name in list(values):
            files[plan.tensor_to_filename[name]].write(name, values.pop(name))
    if plan.is_sharded:
        totals = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = json.dumps({"metadata": totals, "weight_map": plan.tensor_to_filename}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")
    return len(files)


# -- the weight format of the hub -------------------------------------------------------------------------------------


def _parts(model: PreTrainedModel, empty: Mapping[str, Tensor]) -> list[tuple[list[str], dict[str, Tensor]]]:
    """Weights in parts, as small as can be, that can be converted one by one; and what each is converted to.

    Transformers converts a whole model: it splits the weights of a layer's experts, and in some families joins others.
    What belongs together is found by trying: weights alone, then layers, then all that is left.
    """
    whole = _converted(model, empty)
    left, parts = list(empty), []
    for belongs in (r".*", r".*?\.\d+(?=\.)", r""):
        groups: dict[str, list[str]] = {}
        for name in left:
            match = re.match(belongs, name)
            groups.setdefault(name if match is None else match[0], []).append(name)
        for group in groups.values():
            try:
                converted = _converted(model, {name: empty[name] for name in group})
            except Exception as error:  # what lacks its other parts fails in its own way
                log.debug("%s cannot be converted alone: %s", ", ".join(group), error)
                continue
            if all(name in whole and value.shape == whole[name].shape for name, value in converted.items()):
                parts.append((group, converted))
        done = {name for group, _ in parts for name in group}
        left = [name for name in left if name not in done]
    if left or sum(len(converted) for _, converted in parts) != len(whole):
        log.warning("the weights of %s can be converted only all at once, which needs memory", type(model).__name__)
        return [(list(empty), whole)]
    return parts


def _converted(model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What weights are saved as, by names; both without numbers."""
    converted = revert_weight_conversion(model, dict(values))
    return {name: _empty(value.shape, value.dtype) for name, value in converted.items()}


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# -- the folder -------------------------------------------------------------------------------------------------------


def _check_output(checkpoint: Path, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file and not a folder")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output} is not empty; --overwrite replaces it")
    if not (output / "config.json").is_file():
        raise FileExistsError(f"{output} is not replaced: it has no config.json, so it does not look like a model")
    if checkpoint.is_relative_to(output):
        raise FileExistsError(f"{output} is not replaced: the checkpoint {checkpoint} is in it")


@contextmanager
def _appearing(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the place of ``output`` when all in it is written, and is gone if that fails."""
    part, old = (output.with_name(f".{output.name}.{end}") for end in ("part", "old"))
    for rest in (part, old):
        if rest.exists():
            raise FileExistsError(f"{rest} is there: another export is at work, or one was killed; move it away")
    part.mkdir(parents=True)
    try:
        yield part
        if overwrite and output.exists():
            output.rename(old)
        # an empty folder gives way, too
        part.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
