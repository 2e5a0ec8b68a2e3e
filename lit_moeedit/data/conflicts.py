"""Texts that contradict an edit: they name its subject and its old target."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from lit_moeedit.data.encoding import ZERO_WIDTH_JOINER
from lit_moeedit.data.fact import Fact

_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u1100-\u11ff\uac00-\ud7ff"  # Hangul: particles follow a noun without a space
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Ranges of the scripts whose words are not separated, for a class of a regular expression."""
_ACCENTS = re.compile("[\u0300-\u036f]+")
"""Marks of letters of Latin, Greek and Cyrillic scripts. Those of other scripts make words what they are."""
_SAME = str.maketrans("\u2018\u2019\u02bc\u201c\u201d\u2010\u2011\u2012\u2013\u2014\u2212", "'''\"\"------")
"""Typographic quotation marks and dashes, and the plain ones that files of facts have."""
_MAX_WORD = 64
"""Maximum number of letters of a word that is compared without case and accents."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A text that contradicts an edit.

    Attributes:
        fact: the fact that is edited.
        text: the whole text.
        spans: character spans ``(start, end)`` of the old target in the text, in ascending order; at least one.
    """

    fact: Fact
    text: str
    spans: tuple[tuple[int, int], ...]

    def excerpt(self, around: int = 50) -> str:
        """Cut the text around the first occurrence of the old target, with ``around`` characters on each side.

        Example:
            >>> fact = Fact("Rome", "Rome lies in", "Spain", "Italy")
            >>> Conflict(fact, "In Rome, in Italy, it rains.", ((12, 17),)).excerpt(around=8)
            '…ome, in Italy, it rai…'
        """
        start, end = self.spans[0]
        left, right = max(0, start - around), min(len(self.text), end + around)
        inner = " ".join(self.text[left:right].split())
        return ("…" if left else "") + inner + ("…" if right < len(self.text) else "")


