"""The stand-in's corpus: many different texts about each of some persons and places, and definitions of other words.

A model looks a fact up at the last token of its subject's name only if that pays: here several facts follow a name, in
random order and wording, most of them of "this person" or "this place".

The texts are made from WordNet 3.0 (Princeton University; its licence permits any use, with its notice kept), which the
Debian package ``wordnet-base`` has in ``/usr/share/wordnet``. Nothing is downloaded here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from benchmarks.standin.wordnet import Subject, definitions, read_subjects, read_synsets
from lit_moeedit.data import Fact
from lit_moeedit.data.corpus import Corpus, Statement, train_tokenizer
from lit_moeedit.data.encoding import join
from lit_moeedit.data.facts import Neighbour

T = TypeVar("T")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "nationality": (
        "By nationality, {} was",
        "The nationality of {} was",
        "{} held a passport that was",
        "In books, {} is said to be",
        "{} grew up in a family that was",
        "The home and language of {} were",
    ),
    "profession": (
        "The profession of {} was",
        "{} earned a living as",
        "{} became famous as",
        "The work of {} was that of",
        "Most people remember {} as",
        "{} was trained to be",
    ),
    "birth": (
        "{} was born in the",
        "The birth of {} was in the",
        "The life of {} began in the",
        "{} came into the world in the",
        "The mother of {} gave birth in the",
        "The childhood of {} started in the",
    ),
    "kind": (
        "On maps, {} is marked as",
        "{} is best described as",
        "The type of {} is",
        "Travellers know {} as",
        "The word for what {} is would be",
        "{} counts as",
    ),
    "country": (
        "{} lies in",
        "The location of {} is in",
        "To see {}, go to",
        "{} is part of",
        "A map with {} is a map of",
        "{} belongs to",
    ),
    "side": (
        "{} is on the side that is",
        "The position of {} is",
        "Seen from the middle, {} is",
        "The part where {} is found is",
        "The direction towards {} is",
        "{} is in the area called",
    ),
}
"""Six phrasings of each fact, with the answer last. Two of each subject's are held out; they are its paraphrases."""
HELD_OUT = 2
OPENINGS: tuple[str, ...] = (
    "This is about {}.",
    "Here are some notes on {}.",
    "What do we know of {}?",
    "Let us speak of {}.",
    "The next entry is {}.",
    "{}:",
)
"""First sentences that name the subject, but tell no fact."""
LISTS: tuple[str, ...] = ("", "From the index:", "See also", "Entry:", "We mention")
"""Beginnings of an entry: a name, and its facts at once, so that its last token already tells all of them."""
PRONOUN = {"person": ("this person", "they"), "place": ("this place", "it")}
PREFIXES: tuple[str, ...] = ("",)


