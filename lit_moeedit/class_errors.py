"""Errors raised by the classes and the files of a config, told with the option, or the file and line, and the key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

from lit_moeedit.config_errors import ADAPTED, imported, place_of


@dataclass(frozen=True)
class _Node:
    """Some of the settings of a run.

    Attributes:
        keys: keys that lead to it.
        value: its value.
    """

    keys: tuple[str, ...]
    value: Any

    @property
    def class_path(self) -> str:
        """Path of the class that is made of these settings; empty if there is none."""
        return str(self.value.get("class_path") or "") if isinstance(self.value, dict) else ""


def explain_raised(
    error: BaseException, settings: Mapping[str, Any], args: Sequence[str], groups: Mapping[str, type]
) -> str:
    """Say which setting an error is about, if it is about one.

    A file is that of the setting whose value is its path. Of a class the setting is the first one that the message
    names; in its absence all its settings are meant.

    Args:
        error: the error, as it was raised.
        settings: settings of the run, nested plain values.
        args: arguments of the command line, for the option or the config that has the setting.
        groups: classes by the keys of settings that name none.

    Returns:
        The place with the key, and the error in a line of its own; empty if no setting is found.
    """
    nodes = list(_nodes((), settings))
    path = next((str(value) for name in ("path", "file", "filename") if (value := getattr(error, name, None))), None)
    node = next((node for node in nodes if isinstance(node.value, str) and node.value == path), None)
    keys = node.keys if node is not None else None
    if node is None and (node := _made_of(error, nodes, groups)) is not None:
        keys = (*node.keys, *_named(str(error), node))
    if node is None or not keys:
        return ""
    key, place = ".".join(keys), place_of(keys, [node.class_path, node.class_path.rpartition(".")[2]], args)
    is_option = place.startswith("--")
    remedy = f"; give yours by --{key}" if isinstance(error, FileNotFoundError) and not is_option else ""
    return f"{': '.join(filter(None, (place, '' if is_option else key)))}\n  {error}{remedy}"


def _nodes(keys: tuple[str, ...], value: Any) -> Iterator[_Node]:
    """Yield settings, and all that are in them."""
    yield _Node(keys, value)
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from _nodes(keys if name in ADAPTED else (*keys, str(name)), inner)
    for inner in value if isinstance(value, list) else ():
        yield from _nodes(keys, inner)


def _made_of(error: BaseException, nodes: Sequence[_Node], groups: Mapping[str, type]) -> _Node | None:
    """Return the settings of the object that was being made when the error was raised, the innermost one."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "__init__"]
    for frame in reversed(frames):
        kind = type(frame.f_locals.get("self"))
        found = [
            node
            for node in nodes
            if (node.class_path and imported(node.class_path) is kind) or groups.get(".".join(node.keys)) is kind
        ]
        same = [node for node in found if _fits(_settings(node), frame.f_locals)]
        if found:
            return (same or found)[0]
    return None


def _settings(node: _Node) -> dict[str, Any]:
    own = node.value.get("init_args") if node.class_path else node.value
    return own if isinstance(own, dict) else {}


def _fits(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    """Tell if an object with these arguments may be made of settings; what is made of classes is not compared."""
    plain = (str, int, float, bool)
    return all(arguments.get(name, value) == value for name, value in settings.items() if isinstance(value, plain))


def _named(message: str, node: _Node) -> list[str]:
    """Return the setting that a message names first, in a list; an empty one if it names none."""
    places = {name: re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) for name in _settings(node)}
    return sorted((name for name, found in places.items() if found), key=lambda name: places[name].start())[:1]  # type: ignore[union-attr]
