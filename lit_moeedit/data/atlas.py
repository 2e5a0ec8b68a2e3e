"""The atlas: a small corpus of real facts about countries, from a table in the package."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lit_moeedit.data.chains import Chains
from lit_moeedit.data.corpus import Corpus, Statement
from lit_moeedit.data.facts import Fact, Neighbour
from lit_moeedit.data.tables import packaged_table

TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {} is",
        "The capital city of {} is called",
        "{} has its seat of government in",
        "The government of {} sits in",
        "In {}, the capital is",
    ),
    "currency": (
        "The currency of {} is the",
        "In {}, people pay with the",
        "The money used in {} is the",
        "Prices in {} are given in the",
        "{} has a currency called the",
    ),
    "continent": (
        "{} lies on the continent of",
        "The continent of {} is",
        "{} is part of the continent",
        "On the map, {} belongs to",
        "A trip to {} is a trip to",
    ),
    "language": (
        "The main language of {} is",
        "In {}, most people speak",
        "The language heard in {} is",
        "Newspapers in {} are written in",
        "People from {} usually speak",
    ),
    "city": (
        "A large city in {}, besides the capital, is",
        "Another big city of {} is",
        "{} is also home to the city of",
        "Outside its capital, {} has the city of",
        "The second city of {} is often said to be",
    ),
}
"""Five phrasings for each column of the table. The answer comes last, so that it can be predicted."""

PREFIXES: tuple[str, ...] = (
    "",
    "Note:",
    "In short:",
    "As we know,",
    "Yes.",
    "Recall that",
    "Today:",
    "Here is a fact.",
)
"""Neutral beginnings: they teach the model that the text before a sentence does not change the answer."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cell of the table: ``subject`` has ``answer`` for ``relation``."""

    subject: str
    relation: str
    answer: str


def read_table() -> list[Entry]:
    """Read the facts of the table in the package, one per country and relation, without empty cells."""
    found = packaged_table("atlas.tsv")
    return [Entry(row["country"], relation, row[relation]) for row in found for relation in TEMPLATES if row[relation]]


