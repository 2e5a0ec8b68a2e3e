"""Typed access to an untrusted row of a source of facts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from numbers import Integral, Real
from typing import Any

from lit_moeedit.data.errors import short, typed

TEXT_LIMIT = 2**16
"""Maximum number of characters of a text: no prompt is as long, and longer ones would block a tokenizer or model."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")  # all but tabs and line ends
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_MISSING, _BROKEN = object(), object()


class Number(str):
    """A number with a fraction or an exponent, as the file writes it: 3.10 is not 3.1."""

    __slots__ = ()


_NEAR = 0.83
"""Similarity from which a key counts as misspelled: `target_true` and `target_new` have 0.76."""


def near_key(name: str, keys: Iterable[object]) -> str | None:
    """Return the key that was most likely meant to be ``name``; ``None`` if none is near.

    Example:
        >>> near_key("prompt", ["subject", "prompts"])
        'prompts'
    """
    # a file may have any number of keys
    texts = [key for key in islice(keys, 100) if isinstance(key, str)]
    return next(iter(get_close_matches(name, texts, n=1, cutoff=_NEAR)), None)


class Row:
    """Typed access to an untrusted row, which collects all problems instead of stopping at the first.

    Other projects write a single text also as a list of one text, and an answer as `{"str": text}`, as a number or as a
    truth value. Such values are read as texts where `clean` is true.

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
        self.remarks: Counter[str] = Counter()
        """Numbers of parts that were left out or changed, by a description in the plural."""
        self._prefix = ""
        self._found: dict[str, str] = {}  # field -> where its text was found, if that is not its name

    def fail(self, field: str, message: str) -> None:
        """Record a problem of `field`, up to 100 of them."""
        problem = (self._prefix + field, message)
        if len(self.problems) < 100 and problem not in self.problems:
            self.problems.append(problem)

    def text(self, path: str, *, line_ends: bool = False, answer: bool = False) -> str:
        """Return the required text at a dotted `path`; `""` after a problem.

        `line_ends` keeps line ends after the text, because a chat template may end with one before the answer.
        `answer` allows a number or a truth value.
        """
        name = self.names(path)[0]
        value = self._get(name)
        if value is _MISSING:
            near = near_key(name, self.data)
            self.fail(name, f"is missing{f', but there is {short(near)}' if near else ''}; expected a text")
        if value is _MISSING or value is _BROKEN:
            return ""
        self._found[path], value = self._unwrapped(name, value)
        return self._text(self._found[path], value, line_ends, answer)

    def text_or_none(self, path: str) -> str | None:
        """Return the text at a dotted `path`; `None` if it is absent, null or empty."""
        value = self._optional(name := self.names(path)[0])
        return None if value is None else self._text(*self._unwrapped(name, value), answer=True)

    def texts(self, path: str, *, single: bool = False, line_ends: bool = False) -> tuple[str, ...]:
        """Return the texts at `path`; `()` if it is absent, null or empty. `single` allows one text instead of a list.

        Empty texts in the list are left out.
        """
        entries = self._entries(path, str if single else ())
        return tuple(self._text(name, item, line_ends) for name, item in entries if not self._is_empty(item))

    def answers(self, path: str) -> tuple[str, ...]:
        """Return the answers at `path`, one or nested lists of them; `()` if it is absent, null or empty."""
        value = self._optional(name := self.names(path)[0])
        if value is None:
            return ()
        items = [item for item in _flat(value) if not self._is_empty(_inner(item))]
        fields = [f"{name}[{index}]" for index in range(len(items))] if isinstance(value, list | tuple) else [name]
        return tuple(
            self._text(*self._unwrapped(field, item), answer=True) for field, item in zip(fields, items, strict=False)
        )

    def pairs(self, prompts: str, answers: str, *, line_ends: bool = False, open: bool = False) -> list[list[str]]:
        """Return prompts with their answers, each one text or a list of as many texts; empty pairs are left out.

        `open` also leaves out prompts without an answer, with a remark.
        """
        asked, given = self._entries(prompts, object), self._entries(answers, object)
        if open and not any(not self._is_empty(_inner(value)) for _, value in asked):
            return []
        if open and not any(not self._is_empty(_inner(value)) for _, value in given):
            given = [(f"{answers}[{index}]", None) for index in range(len(asked))]
        if len(asked) != len(given):
            expected = f"expected {len(asked)}, one for each of {self.names(prompts)[0]}"
            self.fail(self.names(answers)[0], f"has {len(given)} texts; {expected}")
        found = []
        for (name, prompt), (field, answer) in zip(asked, given, strict=False):
            if self._is_empty(_inner(answer)) and (open or self._is_empty(prompt)):
                self.remarks["neighbours without an answer (left out)"] += not self._is_empty(prompt)
                continue
            field, answer = self._unwrapped(field, answer)
            found.append([self._text(name, prompt, line_ends), self._text(field, answer, answer=True)])
        return found

    def rows(self, path: str) -> list[Row]:
        """Return the objects at `path`, if there are any; their problems are added to those of this row."""
        inner_rows = []
        for index, item in enumerate(self._list(path, self._optional(path), "objects")):
            if not isinstance(item, Mapping):
                self.fail(f"{path}[{index}]", f"is {typed(item)}; expected an object")
                continue
            inner = Row(item, clean=self.clean)
            inner.problems, inner._prefix = self.problems, f"{self._prefix}{path}[{index}]."
            inner.remarks = self.remarks
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

    def where(self, path: str) -> str:
        """Return the place in the row at which the text of a field was found, or its first name."""
        return self._found.get(path, self.names(path)[0])

    def _optional(self, path: str) -> object:
        """Return the value at a path; `None` if it is absent or empty. Columns given by the user are required."""
        value = self._get(path)
        if value is _MISSING and path in self.required:
            self.fail(path, "is missing; expected the column given in columns")
        return None if value is _MISSING or value is _BROKEN or self._is_empty(value) else value

    def _is_empty(self, value: object) -> bool:
        """Return true for null, an empty text and NaN, which stand for a missing value in lists and tables."""
        if not self.clean:
            return False
        is_nan = isinstance(value, float) and math.isnan(value)
        return value is None or is_nan or (isinstance(value, str) and not value.strip())

    def _unwrapped(self, field: str, value: object) -> tuple[str, object]:
        """Return the text in a list of one text or in an object `{"str": text}`, with its field."""
        inner = _inner(value) if self.clean else value
        is_object = inner is not value and any(isinstance(item, Mapping) for item in _layers(value))
        return (f"{field}.str" if is_object else field), inner

    def _entries(self, path: str, single: type | tuple[type, ...]) -> list[tuple[str, object]]:
        """Return the entries of the lists at the names of `path`, each with its field; or a `single` value."""
        found: list[tuple[str, object]] = []
        for name in self.names(path):
            value = self._optional(name)
            if value is not None and not isinstance(value, list | tuple) and isinstance(value, single):
                found.append((name, value))
            else:
                entries = enumerate(self._list(name, value, "texts"))
                found += [(f"{name}[{index}]", item) for index, item in entries]
        return found

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

    def _text(self, field: str, value: object, line_ends: bool = False, answer: bool = False) -> str:
        if answer and self.clean:
            value = _written(value)
        if not isinstance(value, str) or (isinstance(value, Number) and not answer):
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


def _layers(value: object) -> Iterator[object]:
    """Yield a value and what is inside of it, as long as it is a list of one or an object with a text."""
    yield value
    while True:
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        elif isinstance(value, Mapping) and "str" in value:
            value = value["str"]
        else:
            return
        yield value


def _inner(value: object) -> object:
    *_, inner = _layers(value)
    return inner


def _flat(value: object) -> Iterator[object]:
    """Yield the items of nested lists (of answers, and of spellings of an answer)."""
    stack = [value]  # no recursion: a file may nest deeper than Python's stack
    while stack:
        item = stack.pop()
        if isinstance(item, list | tuple):
            stack += reversed(item)
        else:
            yield item


def _written(value: object) -> object:
    """Return a number or a truth value as JSON writes it; other values as they are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    is_number = isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))
    return str(value) if is_number else value
