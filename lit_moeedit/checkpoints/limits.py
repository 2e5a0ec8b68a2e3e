"""Limits of what is read from a checkpoint, found before memory or time are spent on it."""

from __future__ import annotations

import pickletools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

MAX_VALUES = 20_000_000
"""Maximum number of values in a checkpoint, each counted wherever it occurs; a tensor has some tens."""
MAX_DEPTH = 100
"""Maximum number of nested levels."""

_COUNTED = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2, "BUILD": 1, "REDUCE": 2, "NEWOBJ": 2}
_MARKED = {"TUPLE", "APPENDS", "SETITEMS"}
_GROWING = {"APPEND", "SETITEM", "BUILD", "APPENDS", "SETITEMS"}
_CALLS = {"REDUCE", "NEWOBJ"}

_ENCODE = "_codecs encode"
"""Function that makes bytes of a text and ``latin1``. Some other encodings take a time that grows with the square of
the length."""
_BYTEARRAY = {"__builtin__ bytearray", "builtins bytearray"}
_BYTES = "bytes"
_OF_OTHER_DEVICES = {
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
}
"""Functions that copy a tensor, whose elements may be repeated in it any number of times."""


class _Extent:
    """Number of values in a value, and of nested levels. A text counts as one value for each 64 characters.

    Args:
        text: the text, the name of the function, or ``bytes``; of a tuple of one or two parts, that of the last one.
    """

    __slots__ = ("depth", "size", "text")

    def __init__(self, text: str | None = None) -> None:
        self.size, self.depth, self.text = 1 + len(text or "") // 64, 1, text

    def grow(self, parts: Iterable[_Extent]) -> None:
        for part in parts:
            self.size, self.depth = self.size + part.size, max(self.depth, part.depth + 1)
        _check(self.size, self.depth)


def check_pickle(data: bytes) -> None:
    """Check the extent of a pickle in the subset that ``torch.save`` writes, without reading its values.

    A short pickle may stand for very many values, as each may occur several times in another. Reading it would take no
    memory for that, but hashing a key of a dict visits all of them, and functions that it calls may copy them.

    Raises:
        ValueError: it has too many values or levels, calls a function with arguments that ``torch.save`` does not
            write, or is not well formed.
    """
    called = _Extent()
    stack: list[_Extent | None] = []
    memo: dict[int, _Extent | None] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        _check(count, 0)
        if name == "MARK":
            stack.append(None)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]  # type: ignore[index]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])  # type: ignore[index]
        elif name in _COUNTED or name in _MARKED:
            start = len(stack) - _COUNTED[name] if name in _COUNTED else len(stack) - 1 - stack[::-1].index(None)
            parts = [part for part in stack[start:] if part is not None]
            del stack[start:]
            _check_calls(name, parts)
            if name in _CALLS:
                called.grow(_flat(parts))
            target = stack[-1] if name in _GROWING else _Extent()
            assert target is not None, "a mark in the place of a value"
            target.grow(parts)
            if name not in _GROWING:
                is_short = name.startswith("TUPLE") and 0 < len(parts) < 3
                target.text = parts[-1].text if is_short else _BYTES if parts and parts[0].text == _ENCODE else None
                stack.append(target)
        elif name == "BINPERSID":
            stack[-1] = _Extent()
        elif name not in ("PROTO", "STOP"):
            stack.append(_Extent(argument if isinstance(argument, str) else None))


_PLAIN = {
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "EMPTY_TUPLE",
    "EMPTY_LIST",
}
_PLAIN |= {"EMPTY_DICT", "SHORT_BINUNICODE", "BINUNICODE"}


class _Global(_Extent):
    """A class, function or constant that a pickle names."""

    __slots__ = ()


def find_globals(data: bytes) -> set[str]:
    """Find what a pickle in the subset that Python writes names, ``module name``, and check its extent.

    Nothing is read or imported. If all of these names are harmless, so is the pickle: instructions that it would need
    to reach others, or to change what it names, are refused.

    Raises:
        ValueError: it has too many values or levels, an instruction that is not known, or is not well formed.
    """
    found: set[str] = set()
    called = _Extent()
    stack: list[_Extent | None] = []
    memo: list[_Extent | None] = []
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        _check(count, 0)
        if name == "MARK":
            stack.append(None)
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])  # type: ignore[index]
        elif name == "STACK_GLOBAL":
            own, module = stack.pop(), stack.pop()
            if own is None or module is None or own.text is None or module.text is None:
                raise ValueError("it names a class by what is not a text")
            found.add(f"{module.text} {own.text}")
            stack.append(_Global())
        elif name in _COUNTED or name in _MARKED:
            start = len(stack) - _COUNTED[name] if name in _COUNTED else len(stack) - 1 - stack[::-1].index(None)
            parts = [part for part in stack[start:] if part is not None]
            del stack[start:]
            if name in _CALLS:
                called.grow(_flat(parts))
                if not isinstance(parts[0], _Global):
                    raise ValueError("it calls what it does not name")
            target = stack[-1] if name in _GROWING else _Extent()
            if target is None or isinstance(target, _Global):
                raise ValueError("it changes what it names")
            target.grow(parts)
            if name not in _GROWING:
                stack.append(target)
        elif name in _PLAIN:
            stack.append(_Extent(argument if isinstance(argument, str) else None))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the instruction {name}")
    return found


def _check_calls(name: str, parts: Sequence[_Extent]) -> None:
    is_call = name in _CALLS
    if any(part.text in {_ENCODE, *_BYTEARRAY, *_OF_OTHER_DEVICES} for part in parts[is_call:]):
        raise ValueError("a function is the argument of another one")
    function, text = (parts[0].text, parts[1].text) if is_call else (None, None)
    if function in _OF_OTHER_DEVICES:
        raise ValueError("it holds a tensor of a device other than cpu or cuda")
    if (function == _ENCODE and text not in ("latin1", "latin-1")) or (
        function in _BYTEARRAY and text != _BYTES and parts[1].size > 1
    ):
        raise ValueError(f"it calls {str(function).replace(' ', '.')} with arguments that torch.save does not write")


def _flat(parts: Iterable[_Extent]) -> Iterator[_Extent]:
    """Yield the sizes without the levels."""
    for part in parts:
        flat = _Extent()
        flat.size = part.size
        yield flat


def check_values(value: Any) -> None:
    """Check the extent of values that are read: of containers that contain themselves, or each other many times.

    Raises:
        ValueError: there are too many values or levels.
    """
    known: dict[int, tuple[int, int]] = {}

    def extent(value: Any, levels: int) -> tuple[int, int]:
        if isinstance(value, Mapping):
            parts: Iterable[Any] = (part for item in value.items() for part in item)
        elif isinstance(value, list | tuple | Set):
            parts = value
        else:
            return 1, 1
        if id(value) not in known:
            _check(0, levels)  # a container in itself comes here again and again
            size, depth = 1, 1
            for part in parts:
                more, deeper = extent(part, levels + 1)
                size, depth = size + more, max(depth, deeper + 1)
            known[id(value)] = size, depth
        size, depth = known[id(value)]
        _check(size, levels + depth - 1)
        return size, depth

    extent(value, 1)


def _check(size: int, depth: int) -> None:
    if size > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