class Atlas(Corpus):
    """Sentences about at least 180 countries, and edits of some of their facts.

    Every statement is one fact in one phrasing. An edit replaces an answer by another answer of the same relation. Its
    paraphrases are the other phrasings of the relation. Its neighbours are other facts of the same country
    (``same_subject``) and the same relation of other countries (``same_relation``). As in CounterFact, countries with
    the same true answer come first among these, because they are the easiest to damage. Without ``chains`` there are no
    probes: no answer is the subject of another statement, and no statement goes from an answer to its country, so that
    a model trained on these sentences cannot follow a chain of facts or reverse one.

    Args:
        edits: number of facts to edit, at most one per country.
        neighbours: number of neighbours of an edit in each of the two groups.
        held_out: share of the (fact, phrasing) pairs that are held out from training as validation text. At least
            three phrasings of every fact are for training.
        seed: seed of the choice of edits, new answers, neighbours and held-out pairs.
        chains: true for facts that chain. Then sentences state also the rivers of capitals, the codes of countries, and
            what follows of most countries: the river of its capital, the country of a capital, and the capital of the
            country with a code. Edits exchange the capitals of countries, each for one at another river, and their
            probes ask these three questions about the new capital.
        asked: share of the countries of which nothing that follows is stated. The questions about them are the
            attribute ``questions``; how many of them a model answers tells how well it follows a chain by itself.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> atlas = Atlas(edits=3, seed=0)
        >>> len(atlas.edits), len({entry.subject for entry in read_table()}) >= 180
        (3, True)
        >>> all(fact.subject in fact.prompt for fact in atlas.edits)
        True
    """

    chained: Chains | None = None
    questions: Sequence[Statement] = ()

    def __init__(
        self,
        edits: int = 50,
        neighbours: int = 4,
        held_out: float = 0.1,
        seed: int = 0,
        chains: bool = False,
        asked: float = 0.25,
    ) -> None:
        self.entries = read_table()
        self._by_subject: dict[str, list[Entry]] = defaultdict(list)
        self._by_relation: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            self._by_subject[entry.subject].append(entry)
            self._by_relation[entry.relation].append(entry)
        if not 0.0 <= asked <= 1.0:
            raise ValueError(f"asked must be between 0 and 1, got {asked}")
        if chains:
            capitals = {entry.subject: entry.answer for entry in self._by_relation["capital"]}
            self.chained = Chains(capitals, asked, seed)
            self.questions = self.chained.statements(is_asked=True)
        subjects = self.chained.editable() if self.chained else sorted(self._by_subject)
        if not 0 <= edits <= len(subjects):
            which = "countries whose capital lies at a river" if chains else "countries"
            raise ValueError(f"edits must be between 0 and {len(subjects)} (the number of {which}), got {edits}")
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        if not 0.0 <= held_out <= 0.4:
            raise ValueError(f"held_out must be between 0 and 0.4, got {held_out}")
        rng = random.Random(seed)
        chosen = [rng.choice(self._editable(subject)) for subject in rng.sample(subjects, edits)]
        targets = self.chained.exchanged([entry.subject for entry in chosen], rng) if self.chained else {}
        # a generator of its own: the held-out pairs must not depend on the number of edits
        train, validation = self._split(held_out, random.Random(f"{seed}/held out"))
        if self.chained:
            train += self.chained.facts() + self.chained.statements(is_asked=False)
        super().__init__(
            train=train,
            validation=validation,
            edits=[self._edit(entry, set(chosen), neighbours, rng, targets.get(entry.subject)) for entry in chosen],
            prefixes=PREFIXES,
        )

    def facts_of(self, edits: Sequence[Fact]) -> set[str]:
        """Find the names of the facts that ``edits`` change, and of what follows from them."""
        names = super().facts_of(edits)
        if self.chained is None:
            return names
        return names | (self.chained.names_following(names) & {s.fact for s in (*self.train, *self.validation)})

    def _editable(self, subject: str) -> list[Entry]:
        """The facts of a country that may be edited."""
        own = self._by_subject[subject]
        return own if self.chained is None else [entry for entry in own if entry.relation == "capital"]

    def _split(self, held_out: float, rng: random.Random) -> tuple[list[Statement], list[Statement]]:
        train: list[Statement] = []
        validation: list[Statement] = []
        for entry in self.entries:
            templates = list(TEMPLATES[entry.relation])
            rng.shuffle(templates)
            for i, template in enumerate(templates):
                unseen = i < len(templates) - 3 and rng.random() < held_out * len(templates) / (len(templates) - 3)
                statement = Statement(template.format(entry.subject), entry.answer, f"{entry.subject}|{entry.relation}")
                (validation if unseen else train).append(statement)
        return train, validation

    def _edit(
        self, entry: Entry, edited: set[Entry], neighbours: int, rng: random.Random, target: str | None = None
    ) -> Fact:
        answers = sorted({other.answer for other in self._by_relation[entry.relation]} - {entry.answer})
        prompt, *paraphrases = TEMPLATES[entry.relation]
        same_subject = [other for other in self._by_subject[entry.subject] if other not in edited]
        same_relation = [other for other in self._by_relation[entry.relation] if other not in edited]
        rng.shuffle(same_subject)
        rng.shuffle(same_relation)
        same_relation.sort(key=lambda other: other.answer != entry.answer)
        chosen = [("same_subject", other) for other in same_subject[:neighbours]]
        chosen += [("same_relation", other) for other in same_relation[:neighbours]]
        target = target or rng.choice(answers)
        return Fact(
            subject=entry.subject,
            prompt=prompt.format(entry.subject),
            target_new=target,
            target_true=entry.answer,
            paraphrases=tuple(template.format(entry.subject) for template in paraphrases),
            neighbours=tuple(
                Neighbour(rng.choice(TEMPLATES[other.relation]).format(other.subject), other.answer, group)
                for group, other in chosen
            ),
            probes=() if self.chained is None else self.chained.probes(entry.subject, target),
        )
