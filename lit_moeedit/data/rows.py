"""Typed access to an untrusted row of a source of facts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lit_moeedit.data.errors import short, typed

TEXT_LIMIT = 2**16
"""Maximum number of characters of a text: no prompt is as long, and longer ones would block a tokenizer or model."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but tabs and line ends
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MISSING, _BROKEN = object(), object()


class Row:
    """Typed access to an untrusted row, which collects all problems instead of stopping at the first.

    Args:
        data: The row.
        clean: True to strip texts and to refuse empty, overlong or damaged ones; `False` checks types only and does not
            change texts.
        names: Field name to its name (or names) in the row, where they differ.
        required: Names that the row must have, even if the field is optional.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        clean: bool = True,
        names: Mapping[str, str | Sequence[str]] | None = None,
        required: Collection[str] = (),
    ) -> None:
        self.data = data
        self.clean = clean
        self.required = required
        self._names = names or {}
        self.problems: list[tuple[str, str]] = []
        self._prefix = ""

    def fail(self, field: str, message: str) -> None:
        """Record a problem of `field`, up to 100 of them."""
        problem = (self._prefix + field, message)
        if len(self.problems) < 100 and problem not in self.problems:
            self.problems.append(problem)

    def text(self, path: str, *, line_ends: bool = False) -> str:
        """Return the required text at a dotted `path`; `""` after a problem.

        `line_ends` keeps line ends after the text, because a chat template may end with one before the answer.
        """
        path = self.names(path)[0]
        value = self._get(path)
        if value is _MISSING:
            self.fail(path, "is missing; expected a text")
        return "" if value is _MISSING or value is _BROKEN else self._text(path, value, line_ends)

    def text_or_none(self, path: str) -> str | None:
        """Return the text at a dotted `path`; `None` if it is absent, null or empty."""
        value = self._optional(name := self.names(path)[0])
        return None if value is None else self._text(name, value)

    def texts(
        self, path: str, *, single: bool = False, line_ends: bool = False, paired: bool = False
    ) -> tuple[str, ...]:
        """Return the texts at `path`; `()` if it is absent, null or empty. `single` allows one text instead of a list.

        Empty texts in the list are left out. They are refused if it is `paired` with another list, entry by entry.
        """
        found: list[str] = []
        for name in self.names(path):
            value = self._optional(name)
            if single and isinstance(value, str):
                found.append(self._text(name, value, line_ends))
            else:
                for index, item in enumerate(self._list(name, value, "texts")):
                    if paired or not self._is_empty(item):
                        found.append(self._text(f"{name}[{index}]", item, line_ends))
        return tuple(found)

    def rows(self, path: str) -> list[Row]:
        """Return the objects at `path`, if there are any; their problems are added to those of this row."""
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
        """Return the objects at `path`, at least one, each with its own problems; then this row, if it has problems."""
        parts = self.rows(path)
        if not parts and not self.problems:
            self.fail(path, "is empty; expected at least one object")
        for part in parts:
            part.problems, part._names = [], self._names
        return [*parts, self] if self.problems else parts

    def names(self, path: str) -> Sequence[str]:
        """Return the names in the row of a field, or the dotted `path` itself."""
        names = self._names.get(path, path)
        return (names,) if isinstance(names, str) else names

    def _optional(self, path: str) -> object:
        """Return the value at a path; `None` if it is absent or empty. Columns given by the user are required."""
        value = self._get(path)
        if value is _MISSING and path in self.required:
            self.fail(path, "is missing; expected the column given in columns")
        return None if value is _MISSING or value is _BROKEN or self._is_empty(value) else value

    def _is_empty(self, value: object) -> bool:
        """Return true for an empty text, which stands for a missing value in tables."""
        return self.clean and isinstance(value, str) and not value.strip()

    def _get(self, path: str) -> object:
        if path in self.data:  # the name of a column may contain a dot
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
        elif _SURROGATE.search(text):
            self.fail(field, f"is {short(value)}, with half of a surrogate pair; expected valid Unicode")
        elif control := _CONTROL.search(text):
            self.fail(field, f"is {short(value)}, with the control character {control[0]!r}; expected text")
        return text + "\n" * value[len(value.rstrip()) :].count("\n") if line_ends and text else text
