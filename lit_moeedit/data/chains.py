"""Statements of the atlas that follow from others: over a capital to its river, the other way round, and by code."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property

from lit_moeedit.data.corpus import Statement
from lit_moeedit.data.probes import Probe, ProbeKind
from lit_moeedit.data.tables import packaged_table

RIVER: tuple[str, ...] = (
    "The river that flows through {} is the",
    "{} lies on the river",
    "The river of {} is called the",
    "The name of the river at {} is the",
    "On a map, the river at {} is the",
)
"""Phrasings of the river of a capital."""
QUESTIONS: Mapping[ProbeKind, tuple[str, ...]] = {
    "multi_hop": (
        "The river that flows through the capital of {} is the",
        "The capital of {} lies on the river",
        "The river of the capital of {} is called the",
    ),
    "portability": (
        "The capital of the country {} is",
        "The capital city of the country {} is called",
        "The country {} has its seat of government in",
    ),
    "reversed": (
        "{} is the capital of",
        "{} is the capital city of the country",
        "{} is the seat of the government of",
    ),
}
"""Phrasings of three questions: the river of a country's capital, the capital of the country with a code, and the
country of a capital."""
_TRIES = 1000


class Chains:
    """Statements of an atlas whose facts chain, besides its table, and questions about an edited capital.

    Args:
        capitals: the capital of each country.
        asked: share of the countries of which nothing is stated that follows from other statements. How many of these
            questions a model answers tells how well it follows a chain of facts by itself.
        seed: seed of their choice.
    """

    def __init__(self, capitals: Mapping[str, str], asked: float, seed: int) -> None:
        self.capitals = capitals
        countries = sorted(capitals)
        self.asked_countries = set(random.Random(f"{seed}/chains").sample(countries, round(asked * len(countries))))

    @cached_property
    def rivers(self) -> dict[str, str]:
        """The river of each capital that has one."""
        known = set(self.capitals.values())
        return {row["capital"]: row["river"] for row in packaged_table("rivers.tsv") if row["capital"] in known}

    @cached_property
    def codes(self) -> dict[str, str]:
        """The code of two letters of each country, as GeoNames has it."""
        return {row["country"]: row["iso"] for row in packaged_table("atlas.tsv") if row["country"] in self.capitals}

    def editable(self) -> list[str]:
        """Return the countries whose capital lies at a river, sorted."""
        return [country for country, capital in sorted(self.capitals.items()) if capital in self.rivers]

    def exchanged(self, countries: Sequence[str], rng: random.Random) -> dict[str, str]:
        """Draw a new capital for each country, that of another one of them, at another river.

        So no capital has two countries after the edits, and no statement of another country answers for one.

        Raises:
            ValueError: there is no such exchange.
        """
        old = [self.capitals[country] for country in countries]
        for _ in range(_TRIES):
            new = rng.sample(old, len(old))
            if all(self.rivers[one] != self.rivers[other] for one, other in zip(old, new, strict=True)):
                return dict(zip(countries, new, strict=True))
        raise ValueError(
            f"edits is {len(old)}, and their capitals cannot be exchanged so that each gets another river; with "
            "chains, more edits are expected, or another seed"
        )

    def facts(self) -> list[Statement]:
        """Return the statements that questions over two facts need besides capitals: rivers, and codes."""
        found = [
            Statement(template.format(capital), river, f"{capital}|river")
            for capital, river in self.rivers.items()
            for template in RIVER
        ]
        for country, code in self.codes.items():
            found.append(Statement(f"The country {code} is", country, f"{country}|code"))
            found.append(Statement(f"The code of {country} is", code, f"{country}|code"))
        return found

    def following(self, country: str, capital: str) -> list[tuple[ProbeKind, str, str]]:
        """Return what follows if a country has this capital: kind, prompt and answer."""
        filled: dict[ProbeKind, tuple[str, str | None]] = {
            "multi_hop": (country, self.rivers.get(capital)),
            "portability": (self.codes[country], capital),
            "reversed": (capital, country),
        }
        return [
            (kind, template.format(subject), answer)
            for kind, (subject, answer) in filled.items()
            if answer is not None
            for template in QUESTIONS[kind]
        ]

    def statements(self, is_asked: bool) -> list[Statement]:
        """Return what follows for the countries of which it is stated, or for those of which it is asked alone."""
        return [
            Statement(prompt, answer, _following_name(country, kind))
            for country, capital in self.capitals.items()
            if (country in self.asked_countries) == is_asked
            for kind, prompt, answer in self.following(country, capital)
        ]

    def names_following(self, names: set[str]) -> set[str]:
        """Return the names of what follows from facts of these names: capitals, rivers and codes."""
        found: set[str] = set()
        for country, capital in self.capitals.items():
            if f"{country}|capital" in names:
                found |= {_following_name(country, kind) for kind in QUESTIONS}
            if f"{capital}|river" in names:
                found.add(_following_name(country, "multi_hop"))
            if f"{country}|code" in names:
                found.add(_following_name(country, "portability"))
        return found

    def probes(self, country: str, capital: str) -> tuple[Probe, ...]:
        """Return the questions about the new capital of a country."""
        return tuple(Probe(kind, prompt, (answer,)) for kind, prompt, answer in self.following(country, capital))


def _following_name(country: str, kind: ProbeKind) -> str:
    return f"{country}|capital|{kind}"
