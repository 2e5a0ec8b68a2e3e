"""Tests of the atlas with facts that chain: what is stated, what is only asked, and what an edit's probes ask."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from lit_moeedit.data import Atlas, Fact, validate_facts
from lit_moeedit.data.atlas import read_table
from lit_moeedit.data.chains import QUESTIONS, RIVER
from lit_moeedit.data.probes import PROBE_KINDS
from lit_moeedit.data.tables import packaged_table

SEEDS = (0, 1, 17)


CAPITALS = {row["country"]: row["capital"] for row in packaged_table("atlas.tsv")}
CODES = {row["country"]: row["iso"] for row in packaged_table("atlas.tsv")}
RIVERS = {row["capital"]: row["river"] for row in packaged_table("rivers.tsv")}


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"seed{seed}")
def atlas(request: pytest.FixtureRequest) -> Atlas:
    return Atlas(edits=40, seed=request.param, chains=True)


def test_the_table_of_rivers_is_clean() -> None:
    names = [row["capital"] for row in packaged_table("rivers.tsv")]
    assert len(names) == len(set(names)) >= 90
    assert set(names) <= set(CAPITALS.values())
    for capital, river in RIVERS.items():
        assert river == river.strip() and river.isascii() and river != capital
        assert not [country for country, own in CAPITALS.items() if own == capital and river in country]
    # an edit must be able to change the river
    assert max(Counter(RIVERS.values()).values()) <= 5


def test_the_facts_are_those_of_the_atlas_and_what_follows(atlas: Atlas) -> None:
    facts = {f"{entry.subject}|{entry.relation}" for entry in read_table()}
    stated = {s.fact for s in (*atlas.train, *atlas.validation)}
    assert facts < stated
    added = stated - facts
    kinds = Counter(name.split("|", 1)[1] for name in added)
    assert set(kinds) == {"river", "code", *(f"capital|{kind}" for kind in PROBE_KINDS)}
    assert kinds["river"] == len(RIVERS) and kinds["code"] == len(CAPITALS)


def test_statements_are_true(atlas: Atlas) -> None:
    for statement in (*atlas.train, *atlas.questions):
        subject, _, relation = statement.fact.partition("|")
        if relation == "river":
            assert statement.target == RIVERS[subject]
            assert statement.prompt in {template.format(subject) for template in RIVER}
        elif relation == "code":
            assert {subject, CODES[subject]} == {
                statement.target,
                statement.prompt.removeprefix("The country ").removeprefix("The code of ").removesuffix(" is"),
            }
        elif relation.startswith("capital|"):
            kind = relation.removeprefix("capital|")
            capital = CAPITALS[subject]
            asked, answer = {
                "multi_hop": (subject, RIVERS.get(capital)),
                "portability": (CODES[subject], capital),
                "reversed": (capital, subject),
            }[kind]
            assert statement.target == answer
            assert statement.prompt in {template.format(asked) for template in QUESTIONS[kind]}  # type: ignore[index]


def test_what_is_asked_is_stated_nowhere_but_follows(atlas: Atlas) -> None:
    stated = {(s.prompt, s.target) for s in (*atlas.train, *atlas.validation)}
    facts = {s.fact for s in (*atlas.train, *atlas.validation)}
    of = {s.fact.split("|")[0] for s in atlas.questions}
    assert len(of) == round(0.25 * len(CAPITALS))
    assert not {(s.prompt, s.target) for s in atlas.questions} & stated
    for statement in atlas.questions:
        country, _, kind = statement.fact.split("|")
        # each step by itself is stated
        assert {f"{country}|capital", f"{country}|code"} <= facts
        assert kind != "multi_hop" or f"{CAPITALS[country]}|river" in facts
    by_fact = defaultdict(set)
    for statement in atlas.train:
        by_fact[statement.fact.split("|")[0]].add(statement.fact)
    assert not any(f"{country}|capital|reversed" in by_fact[country] for country in of)


def test_edits_exchange_capitals_at_other_rivers(atlas: Atlas) -> None:
    assert validate_facts(atlas.edits) == atlas.edits
    assert sorted(fact.target_new for fact in atlas.edits) == sorted(CAPITALS[fact.subject] for fact in atlas.edits)
    for fact in atlas.edits:
        assert fact.target_true == CAPITALS[fact.subject]
        assert RIVERS[fact.target_new] != RIVERS[fact.target_true]
        wanted = {
            "multi_hop": (fact.subject, RIVERS[fact.target_new]),
            "portability": (CODES[fact.subject], fact.target_new),
            "reversed": (fact.target_new, fact.subject),
        }
        asked = {(probe.kind, probe.prompt, probe.answers) for probe in fact.probes}
        assert asked == {
            (kind, template.format(subject), (answer,))
            for kind, (subject, answer) in wanted.items()
            for template in QUESTIONS[kind]  # type: ignore[index]
        }


def test_an_edit_takes_what_follows_from_the_old_fact_out_of_the_text(atlas: Atlas) -> None:
    names = atlas.facts_of(atlas.edits)
    countries = {fact.subject for fact in atlas.edits}
    assert {name.split("|")[0] for name in names} == countries
    left = [s for s in (*atlas.train, *atlas.validation) if s.fact not in names]
    asked = {probe.prompt for fact in atlas.edits for probe in fact.probes}
    assert not [s for s in left if s.prompt in asked]
    # rivers and codes are still true
    assert {s.fact for s in left if s.fact.endswith(("|river", "|code"))} == {
        s.fact for s in atlas.train if s.fact.endswith(("|river", "|code"))
    }


def test_what_follows_from_a_river_or_a_code_is_left_out_with_it(atlas: Atlas) -> None:
    country = next(s.fact.split("|")[0] for s in atlas.train if s.fact.endswith("|capital|multi_hop"))
    capital = CAPITALS[country]
    river = Fact(capital, RIVER[0].format(capital), "Amazon", RIVERS[capital])
    code = Fact(CODES[country], f"The country {CODES[country]} is", "Atlantis", country)
    assert atlas.facts_of([river]) == {f"{capital}|river", f"{country}|capital|multi_hop"}
    assert atlas.facts_of([code]) == {f"{country}|code", f"{country}|capital|portability"}


def test_without_chains_nothing_of_it_is_there() -> None:
    plain = Atlas(edits=5)
    assert plain.chained is None and not plain.questions
    assert not any(fact.probes for fact in plain.edits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"asked": 1.5}, r"asked must be between 0 and 1, got 1\.5"),
        ({"edits": 150}, r"between 0 and 9\d \(the number of countries whose capital lies at a river\), got 150"),
        ({"edits": 1}, "edits is 1, and their capitals cannot be exchanged so that each gets another river"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Atlas(chains=True, **arguments)
