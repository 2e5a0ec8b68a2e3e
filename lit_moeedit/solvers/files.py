"""Tensors in safetensors files that say what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata; the file appears complete or not at all."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, beside, metadata=dict(metadata))
    beside.replace(path)


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
        ValueError: if the file holds something else.
    """
    try:
        opened = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} does not hold {what}: not a safetensors file ({error})") from error
    with opened as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form or set(file.keys()) != set(names):
            raise ValueError(f"{path} does not hold {what}: expected {tuple(names)}, got {sorted(file.keys())}")
        return {name: file.get_tensor(name) for name in names}, metadata
