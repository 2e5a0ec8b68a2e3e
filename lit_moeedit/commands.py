"""Commands of one word or two that are functions: their arguments and docstrings are their help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lit_moeedit.arguments import CommandParser
from lit_moeedit.recipes import with_recipe_paths

PROGRAM = "lit-moeedit"


class Commands:
    """The commands of the program besides training and evaluation.

    Args:
        functions: the functions by their commands, such as ``"export"`` or ``"edits apply"``.
        groups: descriptions by the first words of commands that have two.
    """

    def __init__(self, functions: Mapping[str, Callable[..., None]], groups: Mapping[str, str]) -> None:
        self._functions, self._groups = functions, groups

    @property
    def first_words(self) -> dict[str, str]:
        """The first words of all commands, with the descriptions that a list of them has."""
        words = dict.fromkeys(name.split()[0] for name in self._functions)
        return {word: self._groups.get(word) or self._summary(word) for word in words}

    def find(self, words: Sequence[str]) -> str | None:
        """Return the command that the words begin with, if there is one."""
        return next((name for name in self._functions if list(words[: len(name.split())]) == name.split()), None)

    def call(self, name: str, args: Sequence[str]) -> None:
        """Run a command with arguments of the command line.

        Raises:
            SystemExit: if they are wrong.
            ValueError: if there is no such recipe; and what the command raises.
        """
        # jsonargparse spells a further element of a list --config+
        given = [re.sub(r"^--config(?=$|=)", "--config+", _with_underscores(arg)) for arg in with_recipe_paths(args)]
        self._functions[name](**self._parser(name).parse_args(given).as_dict())

    def parser(self, word: str) -> ArgumentParser:
        """Make the parser of a first word, which lists the second words if there are several."""
        if word in self._functions:
            return self._parser(word)
        group = CommandParser(prog=f"{PROGRAM} {word}", description=self._groups[word])
        self._fill(group, word)
        return group

    def add_to(self, subcommands: Any) -> None:
        """List the commands among the subcommands of a parser, for its help, its errors and shell completion."""
        for word, summary in self.first_words.items():
            if word in self._functions:
                subcommands.add_subcommand(word, self._parser(word), help=summary)
            else:
                # further levels are added from the first to the last
                group = CommandParser(description=self._groups[word])
                subcommands.add_subcommand(word, group, help=summary)
                self._fill(group, word)
        for word, own in subcommands.choices.items():
            own.prog = f"{PROGRAM} {word}"  # jsonargparse's has the options of the program in it

    def _fill(self, group: ArgumentParser, word: str) -> None:
        own = group.add_subcommands()
        for name in self._functions:
            first, _, second = name.partition(" ")
            if first == word:
                own.add_subcommand(second, self._parser(name), help=self._summary(name)).prog = f"{PROGRAM} {name}"

    def _parser(self, name: str) -> CommandParser:
        function = self._functions[name]
        # not auto_cli, which takes a --config for itself
        description = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
        parser = CommandParser(prog=f"{PROGRAM} {name}", description=description)
        parser.add_function_arguments(function, as_group=False, as_positional=True)
        return parser

    def _summary(self, name: str) -> str:
        return (inspect.getdoc(self._functions[name]) or "").partition("\n")[0]


def _with_underscores(arg: str) -> str:
    """Return an argument with ``--dry_run`` for ``--dry-run``, which are the same option."""
    return re.sub(r"^--\w[\w-]*", lambda found: f"--{found[0][2:].replace('-', '_')}", arg)
