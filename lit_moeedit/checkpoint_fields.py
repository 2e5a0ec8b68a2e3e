"""Fields of checkpoints, which are untrusted input: checked one by one, and named in errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: says which file, which field of it, and what was expected."""


def field(
    path: Path | str, contents: Mapping[str, Any], name: str, kind: type | tuple[type, ...], optional: bool = False
) -> Any:
    """A field of a file, checked for its type; an optional one may be missing or ``None``."""
    value = contents.get(name)
    if not isinstance(value, kind) and not (optional and value is None):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(one.__name__ for one in kinds)
        found = "missing" if name not in contents else f"a {type(value).__name__}"
        raise CheckpointError(f"{path}: field {name!r} should be a {expected}, but is {found}")
    return value
