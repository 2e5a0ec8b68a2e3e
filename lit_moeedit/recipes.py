"""Recipes: the configs that come with the package, known by their names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lit_moeedit.text import nearest

PREFIX = "recipe:"


def recipe_path(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        ValueError: if there is no such recipe; the message lists those that there are.

    Example:
        >>> recipe_path("atlas").name
        'atlas.yaml'
    """
    paths = _paths()
    if name not in paths:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(paths)}{nearest(name, paths)}")
    return paths[name]


def with_recipe_paths(args: Sequence[str]) -> list[str]:
    """Replace ``recipe:NAME`` by the path of the recipe wherever arguments give a config.

    Args:
        args: arguments of the command line, with ``--config recipe:NAME``, ``--config=recipe:NAME`` or ``-c``.

    Raises:
        ValueError: if there is no such recipe.

    Example:
        >>> with_recipe_paths(["fit", "--config=my.yaml", "-c", "my_too.yaml"])
        ['fit', '--config=my.yaml', '-c', 'my_too.yaml']
    """
    options = ("--config", "-c")
    found, before = [], ""
    for arg in args:
        option, equals, value = arg.partition("=") if arg.startswith(options) else ("", "", arg)
        if value.startswith(PREFIX) and (option or before) in options:
            arg = f"{option}{equals}{recipe_path(value.removeprefix(PREFIX))}"
        found.append(arg)
        before = arg
    return found


def recipes(name: str | None = None) -> None:
    """List the configs that come with the package, or print one of them.

    Wherever a config is taken, recipe:NAME stands for the recipe NAME. A recipe that is printed into a file can be
    changed.

    Args:
        name: the recipe to print.

    Raises:
        ValueError: if there is no such recipe.

    Example:
        lit-moeedit fit --config recipe:atlas
        lit-moeedit recipes atlas > my.yaml
    """
    if name is not None:
        sys.stdout.write(recipe_path(name.removeprefix(PREFIX)).read_text(encoding="utf-8"))
        return
    paths = _paths()
    width = max(map(len, paths))
    for recipe, path in paths.items():
        description = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        sys.stdout.write(f"{recipe:<{width}}  {description}\n")


def _paths() -> dict[str, Path]:
    """Return the files by their names."""
    found = (Path(str(file)) for file in files("lit_moeedit.configs").iterdir())
    return {path.stem: path for path in sorted(found) if path.suffix == ".yaml"}
