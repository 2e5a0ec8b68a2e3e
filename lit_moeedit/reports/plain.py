"""Dataclasses as plain JSON values, and back with checks of every field: reports on a disk are untrusted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from lit_moeedit.checkpoint_fields import CheckpointError

MAX_DEPTH = 20
"""Maximum depth of nested settings."""

_MAX_INT = 2**53
"""Integers up to this one are the same in every reader of JSON."""

_INTEGER = re.compile(r"-?[0-9]{1,16}")
"""A key of a dict of integers; in JSON it is a text."""

_NAMES = {float: "a number", int: "an integer", bool: "true or false", str: "a text", datetime: "a time in ISO 8601"}


def to_plain(value: Any) -> Any:
    """Convert a value to JSON types; a number that is not finite becomes ``None``.

    Example:
        >>> to_plain({3: (1, float("nan"))})
        {'3': [1, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_plain(kind: Any, value: object, where: str) -> Any:
    """Make a value of a type from JSON types.

    Args:
        kind: The type: a dataclass, a type of JSON, ``datetime``, a union, a ``Literal``, or a tuple or dict of these.
            A ``float`` may be ``None`` in JSON, which is NaN.
        value: The value.
        where: Name of the value, for errors.

    Raises:
        ValueError: If the value does not have the type. The message names the field and what was expected.

    Example:
        >>> from_plain(dict[int, tuple[float, ...]], {"3": [1, None]}, "report")
        {3: (1.0, nan)}
        >>> from_plain(dict[str, int], {"layers": "3"}, "report")
        Traceback (most recent call last):
        ValueError: report.layers should be an integer, but is '3'
    """
    if kind is Any:
        return _any(value, where, MAX_DEPTH)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else from_plain(inner, value, where)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise ValueError(f"{where} should be one of {', '.join(arguments)}, but is {_described(value)}")
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict:
        return _dict(arguments[0], arguments[1], value, where)
    return _scalar(kind, value, where)


def restored(kind: Any, state: object, where: str) -> Any:
    """Make a dataclass of a part of a checkpoint, as :func:`from_plain` does.

    Raises:
        CheckpointError: naming the field that is not as it should be.
    """
    try:
        return from_plain(kind, state, where)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _dataclass(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} should be an object, but is {_described(value)}")
    known = {field.name: field for field in fields(kind)}
    unknown = [str(name)[:40] for name in value if name not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown field {unknown[0]!r}; expected {', '.join(known)}")
    required = {name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING}
    missing = sorted(required - set(value))
    if missing:
        raise ValueError(f"{where} lacks the field {missing[0]!r}")
    types = get_type_hints(kind)
    return kind(**{name: from_plain(types[name], item, f"{where}.{name}") for name, item in value.items()})


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} should be a list, but is {_described(value)}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{where} should have {len(kinds)} items, but has {len(value)}")
    return tuple(
        from_plain(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _dict(key_kind: Any, kind: Any, value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} should be an object, but is {_described(value)}")
    found = {}
    for key, item in value.items():
        name = str(key)[:40]
        if key_kind is int and isinstance(key, str) and _INTEGER.fullmatch(key):
            key = int(key)
        found[from_plain(key_kind, key, f"the key {name!r} of {where}")] = from_plain(kind, item, f"{where}.{name}")
    return found


def _scalar(kind: Any, value: object, where: str) -> Any:
    if kind is float:
        if value is None:
            return math.nan
        if (isinstance(value, float) and math.isfinite(value)) or _is_int(value):
            return float(cast(float, value))
    elif kind is datetime:
        with suppress(ValueError):
            if isinstance(value, str):
                return datetime.fromisoformat(value)
    elif _is_int(value) if kind is int else isinstance(value, kind):
        return value
    raise ValueError(f"{where} should be {_NAMES[kind]}, but is {_described(value)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT


def _any(value: object, where: str, depth: int) -> Any:
    if depth == 0:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} times")
    if isinstance(value, Mapping):
        return {str(key): _any(item, f"{where}.{str(key)[:40]}", depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_any(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | str):
        return value
    return _scalar(int if isinstance(value, int) else float, value, where)


def _described(value: object) -> str:
    return (
        "null" if value is None else repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"
    )
