"""Configs in YAML, refused if they are too deep or grow too large while they are read."""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

DEEPEST = 100
LARGEST = 200_000
"""Values in a config once every alias is written out."""

_LOAD = get_loader("yaml")


class OutsizeError(yaml.YAMLError):
    """A text of a few bytes that would take all memory, or the whole stack."""


def check(text: str) -> None:
    r"""Raise :class:`OutsizeError` if YAML is nested deeper than 100 levels, or has more than 200,000 values.

    Aliases count as often as they stand for something, because whoever walks through a config meets them so often.

    Example:
        >>> check("a: &x [1, 2]\nb: [*x, *x]")
    """
    sizes: dict[str, int] = {}
    # of the containers that are open: values so far, and the anchor
    levels: list[tuple[int, str | None]] = [(0, None)]

    def add(size: int) -> None:
        count, anchor = levels[-1]
        levels[-1] = (count + size, anchor)
        if count + size > LARGEST:
            raise OutsizeError(f"more than {LARGEST:,} values, with all aliases written out")

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            levels.append((1, event.anchor))
            if len(levels) > DEEPEST:
                raise OutsizeError(f"nested deeper than {DEEPEST} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = levels.pop()
            if anchor is not None:
                sizes[anchor] = size
            add(size)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise OutsizeError(f"*{event.anchor} stands for nothing, or for something that it is a part of")
            add(sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            add(1)


def load(text: str) -> Any:
    """What jsonargparse makes of YAML, if it is not too large for it."""
    check(text)
    return _LOAD(text)


def use() -> None:
    """Have jsonargparse read every config, and every value of the command line, with :func:`load`."""
    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
