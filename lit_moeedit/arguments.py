"""Parsers of the command line: recipes as configs, and errors that name the cause."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, _typehints
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lit_moeedit.recipes import with_recipe_paths

_NOISE = re.compile(
    r" *($|(- )?Does not validate against|Subtypes: |Errors:$|Given value type: |Subclass types|- a (class|dict))"
)
_NO_PEFT = re.compile(r"No module named 'peft'|import of peft halted")
_ALTERNATIVE = re.compile(r" *(- (Expected an? |Not a valid subclass)|Given value: )")


def essence(message: str) -> str:
    """Return the cause in a message of jsonargparse, without the types that a value was not meant to have.

    jsonargparse gives a reason for every type of a union. The intended type is the one in which parsing got furthest,
    the most indented.

    Example:
        >>> print(essence('''Parser key "model":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Problem with given class_path 'LitMoE':
        ...         Option 'rate' is not accepted
        ...     - Expected a <class 'NoneType'>
        ...   Given value: {'class_path': 'LitMoE', 'init_args': {'rate': 1}}'''))
        Parser key "model":
            - Problem with given class_path 'LitMoE':
                Option 'rate' is not accepted
    """

    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    lines = [line for line in message.splitlines() if not _NOISE.match(line)]
    furthest = max((depth(line) for line in lines if not _ALTERNATIVE.match(line)), default=0)
    return "\n".join(line for line in lines if depth(line) >= furthest or not _ALTERNATIVE.match(line))


def _drop_settings_of_another_class(parser: Any, previous: Any, value: Any) -> None:
    """Empty the settings of a class that another one replaces.

    Args:
        parser: not used; it is an argument of what this replaces.
        previous: the earlier class with its settings, changed in place; or none.
        value: the later one.
    """
    if not previous or "init_args" not in previous or _is_same(previous["class_path"], value["class_path"]):
        return
    for part in ("init_args", "dict_kwargs"):
        if previous.get(part):
            previous[part] = type(previous[part])()


def _is_same(path: str, other: str) -> bool:
    """Tell whether two class paths, one of which may be that of a package that exports it, are of one class."""
    try:
        return path == other or resolve_name(path) is resolve_name(other)
    except (ImportError, AttributeError, ValueError):
        return False


@contextmanager
def _new_class_new_settings() -> Iterator[None]:
    """Let a config or an option that names another class begin with that class's defaults.

    jsonargparse keeps the settings that both classes have: the ``version`` of a CSV logger became the id of a run of
    W&B. It offers no way to turn that off, so the function that chooses what to keep is replaced while it parses.
    """
    kept = _typehints.discard_init_args_on_class_path_change
    _typehints.discard_init_args_on_class_path_change = _drop_settings_of_another_class
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = kept


class RunParser(LightningArgumentParser):
    """A parser that takes ``--config recipe:NAME`` for the config of that name that comes with the package.

    A later config overlays an earlier one setting by setting. Where it names another class, that class begins with its
    own defaults.
    """

    @override
    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        try:
            args = with_recipe_paths(sys.argv[1:] if args is None else args)
        except ValueError as error:
            self.error(str(error), error)
        with _new_class_new_settings():
            return super().parse_args(args, *others, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        found = essence(message)
        if "class path given previously" in message and "Given value: {'init_args'" in found:
            found += "\nIt overlays another config: give that one before it."
        if _NO_PEFT.search(message):
            found += "\nAdapters need peft: pip install 'lit-moeedit[peft]'"
        super().error(found, ex)


class CommandParser(ArgumentParser):
    """A parser that takes ``--option`` for ``--option=true``, a ``name`` without an option before it, and lists."""

    @override
    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("type") is bool:
            kwargs |= {"nargs": "?", "const": True}
        kind = getattr(kwargs.get("action"), "_typehint", None)
        if get_origin(kind) is list and not args[0].startswith("-"):
            # several words, and not a list in brackets
            kwargs = {"type": get_args(kind)[0], "nargs": "+", "help": kwargs.get("help")}
        if args == ("--name",):
            args, kwargs = ("name",), kwargs | {"nargs": "?"}
        return super().add_argument(*args, **kwargs)
