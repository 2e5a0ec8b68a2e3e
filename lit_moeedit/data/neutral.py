"""The text on which a model keeps its behaviour outside of training: a user's own, or a small neutral one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lit_moeedit.pretrained import read_lines

log = logging.getLogger(__name__)


def neutral_texts() -> list[str]:
    """Return some sixty short texts in several styles and languages, code among them.

    They were written for this package and are in the public domain (CC0 1.0). They are better than nothing: a user's
    own text, of the kind that the model is used on, preserves more of what matters to them.

    Example:
        >>> len(neutral_texts()) > 50
        True
    """
    text = (files(__package__) / "neutral.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def texts_to_preserve(source: str | Path | Sequence[str] | None, warn: bool = True) -> list[str]:
    """Return the texts of a file with one document per line, or given ones, without blank ones.

    Args:
        source: the file or the texts; ``None`` for the neutral texts.
        warn: whether to warn of the latter; of several ranks one does.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8, or there is no text.
    """
    if source is None:
        log.log(
            logging.WARNING if warn else logging.DEBUG,
            "no text to preserve is given, so a small neutral text of lit_moeedit is preserved; text of the kind that "
            "the model is used on preserves more: --preservation FILE, with one document per line",
        )
        return neutral_texts()
    if isinstance(source, str | Path):
        source = read_lines(source, "preservation text")
    texts = [text for text in source if text.strip()]
    if not texts:
        raise ValueError("the preservation text is empty")
    return texts
