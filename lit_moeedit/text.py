"""Texts of files, users and libraries in messages: safe for a terminal, and bounded in length."""

from __future__ import annotations

from collections.abc import Iterable


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
