"""Models as local folders of ``from_pretrained``, read without running code that comes with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lit_moeedit.atomic_files import atomic_folder
from lit_moeedit.edits.card import CardRow, write_card
from lit_moeedit.edits.edit import Edit
from lit_moeedit.edits.files import save_edit
from lit_moeedit.edits.stored import EDITS, INDEX, StoredModel, copy_file
from lit_moeedit.pretrained import as_value_error
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)


def load_model(
    folder: str | Path | StoredModel, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """Load a language model from a local folder, in safetensors, without running code that comes with it.

    The class is the one that the config names, so that a model with an image encoder keeps its language model.

    Args:
        folder: the folder.
        dtype: dtype of the weights; by default the one of the files.
        device: the device to load it to; by default the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no ``config.json`` or no weights.
        ValueError: if it cannot be loaded, or lacks weights.
    """
    stored = folder if isinstance(folder, StoredModel) else StoredModel(folder)
    root = stored.folder
    with as_value_error(f"the model in {root} cannot be loaded"):
        config = AutoConfig.from_pretrained(root, trust_remote_code=False, local_files_only=True)
        loaded: Any = _model_class(config).from_pretrained(
            root,
            dtype=stored.dtype if dtype is None else dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model: PreTrainedModel = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise ValueError(f"weights are missing: {first_few(missing)}")
    model.eval()
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def _model_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that a config names, if it generates text; else the one for its type."""
    for name in config.architectures or ():
        found = getattr(transformers, str(name), None) if str(name).isidentifier() else None
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.can_generate():
            return found
    return AutoModelForCausalLM


@contextmanager
def new_folder(output: Path, overwrite: bool, sources: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder to fill, which appears at ``output`` when it is complete.

    Raises:
        FileExistsError: if there is something that must not be replaced.
    """
    output = output.resolve()
    check_output(output, overwrite, sources)
    with atomic_folder(output, overwrite) as beside:
        yield beside


def check_output(output: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Check that a folder can be written, and that nothing is lost by that.

    Raises:
        FileExistsError: if there is something that must not be replaced.
    """
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


def save_model(
    stored: StoredModel,
    model: PreTrainedModel,
    changed: Iterable[str],
    edits: Sequence[Edit],
    folder: Path,
    report: Callable[[int, int], object] = lambda done, total: None,
    rows: Sequence[CardRow] = (),
    base: Path | None = None,
) -> None:
    """Write a copy of a model's folder with some weights of the model in memory, the edits in its weights, and a card.

    Everything else is copied byte by byte. Where a family's weights cannot be converted one by one, all are written
    anew.

    Args:
        stored: the folder that the model was loaded from.
        model: the model, in the dtype of the files.
        changed: names of the parameters to take from it.
        edits: the edits that are in its weights now.
        folder: the folder to fill.
        report: called with the number of files copied, and their total number.
        rows: facts for the card, see :func:`~lit_moeedit.edits.card.write_card`.
        base: folder of the unedited model, if it is not that of ``stored``.
    """
    changed = list(changed)
    stored.check_dtype(model, changed)
    try:
        for name in changed:
            stored.converted(model, name)
    except ValueError as error:
        log.warning("all weights are written anew: %s", error)
        try:
            model.save_pretrained(folder)
        except SafetensorError as failure:  # of a full disk, too
            raise OSError(f"the model cannot be written: {failure}") from failure
        for name in stored.other_files():
            if name != INDEX and not (folder / name).exists():
                copy_file(stored.folder, folder, name)
    else:
        stored.copy(folder, (stored.converted(model, name) for name in changed), report)
    write_card(folder, stored.folder, edits, rows, base)
    for edit in edits:
        if not (folder / EDITS / edit.name).exists():
            save_edit(edit, folder / EDITS)
