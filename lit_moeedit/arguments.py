"""Parsers of the command line: recipes as configs, and errors that name the cause."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, _typehints
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from lit_moeedit.config_errors import explain
from lit_moeedit.recipes import with_recipe_paths
from lit_moeedit.text import printable

_NOISE = re.compile(
    r" *($|(- )?Does not validate against|Subtypes: |Errors:$|Given value type: |Subclass types|- a (class|dict))"
)
_OVERLAY = re.compile(r"(?s)class path given previously.*Given value: \{'init_args'")
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


def cause(error: BaseException) -> BaseException:
    """Return the error that a class of the config raised; jsonargparse wraps it into one about types."""
    while error.__cause__ is not None and str(error).startswith("Does not validate against any of"):
        error = error.__cause__
    return error


class _ExplainingParser(ArgumentParser):
    """A parser whose errors are short: where the mistake is, what is wrong, and what may have been meant."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[str] = []

    @override
    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        try:
            args = self.given = with_recipe_paths(sys.argv[1:] if args is None else args)
        except ValueError as error:
            self.error(str(error), error)
        with _new_class_new_settings():
            return super().parse_args(args, *others, **kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a class in the config; the parser of the whole explains it
            super().error(essence(message), ex)
        self.exit(2, f"{self._own.prog}: {self.explained(message)}\n")

    def explained(self, message: str) -> str:
        """Return an error in the arguments as where, what, and what may have been meant."""
        given = self._root.given or self.given
        text = explain(essence(message), self._own, given)
        if _OVERLAY.search(message):
            text += "\n  It overlays another config: give that one before it."
        if "the following arguments are required: " in message and any(a.startswith(("--config", "-c")) for a in given):
            text += "\n  A config that overlays another needs it before it: --config FIRST --config OVERLAY"
        if _NO_PEFT.search(message):
            text += "\n  Adapters need peft: pip install 'lit-moeedit[peft]'"
        return printable(text, keep="\n")

    @property
    def _root(self) -> Any:
        return getattr(self, "parent_parser", None) or self

    @property
    def _own(self) -> ArgumentParser:
        """The parser of the command that is given."""
        commands = getattr(self._root._subcommands_action, "choices", None) or {}
        own: ArgumentParser = commands.get(next((arg for arg in self._root.given if not arg.startswith("-")), ""), self)
        return own


class RunParser(_ExplainingParser, LightningArgumentParser):
    """A parser that takes ``--config recipe:NAME`` for the config of that name that comes with the package.

    A later config overlays an earlier one setting by setting. Where it names another class, that class begins with its
    own defaults.
    """

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._only_if_given: set[str] = set()
        self._optional = ""

    @override
    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        # a group takes no null as an option, only in a config
        off = f"--{self._optional}=null"
        is_off = bool(self._optional) and args is not None and off in args
        parsed = super().parse_args([arg for arg in args if arg != off] if is_off else args, *others, **kwargs)
        if is_off:
            parsed.pop(self._optional, None)
        return parsed

    def set_default_classes(self, classes: dict[str, type], optional: str) -> None:
        """Set the classes of settings that name none. Such a setting has a value only where the user gives some of it.

        Args:
            classes: the classes by the keys of the settings.
            optional: key of a group that has a value only where the user gives some of it, either; ``null`` takes it
                away again.
        """
        for key, kind in classes.items():
            self.set_defaults({key: {"class_path": f"{kind.__module__}.{kind.__qualname__}"}})
        for action in self._actions:
            if action.dest.startswith(f"{optional}."):
                action.required = False
        self._optional = optional
        self._only_if_given = {optional, *(key for key in classes if "." not in key)}

    def defaults_of(self, key: str) -> dict[str, Any]:
        """Return the defaults of a group of settings, also of one that is optional."""
        defaults: dict[str, Any] = super().get_defaults(skip_validation=True)[key].as_dict()
        return defaults

    @override
    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        defaults = super().get_defaults(*args, **kwargs)
        for key in self._only_if_given:
            defaults.pop(key, None)
        return defaults


class CommandParser(_ExplainingParser):
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
