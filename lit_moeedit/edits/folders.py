"""Models as local folders of ``from_pretrained``, read without running code that comes with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_moeedit.atomic_files import atomic_folder
from lit_moeedit.edits.edit import Edit
from lit_moeedit.edits.files import save_edit
from lit_moeedit.pretrained import as_value_error
from lit_moeedit.text import first_few

EDITS = "edits"
"""Folder of the edits in a model's folder."""
MAX_COPIED = 2**28
"""Maximum size in bytes of a tokenizer's file; that of the largest vocabularies is below 2²⁵."""
_TOKENIZER = (
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.*",
    "*token*.json",
    "chat_template*",
    "preprocessor_config.json",
)


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a causal language model from a local folder, in safetensors.

    Args:
        folder: the folder.
        dtype: dtype of the weights; by default the one in the folder.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no ``config.json``.
        ValueError: if it cannot be loaded, or lacks weights.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        raise FileNotFoundError(f"{root} has no config.json: expected a local folder that from_pretrained reads")
    if not any(root.glob("*.safetensors")):
        raise FileNotFoundError(f"{root} has no weights in safetensors; other formats are not read")
    with as_value_error(f"the model in {root} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            root,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise ValueError(f"weights are missing: {first_few(missing)}")
    model.eval()
    return model


@contextmanager
def new_folder(output: Path, overwrite: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder to fill, which appears at ``output`` when it is complete.

    Raises:
        FileExistsError: if there is something that must not be replaced.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file and not a folder")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{output} is not empty; --overwrite replaces it")
        if not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileExistsError(f"{output} is not replaced: it has no config, so it does not look like a model")
        inside = [source for source in sources if source.resolve().is_relative_to(output)]
        if inside:
            raise FileExistsError(f"{output} is not replaced: {inside[0]}, which is read, is in it")
    with atomic_folder(output, overwrite) as beside:
        yield beside


def save_model(model: PreTrainedModel, origin: Path, edits: Sequence[Edit], folder: Path) -> None:
    """Write a model, the tokenizer files of the folder that it was loaded from, and the edits in its weights."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(f"the model cannot be written: {error}") from error
    for path in sorted({path for pattern in _TOKENIZER for path in origin.glob(pattern)}):
        # what a link leads to may be a device
        if path.is_file() and path.stat().st_size <= MAX_COPIED and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    for edit in edits:
        save_edit(edit, folder / EDITS)
