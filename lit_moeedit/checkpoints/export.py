"""The command ``export``: conversion of a checkpoint to a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from lit_moeedit.atomic_files import atomic_folder
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.lora import lora_weights
from lit_moeedit.checkpoints.older_readers import add_older_spellings, add_older_tokenizer, write_card
from lit_moeedit.checkpoints.read import Checkpoint, check_counts, read_checkpoint
from lit_moeedit.checkpoints.tensors import Readable, WeightFile
from lit_moeedit.checkpoints.weights import find_weights, saved_weights
from lit_moeedit.sharding.loading import no_hoarding
from lit_moeedit.text import brief

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
    adapter: Literal["folded", "separate"] = "folded",
) -> None:
    """Write a checkpoint of a training run as a folder that from_pretrained reads.

    This reads what Lightning saves, in one process or through DeepSpeed (ZeRO stages 0 to 3, without DeepSpeed itself),
    and writes safetensors in the weight format of the hub. Nothing in the checkpoint is executed. Weights are converted
    one by one, so that memory is needed only for the largest one and its converted form.

    Args:
        checkpoint: a file that Lightning's Trainer saved or, for DeepSpeed, a folder.
        output: the folder to write. It appears when it is complete.
        model: local path or hub id of a model with the same config; by default the config in the checkpoint. A
            checkpoint of an adapter alone takes the other weights from it (by default from the model that the training
            started from), and memory for all of them.
        tokenizer: local path or hub id of the tokenizer to put beside the weights; by default the one in the checkpoint
            or, if it has none, that of the model that the training started from.
        dtype: dtype of the weights; by default the one they have in training.
        max_shard_size: maximum size of a file, for example 500MB. A larger weight gets its own file.
        prefix: prefix of the model's weights in the checkpoint, for example "model."; by default it is found.
        overwrite: whether to replace an existing output.
        adapter: for a run with LoRA adapters: "folded" adds them to the weights, "separate" leaves the weights as they
            are and writes the adapter into the folder "adapter" of the output, for PeftModel.from_pretrained.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        FileExistsError: if the output exists already.
        CheckpointError: if the checkpoint cannot be read, or is not of this model.
        ValueError: if an option is invalid.
        OSError: if the output cannot be written.

    Example:
        lit-moeedit export runs/checkpoints/last.ckpt my-model --dtype=bfloat16
    """
    checkpoint, output = checkpoint.resolve(), output.resolve()
    _check_output(checkpoint, output, overwrite)
    source = read_checkpoint(checkpoint)
    origin = model if model is not None else source.hyper_parameters.get("pretrained")
    skeleton = make_skeleton(source, model)
    lora = lora_weights(source, skeleton, prefix, origin)
    weights: Mapping[str, Readable]
    if lora is not None:
        weights = lora.folded() if adapter == "folded" else lora.base
    elif adapter == "separate":
        raise ValueError(f"--adapter: {checkpoint} has no adapter that could be separate")
    else:
        kind, known = type(skeleton).__name__, skeleton.state_dict().keys()
        weights = find_weights(source, kind, saved_weights(skeleton), known, prefix)
    empty = {
        name: torch.empty(weight.shape, dtype=_dtype(skeleton, name, weight, dtype), device="meta")
        for name, weight in weights.items()
    }
    with atomic_folder(output, overwrite) as folder, no_hoarding():
        _save_config(skeleton, origin, empty, folder)
        save_tokenizer(tokenizer, source, origin, folder)
        files = _save_weights(skeleton, weights, empty, max_shard_size, folder)
        if lora is not None and adapter == "separate":
            lora.save_adapter(folder / "adapter")
    log.info("%s: %d parameters in %d file(s)", output, skeleton.num_parameters(), files)


# -- the model --------------------------------------------------------------------------------------------------------


def make_skeleton(source: Checkpoint, path: str | None) -> PreTrainedModel:
    """Make the model without weights, from the code of transformers alone."""
    saved = source.hyper_parameters.get("config")
    pretrained = source.hyper_parameters.get("pretrained")
    try:
        if path is None and isinstance(saved, Mapping) and isinstance(saved.get("model_type"), str):
            origin = f"the field 'hyper_parameters' of {source.path}"
            check_counts(origin, saved, source.tensors)
            config = AutoConfig.for_model(**saved)
        elif path is not None or isinstance(pretrained, str):
            origin = str(path if path is not None else pretrained)
            check_counts(origin, PretrainedConfig.get_config_dict(origin)[0], source.tensors)
            config = AutoConfig.from_pretrained(origin, trust_remote_code=False)
        else:
            raise CheckpointError(
                f"{source.path}: field 'hyper_parameters' should have 'config' (with 'model_type') or 'pretrained', "
                f"but has {sorted(source.hyper_parameters)}; name the model with --model (edits autopsy: --base)"
            )
        for part in (config, config.get_text_config()):
            # the trained weights are not quantised, and no code of the hub is run
            for name in ("quantization_config", "auto_map"):
                vars(part).pop(name, None)
        with torch.device("meta"):
            # implementations of attention can be code from the hub
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", trust_remote_code=False
            )
    except CheckpointError:
        raise
    except Exception as error:  # a config of others may fail anywhere
        raise CheckpointError(f"no causal language model can be made of {origin} or --model: {brief(error)}") from error
    return model


def _dtype(skeleton: PreTrainedModel, name: str, weight: Readable, dtype: str | None) -> torch.dtype:
    """Return the dtype of a weight in the output. Integers keep theirs, and so do weights that must be float32."""
    if dtype is None or not weight.dtype.is_floating_point:
        return weight.dtype
    wanted = getattr(torch, dtype)
    kept = any(part in name for part in skeleton._keep_in_fp32_modules_strict or ())
    return torch.promote_types(weight.dtype, wanted) if kept else wanted


# -- the output -------------------------------------------------------------------------------------------------------


def _save_config(model: PreTrainedModel, origin: Any, empty: Mapping[str, Tensor], folder: Path) -> None:
    dtype = next((weight.dtype for weight in empty.values() if weight.is_floating_point()), torch.float32)
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    lost = add_older_spellings(folder, model.config)
    if lost:
        log.info("this family's config has no spelling for transformers < 5 of %s; README.md says so", ", ".join(lost))
        write_card(folder, lost)
    if not model.can_generate():
        return
    try:
        settings = GenerationConfig.from_pretrained(origin) if isinstance(origin, str) else model.generation_config
    except OSError:
        settings = model.generation_config
    settings.save_pretrained(folder)


def save_tokenizer(path: str | None, source: Checkpoint, origin: Any, folder: Path) -> None:
    """Save the given tokenizer, or else that of the checkpoint or of the model that the training started from."""
    with tempfile.TemporaryDirectory() as own:
        for name, text in source.tokenizer.items():
            # names are untrusted: only text files directly in this folder are written
            if not isinstance(text, str) or not re.fullmatch(r"\w[\w-]*\.(json|txt|jinja)", str(name)):
                wrong = f"{str(name)[:80]!r} ({type(text).__name__})"
                raise CheckpointError(f"{source.path}: field 'tokenizer' should hold texts of files, but has {wrong}")
            (Path(own) / name).write_text(text, encoding="utf-8", errors="replace")
        wanted = path if path is not None else own if source.tokenizer else origin
        if not isinstance(wanted, str):
            log.info("no tokenizer is known, so none is written; give one with --tokenizer")
            return
        try:
            tokenizer = AutoTokenizer.from_pretrained(wanted, trust_remote_code=False)
            # from a config alone transformers makes a tokenizer without a vocabulary
            if len(tokenizer) <= len(tokenizer.get_added_vocab()):
                raise ValueError("it has no vocabulary")
        except Exception as error:  # a tokenizer of others may fail anywhere
            if path is not None:
                raise ValueError(f"--tokenizer: {path} cannot be used: {brief(error)}") from error
            whose = "the checkpoint" if wanted == own else wanted
            log.warning("the tokenizer of %s is not written (%s); give another with --tokenizer", whose, brief(error))
            return
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # tokenizers has no class for a full disk
            raise OSError(f"the tokenizer cannot be written: {brief(error)}") from error
        add_older_tokenizer(folder, tokenizer)


def _save_weights(
    model: PreTrainedModel,
    weights: Mapping[str, Readable],
    empty: Mapping[str, Tensor],
    max_shard_size: str,
    folder: Path,
) -> int:
    """Write the files one after the other, with an index if there are several; returns their number."""
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
    """Split the weights into the smallest parts that can be converted alone, each with the result as meta tensors.

    Transformers converts a whole model. It splits the weights of a layer's experts, and in some families joins others.
    The parts are found by trying: single weights, then layers, then all weights that are left.
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
            except Exception as error:  # an incomplete part may fail anywhere
                log.debug("%s cannot be converted alone: %s", ", ".join(group), error)
                continue
            if all(name in whole and value.shape == whole[name].shape for name, value in converted.items()):
                parts.append((group, converted))
        done = {name for group, _ in parts for name in group}
        left = [name for name in left if name not in done]
    if left or sum(len(converted) for _, converted in parts) != len(whole):
        log.warning(
            "the weights of %s can only be converted all at once, which needs memory for all of them",
            type(model).__name__,
        )
        return [(list(empty), whole)]
    return parts


def _converted(model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert meta tensors of weights to meta tensors of the hub's format, by names."""
    converted = revert_weight_conversion(model, dict(values))
    # a view would count with the whole tensor that it is of
    return {name: torch.empty_like(value) for name, value in converted.items()}


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
