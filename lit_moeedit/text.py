"""Texts of files, users and libraries in messages: safe for a terminal, and bounded in length."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def printable(text: str, keep: str = "") -> str:
    r"""Escape control characters, and characters that change the direction of writing.

    Args:
        text: The text, which may come from an untrusted file.
        keep: Characters that stay as they are, such as the line breaks of our own messages.

    Example:
        >>> printable("\x1b[31mRome\u202e\n")
        '\\x1b[31mRome\\u202e\\n'
        >>> printable("Rome\nis", keep="\n")
        'Rome\nis'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def brief(error: BaseException) -> str:
    r"""Put the message of an error, which libraries spread over many lines, into one of at most 200 characters.

    Example:
        >>> brief(ValueError("first\n  second"))
        'first second'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def first_few(items: Iterable[object], count: int = 5, *, total: int | None = None) -> str:
    """List the first items, separated by commas, and the number of the others.

    Args:
        items: The items.
        count: Maximum number of items to list.
        total: Number of items, if ``items`` has only the first of them.

    Example:
        >>> first_few(["a", "b", "c"], count=2)
        'a, b and 1 more'
        >>> first_few(["a", "b"])
        'a, b'
    """
    texts = [str(item) for item in items]
    more = (len(texts) if total is None else total) - min(count, len(texts))
    return ", ".join(texts[:count]) + (f" and {more:,} more" if more else "")


def counted(number: int, noun: str) -> str:
    """Put a number before a noun in the singular or the plural.

    Example:
        >>> counted(1, "fact"), counted(1200, "fact")
        ('1 fact', '1,200 facts')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nearest(name: str, names: Iterable[str]) -> str:
    """Ask for the nearest of the valid names; empty if none is near.

    Example:
        >>> nearest("clampp", ["clamp", "steps"])
        " (did you mean 'clamp'?)"
        >>> nearest("clampp", ["steps"])
        ''
    """
    lower = {each.lower(): each for each in names}
    found = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" (did you mean {lower[found[0]]!r}?)" if found else ""


def near_path(path: str | Path) -> str:
    """Ask for the nearest path that exists, by the first part of a path that does not; empty if none is near.

    Example:
        >>> near_path("/nowhere/else")
        ''
    """
    missing = Path(path).expanduser()
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        return ""
    found = get_close_matches(missing.name, names, n=1)
    return f" (did you mean {str(missing.parent / found[0])!r}?)" if found else ""


class MissingFileError(FileNotFoundError):
    """Raised for a path at which there is nothing.

    Args:
        path: the path.
        kind: kind of file that is expected there.

    Attributes:
        path: the path.

    Example:
        >>> str(MissingFileError("/nowhere/else.jsonl", "facts file"))
        'there is no facts file /nowhere/else.jsonl'
    """

    def __init__(self, path: str | Path, kind: str = "file") -> None:
        super().__init__(f"there is no {kind} {path}{near_path(path)}")
        self.path = str(path)


def count(value: int) -> str:
    """Format a number of parameters.

    Example:
        >>> count(1500), count(52_500_000), count(30_530_000_000)
        ('1,500', '52.5 million', '30.5 billion')
    """
    if value >= 10**9:
        return f"{value / 1e9:.1f} billion"
    return f"{value / 1e6:.1f} million" if value >= 10**6 else f"{value:,}"
