"""Fields of checkpoints, which are untrusted input: checked one by one, and named in errors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, the field and the expected value."""


def field(
    path: Path | str, contents: Mapping[str, Any], name: str, kind: type | tuple[type, ...], optional: bool = False
) -> Any:
    """Return a field of a file after checking its type; an optional field may be missing or ``None``."""
    value = contents.get(name)
    if not isinstance(value, kind) and not (optional and value is None):
        found = "missing" if name not in contents else f"a {type(value).__name__}"
        raise CheckpointError(f"{path}: field {name!r} should be a {_described(kind)}, but is {found}")
    return value


def check_fields(path: Path | str, contents: Mapping[str, Any], optional: Collection[str] = (), **shapes: Any) -> None:
    """Check fields of a file against their shapes: a type (or several), ``[shape]``, or ``{type of the keys: shape}``.

    Args:
        path: the file, or what messages name instead of one.
        contents: its fields.
        optional: names of the fields that may be missing or ``None``.
        shapes: by name.

    Raises:
        CheckpointError: naming the field and its shape.

    Example:
        >>> check_fields("a.ckpt", {"kept": True, "answers": {"a": [1, 2]}}, kept=bool, answers={str: [int]})
    """
    for name, shape in shapes.items():
        value = field(path, contents, name, type(shape) if isinstance(shape, dict | list) else shape, name in optional)
        if value is not None and not _fits(value, shape):
            raise CheckpointError(f"{path}: field {name!r} should be a {_described(shape)}")


def _fits(value: object, shape: Any) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        ((key, inner),) = shape.items()
        return isinstance(value, dict) and all(isinstance(k, key) and _fits(v, inner) for k, v in value.items())
    return isinstance(value, shape)


def _described(shape: Any) -> str:
    if isinstance(shape, list):
        return f"list of {_described(shape[0])}"
    if isinstance(shape, dict):
        ((key, inner),) = shape.items()
        return f"dict of {key.__name__} to {_described(inner)}"
    return " or ".join(kind.__name__ for kind in (shape if isinstance(shape, tuple) else (shape,)))


def differences(saved: Mapping[str, Any], used: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Describe settings that are in a checkpoint with another value than the one in use, one line for each.

    Settings that only one of them has, and names that begin with an underscore, are left out. Within a setting that is
    a mapping, such as a model's config, a key that only one of them has is told, because the other has its default.

    Example:
        >>> differences({"rate": 0.1, "sizes": {"a": 1, "b": 2}}, {"rate": 0.1, "sizes": {"a": 1, "b": 3}}, "--model.")
        ['--model.sizes.b: the checkpoint has 2, but 3 is used, as this run says']
        >>> differences({"sizes": {"a": 1}}, {"sizes": {"a": 1, "b": 3}})
        ['sizes.b: the checkpoint has its default, but 3 is used, as this run says']
    """
    lines = []
    for name in (name for name in used if name in saved and not str(name).startswith("_")):
        old, value = saved[name], used[name]
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            lines += _differences_within(old, value, f"{prefix}{name}.")
        elif not same_setting(old, value):
            lines.append(_difference(f"{prefix}{name}", f"{old!r}"[:80], f"{value!r}"[:80]))
    return lines


def _differences_within(saved: Mapping[str, Any], used: Mapping[str, Any], prefix: str) -> list[str]:
    lines = differences(saved, used, prefix)
    lines += [
        _difference(f"{prefix}{name}", "its default", f"{used[name]!r}"[:80]) for name in used if name not in saved
    ]
    return lines + [
        _difference(f"{prefix}{name}", f"{saved[name]!r}"[:80], "its default") for name in saved if name not in used
    ]


def _difference(name: str, saved: str, used: str) -> str:
    return f"{name}: the checkpoint has {saved}, but {used} is used, as this run says"


def same_setting(one: Any, other: Any) -> bool:
    """Compare two values of a setting; lists and tuples may be equal."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_setting, one, other))
    return bool(one == other)
