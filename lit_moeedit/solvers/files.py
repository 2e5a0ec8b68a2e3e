"""Tensors in safetensors files that say what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_moeedit.files import appearing


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; the file appears complete or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with appearing(path) as beside:
        try:
            save_file(stored, beside, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_tensors(
    path: str | Path, names: Sequence[str], form: str, what: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`write_tensors` wrote: tensors and metadata.

    Args:
        path: the file.
        names: of the tensors that it must hold.
        form: what its metadata must have as ``format``.
        what: names the contents in an error.

    Raises:
        ValueError: if the file holds something else, or numbers that are not finite.
    """
    try:
        opened = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold {what}: not a safetensors file ({error})") from error
    with opened as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form or set(file.keys()) != set(names):
            raise ValueError(f"{path} does not hold {what}: expected {tuple(names)}, got {sorted(file.keys())}")
        tensors = {name: file.get_tensor(name) for name in names}
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(f"{path} does not hold {what}: {', '.join(wrong)} not finite")
    return tensors, metadata
