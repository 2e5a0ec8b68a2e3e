"""Typed access to one untrusted row of a source of facts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lit_moeedit.data.errors import short, typed

TEXT_LIMIT = 2**16
"""Characters of a text: no prompt is as long, and a tokenizer or model should not have to find out."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but those that end lines, and tabs
_HALF = re.compile(r"[\ud800-\udfff]")
_MISSING, _BROKEN = object(), object()


class Row:
    """Typed access to one untrusted row, which remembers every problem instead of stopping at the first.

    Args:
        data: The row.
        clean: Strip texts and refuse those that are empty, too long or damaged; `False` checks types only and leaves
            texts as they are.
        columns: Our name of a field to its names in the row, where they differ; a field with such a name must be there.
    """

    def __init__(
        self, data: Mapping[str, Any], *, clean: bool = True, columns: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.data = data
        self.clean = clean
        self.columns = columns or {}
        self.problems: list[tuple[str, str]] = []
        self._prefix = ""

    def fail(self, field: str, message: str) -> None:
        """Remember that `field` cannot be used; more than 100 problems help nobody."""
        problem = (self._prefix + field, message)
        if len(self.problems) < 100 and problem not in self.problems:
            self.problems.append(problem)

    def text(self, path: str, *, line_ends: bool = False) -> str:
        """The text at a dotted `path`, which must be there; `""` after a problem.

        `line_ends` keeps those behind the text: the template of a chat may end with one, and the answer follows it.
        """
        path = self._names(path)[0]
        value = self._get(path)
        if value is _MISSING:
            self.fail(path, "is missing; expected a text")
        return "" if value is _MISSING or value is _BROKEN else self._text(path, value, line_ends)

    def text_or_none(self, path: str) -> str | None:
        """The text at a dotted `path`, `None` if it is absent, null or empty."""
        value = self._optional(name := self._names(path)[0])
        return None if value is None else self._text(name, value)

    def texts(
        self, path: str, *, single: bool = False, line_ends: bool = False, paired: bool = False
    ) -> tuple[str, ...]:
        """The list of texts at `path`, empty if it is absent, null or empty; with `single` one text counts as a list.

        Empty texts in it are left out, but refused where it is `paired` with another list, entry by entry.
        """
        found: list[str] = []
        for name in self._names(path):
            value = self._optional(name)
            if single and isinstance(value, str):
                found.append(self._text(name, value, line_ends))
            else:
                for index, item in enumerate(self._list(name, value, "texts")):
                    if paired or not self._is_empty(item):
                        found.append(self._text(f"{name}[{index}]", item, line_ends))
        return tuple(found)

    def rows(self, path: str) -> list[Row]:
        """The list of objects at `path`, empty if it is absent or null; their problems are added to this row's."""
        inner_rows = []
        for index, item in enumerate(self._list(path, self._optional(path), "objects")):
            if not isinstance(item, Mapping):
                self.fail(f"{path}[{index}]", f"is {typed(item)}; expected an object")
                continue
            inner = Row(item, clean=self.clean)
            inner.problems, inner._prefix = self.problems, f"{self._prefix}{path}[{index}]."
            inner_rows.append(inner)
        return inner_rows

    def parts(self, path: str) -> list[Row]:
        """The objects at `path`, at least one, with problems of their own; this row itself if it has problems then."""
        parts = self.rows(path)
        if not parts and not self.problems:
            self.fail(path, "is empty; expected at least one object")
        for part in parts:
            part.problems = []
        return [*parts, self] if self.problems else parts

    def _names(self, path: str) -> Sequence[str]:
        return self.columns.get(path, (path,))

    def _optional(self, path: str) -> object:
        """The value at a path, `None` if it is absent or empty; one that was asked for by name must be there."""
        value = self._get(path)
        if value is _MISSING and any(path in names for names in self.columns.values()):
            self.fail(path, "is missing; expected the field that the columns name")
        return None if value is _MISSING or value is _BROKEN or self._is_empty(value) else value

    def _is_empty(self, value: object) -> bool:
        """Whether a value is a text that says nothing, as tables write what is not there."""
        return self.clean and isinstance(value, str) and not value.strip()

    def _get(self, path: str) -> object:
        if path in self.data:  # the name of a column may hold a dot
            return self.data[path]
        value: object = self.data
        walked: list[str] = []
        for key in path.split("."):
            if not isinstance(value, Mapping):
                self.fail(".".join(walked), f"is {typed(value)}; expected an object")
                return _BROKEN
            walked.append(key)
            value = value.get(key, _MISSING)
            if value is _MISSING:
                return _MISSING
        return value

    def _list(self, path: str, value: object, content: str) -> Sequence[object]:
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            self.fail(path, f"is {typed(value)}; expected a list of {content}")
            return ()
        return value

    def _text(self, field: str, value: object, line_ends: bool = False) -> str:
        if not isinstance(value, str):
            self.fail(field, f"is {typed(value)}; expected a text")
            return ""
        if not self.clean:
            return value
        text = value.strip()
        if not text:
            self.fail(field, f"is {short(value)}; expected a text that is not empty")
        elif len(text) > TEXT_LIMIT:
            self.fail(field, f"has {len(text):,} characters ({short(text)}); expected at most {TEXT_LIMIT:,}")
        elif _HALF.search(text):
            self.fail(field, f"is {short(value)}, with half of a surrogate pair; expected valid Unicode")
        elif control := _CONTROL.search(text):
            self.fail(field, f"is {short(value)}, with the control character {control[0]!r}; expected text")
        return text + "\n" * value[len(value.rstrip()) :].count("\n") if line_ends and text else text
