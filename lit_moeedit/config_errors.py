"""Errors in configs and options, told in two lines: file and line, key, reason, and the nearest valid name."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from jsonargparse._typehints import get_all_subclass_paths

from lit_moeedit.text import first_few, near_path, nearest

_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)")
_TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_GROUP = re.compile(r"(?:Subcommand|Group) '([^']*)' does not accept option '([^']+)'")
_TYPE_NAMES = {"NoneType": "null", "Sequence": "a list", "list": "a list"}
_MAX_NAMES = 12
ADAPTED = ("init_args", "dict_kwargs", "class_path")
"""Keys of a config that are part of no path, because an option can do without them."""


@dataclass
class Trail:
    """The way to a mistake, read from a message of jsonargparse.

    Attributes:
        keys: keys that lead to the setting.
        kind: class whose settings are wrong; ``None`` for those of the run.
        action: jsonargparse's description of the setting, if it is known.
        reasons: the lines that say what is wrong.
    """

    keys: list[str] = field(default_factory=list)
    kind: type | None = None
    action: Action | None = None
    reasons: list[str] = field(default_factory=list)
    class_paths: list[str] = field(default_factory=list)


def explain(message: str, parser: ArgumentParser, args: Sequence[str]) -> str:
    """Say where a mistake is, what is wrong, and what may have been meant.

    Args:
        message: the message of jsonargparse, without the types that a value was not meant to have.
        parser: the parser of the command.
        args: its arguments, for the option or the config that has the mistake.

    Returns:
        The place with the key, and the reason in lines of its own; the reason alone, if there is no place.
    """
    for path in _configs(args):
        if broken := _syntax_error(path):
            return broken
    trail = _read(message, parser)
    reason = _reason(trail, parser) + _help(trail, parser)
    key = ".".join(trail.keys)
    place = place_of(trail.keys, trail.class_paths, args)
    head = ": ".join(filter(None, (place, key if key and not place.startswith("--") else "")))
    return f"{head}\n  {reason}" if head else reason


def _read(message: str, parser: ArgumentParser) -> Trail:
    trail, own = Trail(), parser
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if found := _KEY.match(line):
            trail.keys += found[1].split(".")
            trail.action = next((action for action in own._actions if action.dest == found[1]), None)
            line = found[2]
        elif found := _CLASS.match(line):
            trail.class_paths.append(found[1])
            kind = imported(found[1])
            if isinstance(kind, type):
                trail.kind, own = kind, _class_parser(kind)
            line = found[2]
        if line:
            trail.reasons.append(line)
    return trail


def _reason(trail: Trail, parser: ArgumentParser) -> str:
    """Put the reasons into words, and complete the keys of the trail by the one that is wrong."""
    text = "\n".join(trail.reasons)
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        name, names = found[1], _settings_of(trail.kind)
        if (first := name.partition(".")[0]) not in names:  # the rest of it is right or wrong with it
            name = first
        trail.keys += name.split(".")
        return _unknown(name, trail.kind.__name__ if trail.kind else "the config", names)
    if found := _GROUP.search(text):
        of_command = found[1] == getattr(parser, "subcommand", None)
        return _unknown_option(trail, parser, found[2] if of_command else f"{found[1]}.{found[2]}")
    if found := re.match(r"ambiguous option: (\S+) could match (.+)", text):
        # jsonargparse spells a further element of a list --name+
        options = dict.fromkeys(f"'{name.rstrip('+')}'" for name in found[2].split(", "))
        return f"there is no option {found[1]} (did you mean {' or '.join(options)}?)"
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        name = found[1].partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {found[1]!r}"
        return _unknown_option(trail, parser, name.lstrip("-"))
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        return f"{found[1]} has no class {found[2]!r}{nearest(found[2], _names_in(found[1]))}"
    if found := re.search(r"No module named '([^']+)'", text):
        return f"there is no module {found[1]!r}{nearest(found[1], _modules_beside(found[1]))}"
    if found := re.search(r"Import path (\S+) does not correspond to a subclass of (\w+)", text):
        return f"{found[1]} is no {found[2]}: expected a class that is one, or one of its short names"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        return _unknown_class(trail, found[1], text)
    if found := re.match(r"the following arguments are required: (.+)", text):
        return _missing(trail, parser, found[1].split(", "))
    if found := re.search(r"invalid choice: '([^']*)' \(choose from (.+)\)", text):
        names = re.findall(r"[\w-]+", found[2])
        return f"there is no {found[1]!r}{nearest(found[1], names) or f'; there are {first_few(names, 20)}'}"
    if 'expected "subcommand" to be one of' in text:
        return f"a command is missing; there are {first_few(_commands(parser), 20)}"
    if found := re.search(r"File does not exist: '?([^']+)'?", text):
        return f"there is no file {found[1]}{near_path(found[1])}"
    types = [found for line in trail.reasons if (found := _TYPE.match(line))]
    if types:
        values = [line.removeprefix("Given value: ") for line in trail.reasons if line.startswith("Given value: ")]
        value = next((found[2] for found in types if found[2]), next(iter(values), ""))
        return _wrong_type([found[1] for found in types], value)
    return "\n  ".join(trail.reasons)


def _help(trail: Trail, parser: ArgumentParser) -> str:
    """Return a line of help on a mistake in a command: on its option, if that is known, or on the whole."""
    if any(action.dest == "config" for action in parser._actions) or parser._subcommands_action is not None:
        return ""
    if trail.action is not None and trail.action.help:
        return f"\n  {trail.action.dest}: {trail.action.help}"
    words = (
        " ".join((*action.option_strings[:1], action.dest.upper()))
        for action in parser._actions
        if action.required or not action.option_strings
    )
    return f"\n  usage: {' '.join((parser.prog, *words))} [OPTIONS]; --help lists them"


def _unknown(name: str, owner: str, names: Sequence[str]) -> str:
    meant = nearest(name, names)
    listed = "" if meant or not names else f"; it has {first_few(sorted(names), _MAX_NAMES)}"
    return f"{owner} has no setting {name!r}{meant}{listed}"


def _unknown_option(trail: Trail, parser: ArgumentParser, name: str) -> str:
    """Explain an option of which a part, not always the last one, is not known."""
    dests = [action.dest for action in parser._actions if action.dest != "help"]
    parts, before = name.split("."), ""
    for depth, part in enumerate(parts):
        names = {dest.removeprefix(before).split(".")[0] for dest in dests if dest.startswith(before)}
        if part not in names:
            trail.keys = parts[: depth + 1]
            owner = before.rstrip(".") or parser.prog
            return _unknown(part, owner, sorted(names))
        before += f"{part}."
    trail.keys = parts
    return f"there is no setting {name!r}"


def _missing(trail: Trail, parser: ArgumentParser, names: Sequence[str]) -> str:
    own = [name.removeprefix(f"{getattr(parser, 'subcommand', None)}.") for name in names]
    if trail.kind is None:
        takes_configs = any(action.dest == "config" for action in parser._actions)
        hint = "; a config has them all (--config recipe:NAME or a file)" if takes_configs and "model" in own else ""
        return f"{', '.join(own)} {'is' if len(own) == 1 else 'are'} missing{hint}"
    option = f", for example by --{'.'.join(trail.keys)}.{own[0]}" if trail.keys[:1] != ["trainer"] else ""
    return f"{trail.kind.__name__} needs {', '.join(own)}{option}"


def _commands(parser: ArgumentParser) -> list[str]:
    return list(getattr(parser._subcommands_action, "choices", None) or ())


def _unknown_class(trail: Trail, name: str, text: str) -> str:
    choices = re.findall(r"'([^']+)'", (re.search(r"typing\.Literal\[(.+?)\]", text) or [""])[0])
    hint: Any = getattr(trail.action, "_typehint", None)
    paths = get_all_subclass_paths(hint) if hint is not None else []
    names = [*choices, *(path.rpartition(".")[2] for path in paths)]
    known = f"; known are {first_few(names, _MAX_NAMES)}" if names else ""
    return f"{name!r} is no class that this setting takes{nearest(name, names) or known}"


def _wrong_type(types: Sequence[str], value: str) -> str:
    names = [re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind).replace("typing.", "") for kind in types]
    choices = [choice for kind in types if "Literal[" in kind for choice in re.findall(r"'([^']+)'", kind)]
    listed = [re.sub(r"^Literal\[(.+)\]$", r"\1" if "," not in name else r"one of \1", name) for name in names]
    named = [_TYPE_NAMES.get(name, name) for name in listed]
    return f"expected {' or '.join(dict.fromkeys(named))}, got {value!r}{nearest(value, choices)}"


def _configs(args: Sequence[str]) -> Iterator[Path]:
    """Yield the configs of a command line in their order."""
    for before, arg in zip(["", *args], args, strict=False):
        option, _, value = arg.partition("=")
        if before in ("-c", "--config"):
            option, value = before, arg
        if option in ("-c", "--config") and Path(value).is_file():
            yield Path(value)


def _tree(path: Path) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError):
        return None
    return node


def _syntax_error(path: Path) -> str:
    try:
        yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        context = f" {error.context}, which begins in line {error.context_mark.line + 1}" if error.context_mark else ""
        return f"{path}{line}\n  this is not YAML: {error.problem}{context}"
    except yaml.YAMLError as error:
        return f"{path}\n  this is not YAML: {' '.join(str(error).split())}"
    except (OSError, UnicodeDecodeError, RecursionError):
        return ""
    return ""


def place_of(keys: Sequence[str], class_paths: Sequence[str], args: Sequence[str]) -> str:
    """Find the option or the line of a config that has a setting; the last one counts, as it does for the run.

    Args:
        keys: keys that lead to the setting.
        class_paths: classes that may stand on the way to it, where lists have several.
        args: arguments of the command line.

    Returns:
        The option, or the file with the line; empty if the setting is not given.
    """
    keys = [key for key in keys if key not in ADAPTED]
    for arg in reversed(args):
        option = arg.partition("=")[0]
        if option.startswith("--") and keys and _is_about(option[2:].removesuffix("+"), keys):
            return option
    for path in reversed(list(_configs(args))):
        node = _tree(path)
        for root in (node, _value(node, next(iter(args), ""))):
            line = _line(root, keys, class_paths)
            if line is not None:
                return f"{path}, line {line}"
    return ""


def _is_about(option: str, keys: Sequence[str]) -> bool:
    """Tell if an option gives the setting of these keys, some of it, or an object with it."""
    parts, wanted = [part for part in option.split(".") if part not in ADAPTED], list(keys)
    return parts[: len(wanted)] == wanted or (1 < len(parts) < len(wanted) and parts == wanted[: len(parts)])


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if name.value == key), None)


def _line(root: yaml.Node | None, keys: Sequence[str], class_paths: Sequence[str]) -> int | None:
    """Return the line of the deepest of the keys that a config has, if it has the first two of them."""
    node, line, depth = root, None, 0
    for key in keys:
        if isinstance(node, yaml.SequenceNode):
            node = next((each for each in node.value if _class_of(each) in class_paths), None)
        inner = _value(node, "init_args")
        own = node if inner is None else inner
        pairs = own.value if isinstance(own, yaml.MappingNode) else []
        found = next(((name, value) for name, value in pairs if name.value.rstrip("+") == key), None)
        if found is None:
            break
        line, node, depth = found[0].start_mark.line + 1, found[1], depth + 1
    if isinstance(node, yaml.SequenceNode):
        element = next((each for each in node.value if _class_of(each) in class_paths), None)
        line = line if element is None else element.start_mark.line + 1
    elif _class_of(node) in class_paths:
        named = _value(node, "class_path") or node
        line = None if named is None else named.start_mark.line + 1
    return line if depth >= min(len(keys), 2) else None


def _class_of(node: yaml.Node | None) -> str:
    found = node if isinstance(node, yaml.ScalarNode) else _value(node, "class_path")
    return str(found.value) if found is not None else ""


def imported(class_path: str) -> Any:
    """Return a class that the message names, if jsonargparse has imported its module; nothing is imported here."""
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _class_parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(kind, fail_untyped=False)
    except (ValueError, TypeError):  # a class whose settings cannot be told has none that could be meant
        return ArgumentParser(exit_on_error=False)
    return parser


def _settings_of(kind: type | None) -> list[str]:
    actions = _class_parser(kind)._actions if kind is not None else []
    return [action.dest for action in actions if action.dest not in ("help", "config")]


def _names_in(module: str) -> list[str]:
    found = sys.modules.get(module)
    return [name for name, value in vars(found).items() if inspect.isclass(value)] if found else []


def _modules_beside(name: str) -> list[str]:
    """List modules that a name which cannot be imported may have meant."""
    parent, _, _ = name.rpartition(".")
    if not parent:
        return ["lit_moeedit", "lightning", "torch", "transformers", "peft", "deepspeed"]
    try:
        folders = import_module(parent).__path__
    except (ImportError, AttributeError):
        return []
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(folders)]
