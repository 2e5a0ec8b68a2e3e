"""A loader of YAML configs that refuses texts of too many levels or values."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MAX_DEPTH = 100
"""Maximum number of nested levels in a config."""
MAX_VALUES = 200_000
"""Maximum number of values in a config, with all aliases expanded."""

_LOAD = get_loader("yaml")


class OutsizeError(ValueError):
    """A config that would take all memory or overflow the stack when it is read."""


def check(text: str) -> None:
    r"""Raise :class:`OutsizeError` if YAML is nested deeper than 100 levels, or has more than 200,000 values.

    An alias counts as all the values that it stands for, because code that walks through the config visits them all.

    Example:
        >>> check("a: &x [1, 2]\nb: [*x, *x]")
    """
    sizes: dict[str, int] = {}
    # for each open container: number of its values so far, and its anchor
    levels: list[tuple[int, str | None]] = [(0, None)]

    def add(size: int) -> None:
        count, anchor = levels[-1]
        levels[-1] = (count + size, anchor)
        if count + size > MAX_VALUES:
            raise OutsizeError(f"more than {MAX_VALUES:,} values, with all aliases expanded")

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            levels.append((1, event.anchor))
            if len(levels) > MAX_DEPTH:
                raise OutsizeError(f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = levels.pop()
            if anchor is not None:
                sizes[anchor] = size
            add(size)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise OutsizeError(f"*{event.anchor} refers to no anchor, or to a value that contains it")
            add(sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            add(1)


def load(text: str) -> Any:
    """Load YAML as jsonargparse does, after :func:`check`."""
    check(text)
    return _LOAD(text)


def install() -> None:
    """Make jsonargparse read every config, and every value of the command line, with :func:`load`."""
    set_loader("yaml", load, exceptions=(yaml.YAMLError, OutsizeError))
