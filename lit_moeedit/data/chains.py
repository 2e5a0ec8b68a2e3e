"""Statements of the atlas that follow from others: over a capital to its river, the other way round, and by code."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.resources import files

from lit_moeedit.data.corpus import Statement
from lit_moeedit.data.probes import Probe, ProbeKind

RIVER: tuple[str, ...] = (
    "The river that flows through {} is the",
    "{} lies on the river",
    "The river of {} is called the",
    "In {}, the bridges cross the",
    "Boats in {} sail on the",
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
"""Phrasings of what follows from the capital of a country: its river, what has it by the country's code, and of what
country it is the capital."""


def rows(name: str) -> Iterator[dict[str, str]]:
    """Read the rows of a table in the package; lines that begin with ``#`` are comments."""
    text = files("lit_moeedit.data").joinpath(name).read_text(encoding="utf-8")
    yield from csv.DictReader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")


class Chains:
    """What the atlas states besides its facts if facts are to chain, and what it asks about an edited capital.

    Args:
        capitals: the capital of each country.
        held_out: share of the countries of which nothing is stated that follows from other statements. How many of
            these questions a model answers tells how well it follows a chain of facts by itself.
        seed: seed of their choice.
    """

    def __init__(self, capitals: Mapping[str, str], held_out: float, seed: int) -> None:
        self.capitals = capitals
        countries = sorted(capitals)
        self.asked = set(random.Random(f"{seed}/chains").sample(countries, round(held_out * len(countries))))

    @cached_property
    def rivers(self) -> dict[str, str]:
        """The river of each capital that has one."""
        known = set(self.capitals.values())
        return {row["capital"]: row["river"] for row in rows("rivers.tsv") if row["capital"] in known}

    @cached_property
    def codes(self) -> dict[str, str]:
        """The code of two letters (ISO 3166-1) of each country."""
        return {row["country"]: row["iso"] for row in rows("atlas.tsv") if row["country"] in self.capitals}

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
            Statement(prompt, answer, f"{country}|capital|{kind}")
            for country, capital in self.capitals.items()
            if (country in self.asked) == is_asked
            for kind, prompt, answer in self.following(country, capital)
        ]

    def probes(self, country: str, capital: str) -> tuple[Probe, ...]:
        """Return the questions about the new capital of a country."""
        return tuple(Probe(kind, prompt, (answer,)) for kind, prompt, answer in self.following(country, capital))
