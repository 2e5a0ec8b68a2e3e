"""Persons and places of WordNet, each with a few facts, read from its file ``data.noun``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOCATION, OBJECT, PERSON = "15", "17", "18"
"""Numbers of the lexicographer's files of places, of rivers and the like, and of persons."""
DIRECTIONS = (
    "northeastern", "northwestern", "southeastern", "southwestern", "northern", "southern", "eastern", "western",
    "northeast", "northwest", "southeast", "southwest", "north", "south", "east", "west", "central",
)  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """Words of one meaning.

    Attributes:
        file: number of the lexicographer's file.
        words: the words, with spaces.
        pointers: symbols and the synsets (nouns) that they lead to, such as ``@i`` for "is an instance of".
        gloss: the definition, without examples.
    """

    file: str
    words: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]
    gloss: str


@dataclass(frozen=True)
class Subject:
    """A person or place with its facts.

    Attributes:
        name: its name, of one word or more.
        group: ``person`` or ``place``.
        facts: answers by relation.
        gloss: its definition.
    """

    name: str
    group: str
    facts: Mapping[str, str]
    gloss: str


def read_synsets(file: Path) -> dict[str, Synset]:
    """Read a file of the format ``wndb`` (https://wordnet.princeton.edu/documentation/wndb5wn).

    Returns:
        Synsets by their offset in the file, in its order.

    Raises:
        ValueError: a line is not of this format.
    """
    found = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("  "):  # the licence
            continue
        try:
            head, gloss = line.split(" | ", 1)
            offset, kind, _, count, *fields = head.split(" ")
            words, rest = fields[: 2 * int(count, 16) : 2], fields[2 * int(count, 16) :]
            pointers = [(rest[i], rest[i + 1]) for i in range(1, 4 * int(rest[0]), 4) if rest[i + 2] == "n"]
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{file}, line {number}: expected a synset of the format wndb, got {line[:60]!r}"
            ) from error
        names = tuple(word.replace("_", " ") for word in words)
        found[offset] = Synset(kind, names, tuple(pointers), gloss.split('; "')[0].strip())
    return found


def read_subjects(synsets: Mapping[str, Synset], least: int = 6) -> list[Subject]:
    """Find the persons and places that have all facts of their group.

    Args:
        synsets: what :func:`read_synsets` returns.
        least: minimum number of subjects with an answer; those with a rarer one are left out.

    Returns:
        Subjects whose name no other has, in the order of the file.
    """
    found = [*_persons(synsets), *_places(synsets)]
    names = Counter(subject.name for subject in found)
    found = [subject for subject in found if names[subject.name] == 1]
    while True:  # leaving out one subject can make the other answers of it rare
        counts = Counter(item for subject in found for item in subject.facts.items())
        kept = [subject for subject in found if all(counts[item] >= least for item in subject.facts.items())]
        if len(kept) == len(found):
            return kept
        found = kept


def definitions(synsets: Mapping[str, Synset], subjects: Sequence[Subject]) -> Iterator[str]:
    """Definitions of common words, in sentences, in the order of the file."""
    names = {subject.name for subject in subjects}
    for synset in synsets.values():
        word, known = synset.words[0], any(symbol == "@i" for symbol, _ in synset.pointers)
        if not known and word not in names and 5 <= len(synset.gloss.split()) <= 24:
            yield f"{word} is {synset.gloss}."


def _persons(synsets: Mapping[str, Synset]) -> Iterator[Subject]:
    for synset in synsets.values():
        kinds = [offset for symbol, offset in synset.pointers if symbol == "@i"]
        names = [word for word in synset.words if len(word.split()) == 2 and word.replace(" ", "").isalpha()]
        nation = re.match(r"(?:an? )?(United States|[A-Z][a-z]+)\b", synset.gloss)
        born = re.search(r"\((?:born in )?(1[0-9]{2})\d[-)]", synset.gloss)
        if synset.file == PERSON and kinds and names and nation and born and nation[1] not in ("King", "Queen"):
            facts = {
                "nationality": nation[1].replace("United States", "American"),
                "profession": synsets[kinds[0]].words[0],
                "birth": f"{born[1]}0s",
            }
            yield Subject(max(names, key=len), "person", facts, synset.gloss)


def _places(synsets: Mapping[str, Synset]) -> Iterator[Subject]:
    for synset in synsets.values():
        kinds = [offset for symbol, offset in synset.pointers if symbol == "@i"]
        around = [offset for symbol, offset in synset.pointers if symbol == "#p"]
        direction = re.search(rf"\b({'|'.join(DIRECTIONS)})\b", synset.gloss)
        if synset.file in (LOCATION, OBJECT) and kinds and around and direction:
            side = direction[1]
            facts = {
                "kind": synsets[kinds[0]].words[0],
                "country": synsets[around[0]].words[0],
                "side": side if side.endswith("ern") or side == "central" else f"{side}ern",
            }
            yield Subject(synset.words[0], "place", facts, synset.gloss)