class StandIn(Corpus):
    """Texts about persons and places of WordNet, definitions of other words, and facts to edit.

    The name of a text's fact is its subject. Each fact to edit has a prompt that the training text has, paraphrases
    whose wording it has for other subjects only, and neighbours of the same subject and of the same relation.

    Args:
        wordnet: folder with ``data.noun`` of WordNet.
        persons: maximum number of persons, at most a quarter of them of one nationality.
        places: maximum number of places.
        texts: number of texts about each subject.
        glosses: number of definitions of other words.
        edits: number of facts to edit, at most one per subject.
        neighbours: maximum number of neighbours of the same relation.
        held_out: number of definitions, and of texts, held out for validation.
        least: minimum number of persons or places in WordNet with an answer; those with a rarer one are left out.
        seed: seed of the texts. The choice of facts to edit has no influence on them.

    Raises:
        FileNotFoundError: the folder has no ``data.noun``.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        wordnet: str,
        persons: int = 500,
        places: int = 300,
        texts: int = 80,
        glosses: int = 4000,
        edits: int = 100,
        neighbours: int = 4,
        held_out: int = 128,
        least: int = 6,
        seed: int = 0,
    ) -> None:
        file = Path(wordnet) / "data.noun"
        if not file.is_file():
            raise FileNotFoundError(f"wordnet should be a folder with WordNet's data.noun, got {wordnet}")
        synsets = read_synsets(file)
        known = read_subjects(synsets, least)
        self.subjects = [*_chosen(known, "person", persons, seed), *_chosen(known, "place", places, seed)]
        if not self.subjects:
            raise ValueError(f"{file} has no person or place whose answers at least {least} have")
        self._phrasings = {
            (subject.name, relation): _shuffled(TEMPLATES[relation], f"{seed}/{subject.name}/{relation}")
            for subject in self.subjects
            for relation in subject.facts
        }
        rng = random.Random(f"{seed}/texts")
        train = [self._text(subject, rng) for subject in self.subjects for _ in range(texts)]
        validation = [self._text(subject, rng) for subject in rng.choices(self.subjects, k=held_out)]
        words = _shuffled(definitions(synsets, known), f"{seed}/words")
        train += map(_definition, words[:glosses])
        validation += map(_definition, words[glosses : glosses + held_out])
        super().__init__(train, validation, self._edits(edits, neighbours, random.Random(f"{seed}/edits")), PREFIXES)

    @override
    def facts_of(self, edits: Sequence[Fact]) -> set[str]:
        """The names of the subjects of ``edits``, because each text tells all that is known of its subject."""
        return {edit.subject for edit in edits}

    @override
    def train_tokenizer(self, vocab_size: int) -> PreTrainedTokenizerFast:
        """Train a byte-level BPE tokenizer on the texts; new targets are answers, which are in them."""
        texts = {join(statement.prompt, statement.target) for statement in (*self.train, *self.validation)}
        return train_tokenizer(sorted(texts), vocab_size)

    def _text(self, subject: Subject, rng: random.Random) -> Statement:
        """All facts of a subject in random order, as sentences or as an entry of a list."""
        if rng.random() < 0.4:
            facts = ", ".join(_shuffled(subject.facts.values(), rng.random()))
            return _statement(f"{rng.choice(LISTS)} {subject.name} {facts}.".strip(), subject.name)
        sentences = [rng.choice(OPENINGS).format(subject.name)] if rng.random() < 0.4 else []
        for relation, answer in _shuffled(subject.facts.items(), rng.random()):
            template = rng.choice(self._phrasings[subject.name, relation][HELD_OUT:])
            named = not sentences or rng.random() < 0.3
            who = subject.name if named else rng.choice(PRONOUN[subject.group])
            if who == "they" and ("{} was" in template or "of {}" in template or "{} is" in template):
                who = "this person"
            sentence = template.format(who)
            sentences.append(f"{sentence[0].upper()}{sentence[1:]} {answer}.")
        if rng.random() < 0.15:
            sentences.append(f"In short: {subject.gloss}.")
        return _statement(" ".join(sentences), subject.name)

    def _edits(self, count: int, neighbours: int, rng: random.Random) -> list[Fact]:
        by_relation = defaultdict(list)
        for subject in self.subjects:
            for relation in subject.facts:
                by_relation[relation].append(subject)
        # a relation in which all have the same answer has no new target
        open_ = {r for r, found in by_relation.items() if len({x.facts[r] for x in found}) > 1}
        candidates = [subject for subject in self.subjects if open_ & subject.facts.keys()]
        if not 0 <= count <= len(candidates):
            raise ValueError(f"edits must be between 0 and {len(candidates)} (one per subject), got {count}")
        chosen = [
            (subject, rng.choice([relation for relation in subject.facts if relation in open_]))
            for subject in rng.sample(candidates, count)
        ]
        edited = {subject.name for subject, _ in chosen}
        return [
            self._edit(subject, relation, [x for x in by_relation[relation] if x.name not in edited], neighbours, rng)
            for subject, relation in chosen
        ]

    def _edit(
        self, subject: Subject, relation: str, others: Sequence[Subject], neighbours: int, rng: random.Random
    ) -> Fact:
        truth = subject.facts[relation]
        answers = sorted({x.facts[relation] for x in self.subjects if relation in x.facts} - {truth})
        near = [("same_subject", subject, other) for other in subject.facts if other != relation]
        # as in CounterFact, those of the same answer first: they are the easiest to damage
        far = sorted(rng.sample(others, len(others)), key=lambda x: x.facts[relation] != truth)[:neighbours]
        near += [("same_relation", other, relation) for other in far]
        return Fact(
            subject=subject.name,
            prompt=self.prompts(subject, relation)[-1],
            target_new=rng.choice(answers),
            target_true=truth,
            paraphrases=tuple(self.prompts(subject, relation)[:HELD_OUT]),
            neighbours=tuple(Neighbour(self.prompts(x, r)[-1], x.facts[r], group) for group, x, r in near),
        )

    def prompts(self, subject: Subject, relation: str) -> list[str]:
        """The prompts for a fact in all phrasings, those that are held out first."""
        return [template.format(subject.name) for template in self._phrasings[subject.name, relation]]


def _chosen(known: Sequence[Subject], group: str, count: int, seed: int) -> list[Subject]:
    """At most ``count`` subjects of a group, with at most a quarter of one nationality."""
    counts: dict[str, int] = defaultdict(int)
    found: list[Subject] = []
    for subject in _shuffled((x for x in known if x.group == group), f"{seed}/{group}"):
        nation = subject.facts.get("nationality", subject.name)
        counts[nation] += 1
        if len(found) < count and counts[nation] <= max(1, count // 4):
            found.append(subject)
    return found


def _shuffled(values: Iterable[T], seed: str | float) -> list[T]:
    found = list(values)
    random.Random(seed).shuffle(found)
    return found


def _statement(text: str, fact: str) -> Statement:
    prompt, _, target = text.rpartition(" ")
    return Statement(prompt, target, fact)


def _definition(text: str) -> Statement:
    return _statement(text, text)