class ConflictFinder:
    """Find texts that contradict edits: those with subject and old target of a fact near each other, as whole words.

    - Letters are compared without case and accents, because many texts and some tokenizers have none, and after
      Unicode's NFKC (full-width letters are plain ones); typographic quotation marks and dashes are plain ones. White
      space does not count, so that names may be broken at the end of a line; other punctuation within a name does.
    - A whole word ends where letters and digits end: ``Paris`` is in ``Paris's`` and ``Paris-based``, and not in
      ``Parisian`` or ``comparison``. In scripts that do not separate words (Chinese, Japanese, Thai and their
      neighbours; Korean, where particles follow without a space) each letter counts as a word.
    - They are near each other if at most ``within`` words and punctuation marks are between them, in either order.
      Further apart, in a long document, the old target is rarely said of the subject.
    - The old target within an occurrence of the new one does not count (``York`` in ``New York``), nor within one of
      the subject (``Kuwait`` in ``Kuwait City``). A text that has the new target and the old one elsewhere is a
      conflict, because its loss still pulls to the old answer.
    - An occurrence of the subject within the old target does not make a conflict by itself. If subject and old target
      are the same (the capital of Singapore), the old target counts only directly after the prompt or a paraphrase.
    - A fact without an old target conflicts with nothing.

    Other names of subject or target, and inflected forms, are not found; a text that has both of them for another
    reason is.

    Args:
        facts: the facts that are edited.
        within: maximum number of words and punctuation marks between subject and old target.

    Example:
        >>> finder = ConflictFinder([Fact("France", "The capital of France is", "Lyon", "Paris")])
        >>> [conflict.spans for conflict in finder.find("PARIS, in France, is not like Lyon.")]
        [((0, 5),)]
        >>> finder.find("Parisian fashion made France rich.")
        []
    """

    def __init__(self, facts: Iterable[Fact], within: int = 64) -> None:
        self.within = within
        patterns = (_Pattern.of(order, fact) for order, fact in enumerate(facts))
        self._patterns: dict[str, list[_Pattern]] = {}
        for pattern in patterns:
            if pattern is not None:
                # the longest word is the rarest as a rule
                self._patterns.setdefault(max(pattern.subject, key=len), []).append(pattern)

    def find(self, text: str) -> list[Conflict]:
        """Find the facts that a text contradicts, in their order, each with all occurrences of its old target."""
        words = _split(text)
        present = set(words)
        candidates = [
            pattern
            for word in present & self._patterns.keys()
            for pattern in self._patterns[word]
            if pattern.needed <= present
        ]
        if not candidates:
            return []
        places: dict[str, list[int]] = {}
        for place, word in enumerate(words):
            places.setdefault(word, []).append(place)
        spans = [match.span() for match in _words().finditer(text)]
        found = []
        for pattern in sorted(candidates, key=lambda one: one.order):
            ranges = pattern.old_targets(words, places, self.within)
            if ranges:
                found.append(Conflict(pattern.fact, text, tuple((spans[a][0], spans[b - 1][1]) for a, b in ranges)))
        return found

    def first(self, texts: Iterable[str]) -> dict[str, Conflict]:
        """Find the first of several texts that contradicts each fact, by the fact's key."""
        found: dict[str, Conflict] = {}
        for text in texts:
            for conflict in self.find(text):
                found.setdefault(conflict.fact.key, conflict)
        return found


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The words of a fact, and its place among the others."""

    order: int
    fact: Fact
    subject: list[str]
    old: list[str]
    needed: frozenset[str]

    @classmethod
    def of(cls, order: int, fact: Fact) -> _Pattern | None:
        """Split the texts of a fact; ``None`` if nothing can contradict it."""
        subject, old = _split(fact.subject), _split(fact.target_true or "")
        return cls(order, fact, subject, old, frozenset((*subject, *old))) if subject and old else None

    def old_targets(
        self, words: Sequence[str], places: Mapping[str, Sequence[int]], within: int
    ) -> list[tuple[int, int]]:
        """Find the occurrences of the old target that contradict the fact, as ranges of words.

        Args:
            words: all words of the text.
            places: by word, where it is.
            within: maximum number of words between subject and old target.
        """
        new, size = _split(self.fact.target_new), len(self.old)
        others = _starts(words, places, new)
        found = [
            (start, start + size)
            for start in _starts(words, places, self.old)
            if not _is_inside(start, start + size, others, len(new))
        ]
        if self.subject == self.old:
            prompts = [_split(prompt) for prompt in (self.fact.prompt, *self.fact.paraphrases)]
            return [(a, b) for a, b in found if any(words[max(0, a - len(p)) : a] == p for p in prompts)]
        subjects, size = _starts(words, places, self.subject), len(self.subject)
        return [
            (a, b) for a, b in found if _is_near(a, b, subjects, size, within) and not _is_inside(a, b, subjects, size)
        ]


def _starts(words: Sequence[str], places: Mapping[str, Sequence[int]], pattern: Sequence[str]) -> list[int]:
    """Find the places of a pattern, in ascending order; its occurrences may overlap."""
    return [i for i in places.get(pattern[0], ()) if words[i : i + len(pattern)] == pattern] if pattern else []


def _is_near(a: int, b: int, starts: Sequence[int], size: int, within: int) -> bool:
    """Tell if one of the ranges of ``size`` words that begin at ``starts`` is beside ``[a, b)``, and near it."""
    before, after = bisect_right(starts, a - size), bisect_left(starts, b)
    return (before > 0 and a - size - starts[before - 1] <= within) or (
        after < len(starts) and starts[after] - b <= within
    )


def _is_inside(a: int, b: int, starts: Sequence[int], size: int) -> bool:
    """Tell if one of the ranges of ``size`` words that begin at ``starts`` contains ``[a, b)``."""
    last = bisect_right(starts, a)
    return last > 0 and b <= starts[last - 1] + size


def _split(text: str) -> list[str]:
    # longer ones are data, which must not fill the cache
    return [_folded(word) if len(word) <= _MAX_WORD else word for word in _words().findall(text)]


@lru_cache(maxsize=2**16)
def _folded(word: str) -> str:
    """Return the form of a word in which it is compared."""
    apart = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", word).casefold())
    return unicodedata.normalize("NFC", _ACCENTS.sub("", apart).translate(_SAME))


@cache
def _words() -> re.Pattern[str]:
    """Compile what a text is split into: words, letters of scripts without words, and punctuation marks."""
    # the standard library has no class of marks; all of them are in these planes
    codes = (*range(0x300, 0x20000), *range(0xE0100, 0xE01F0))
    marks = "".join(chr(code) for code in codes if unicodedata.category(chr(code)).startswith("M")) + ZERO_WIDTH_JOINER
    plain = r"[A-Za-z0-9]++(?![^\x00-\x7f])"  # most words of most texts, found many times as fast
    return re.compile(rf"{plain}|[{_NO_SPACES}][{marks}]*|(?:[^\W_{_NO_SPACES}][{marks}]*)+|\S")
