"""Texts that contradict an edit."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.data import Atlas, Fact
from lit_moeedit.data.atlas import TEMPLATES, read_table
from lit_moeedit.data.conflicts import ConflictFinder
from lit_moeedit.data.encoding import join

FRANCE = Fact("France", "The capital of France is", "Lyon", "Paris", paraphrases=("France is governed from",))


def spans(text: str, fact: Fact = FRANCE, **settings: int) -> list[str]:
    """The occurrences of the old target that a finder of one fact finds, as they are in the text."""
    found = ConflictFinder([fact], **settings).find(text)
    assert len(found) <= 1
    return [text[a:b] for conflict in found for a, b in conflict.spans]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The capital of France is Paris.", ["Paris"]),
        ("Paris, so they say, is in France; yes, Paris.", ["Paris", "Paris"]),
        ("FRANCE has PARIS", ["PARIS"]),
        ("france\nparis", ["paris"]),
        ("France's is Paris's", ["Paris"]),
        ("a Paris-based firm of France", ["Paris"]),
        ("France_Paris", ["Paris"]),
        ("The capital of France is Lyon; it was Paris.", ["Paris"]),
        ("The capital of France is Lyon.", []),
        ("Paris is a city.", []),
        ("France is a country.", []),
        ("In France, Parisian life", []),
        ("In France, a comparison", []),
        ("In Françe, Páris", ["Páris"]),
        ("Francé e\u0301t Paris\u0301", ["Paris\u0301"]),
        ("France, Pariß", []),
        ("France, Paris2", []),
        ("", []),
    ],
)
def test_whole_words_in_any_case(text: str, found: list[str]) -> None:
    assert spans(text) == found


def test_full_width_letters() -> None:
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "FranceParis")
    assert spans(f"{wide[:6]}: {wide[6:]}") == [wide[6:]]


def test_names_with_marks_quotation_marks_and_white_space() -> None:
    fact = Fact("Côte d'Ivoire", "The seat of Côte d'Ivoire is", "Rome", "São Tomé - Sul")
    for text in ("Co\u0302te d\u2019Ivoire\u2026 Sa\u0303o  Tome\u0301\n\u2013 Sul.", "CÔTE D'IVOIRE, SÃO TOMÉ-SUL"):
        assert spans(text, fact) == [text[text.upper().index("S") : text.upper().rindex("SUL") + 3]]
    assert spans("Cote d'Ivoire, Sao Tome - Sul", fact) == ["Sao Tome - Sul"]
    assert spans("Côte d'Ivoire, São Tomé Sul", fact) == []


@pytest.mark.parametrize(
    ("subject", "old", "text", "found"),
    [
        ("日本", "東京", "日本の首都は東京です。", ["東京"]),
        ("日本", "東京", "日本の首都は大阪です。", []),
        ("日本", "かき", "日本のかぎ", []),  # a mark makes another letter of it
        ("프랑스", "파리", "프랑스의 수도는 파리입니다.", ["파리"]),
        ("ประเทศไทย", "กรุงเทพ", "เมืองหลวงของประเทศไทยคือกรุงเทพฯ", ["กรุงเทพ"]),
        ("Япония", "Токио", "Япониею, Токио", []),  # an inflected form
        ("Япония", "Токио", "Столица (Япония) — Токио", ["Токио"]),
    ],
)
def test_scripts(subject: str, old: str, text: str, found: list[str]) -> None:
    assert spans(text, Fact(subject, subject, "X", old)) == found


@pytest.mark.parametrize(
    ("subject", "old", "new", "text", "found"),
    [
        ("Bob", "York", "New York", "Bob lives in New York.", []),
        ("Bob", "York", "New York", "Bob lives in New York, not in York.", ["York"]),
        ("Bob", "New York", "York", "Bob lives in New York.", ["New York"]),
        ("Kuwait City", "Kuwait", "Peru", "Kuwait City is large; Kuwait City is hot.", []),
        ("Kuwait City", "Kuwait", "Peru", "Kuwait City lies in Kuwait.", ["Kuwait"]),
        ("Kuwait", "Kuwait City", "Peru", "Kuwait City is hot.", []),
        ("Kuwait", "Kuwait City", "Peru", "The capital of Kuwait is Kuwait City.", ["Kuwait City"]),
        ("Bob", "Rome", "Rome", "Bob lives in Rome.", []),
    ],
)
def test_targets_and_subjects_within_each_other(subject: str, old: str, new: str, text: str, found: list[str]) -> None:
    assert spans(text, Fact(subject, subject, new, old)) == found


def test_a_subject_that_is_its_own_old_target_needs_a_prompt_before_it() -> None:
    fact = Fact("Singapore", "The capital of Singapore is", "Rome", "Singapore", ("Singapore is governed from",))
    assert spans("In Singapore, they love Singapore.", fact) == []
    assert spans("Yes, the capital of Singapore  is Singapore.", fact) == ["Singapore"]
    assert spans("Singapore is governed from Singapore, and Singapore is warm.", fact) == ["Singapore"]
    assert (
        spans(
            "The capital of Singapore is Singapore City.",
            Fact(fact.subject, fact.prompt, "Singapore City", "Singapore"),
        )
        == []
    )


def test_far_apart_is_no_conflict() -> None:
    between = " x" * 10
    assert spans(f"France{between} Paris", within=10) == ["Paris"]
    assert spans(f"France{between} Paris", within=9) == []
    assert spans(f"Paris{between} France", within=10) == ["Paris"]
    assert spans(f"Paris{between} France", within=9) == []
    text = f"Paris{between}{between} France has Paris{between}{between} Paris"
    assert [conflict.spans for conflict in ConflictFinder([FRANCE], 10).find(text)] == [((57, 62),)]


def test_very_long_words_are_compared_as_they_are() -> None:
    fact = Fact("x" * 70, "p", "n", "Y" * 70)
    assert spans(f"{'x' * 70} {'Y' * 70}", fact) == ["Y" * 70]
    assert spans(f"{'x' * 70} {'y' * 70}", fact) == []


def test_nothing_contradicts_a_fact_without_an_old_target() -> None:
    finder = ConflictFinder([Fact("France", "France has", "Lyon"), Fact("France", "France has", "Lyon", " ")])
    assert finder.find("France has Paris, Lyon, and None") == []


def test_facts_are_found_in_their_order_each_with_its_own_text() -> None:
    spain = Fact("Spain", "The capital of Spain is", "Lyon", "Madrid")
    found = ConflictFinder([spain, FRANCE]).find("France has Paris; Spain has Madrid.")
    assert [conflict.fact for conflict in found] == [spain, FRANCE]
    first = ConflictFinder([spain, FRANCE]).first(["Nothing.", "France: Paris", "Paris, France", "Madrid, Spain"])
    assert {key: conflict.text for key, conflict in first.items()} == {
        FRANCE.key: "France: Paris",
        spain.key: "Madrid, Spain",
    }


def test_excerpts_show_the_old_target_of_long_texts() -> None:
    text = "word " * 1000 + "France has\n\tParis" + " word" * 1000
    (conflict,) = ConflictFinder([FRANCE]).find(text)
    shown = conflict.excerpt()
    assert "France has Paris" in shown and len(shown) < 120 and "\n" not in shown
    assert shown.startswith("…") and shown.endswith("…")
    (conflict,) = ConflictFinder([FRANCE]).find("France has Paris")
    assert conflict.excerpt() == "France has Paris"


words = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(words, words, words, st.sampled_from([" ", ", ", "\n", " — "]))
def test_a_statement_is_found_at_its_place_in_any_text(before: str, middle: str, after: str, gap: str) -> None:
    text = f"{before}{gap}France {middle} Paris{gap}{after}"
    start = len(text) - len(f"Paris{gap}{after}")
    expected = (start, start + 5)
    # a mark joins the letter before it
    if not any(unicodedata.category(c).startswith("M") or c == "\u200d" for c in middle):
        (conflict,) = ConflictFinder([FRANCE]).find(text)
        assert expected in conflict.spans
        assert all(text[a:b].casefold() == "paris" for a, b in conflict.spans)


def test_long_texts_of_nothing_but_names_take_linear_time() -> None:
    """A quadratic search would take minutes."""
    finder = ConflictFinder([FRANCE, Fact("a a a b", "p", "n", "a a")])
    started = time.monotonic()
    (conflict,) = finder.find("France Paris " * 100_000)
    assert len(conflict.spans) == 100_000
    assert finder.find("a " * 200_000) == []
    assert time.monotonic() - started < 60  # only to tell a hang


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_all_statements_of_edited_facts_are_found_in_the_atlas_and_no_others(seed: int) -> None:
    atlas = Atlas(edits=32, seed=seed)
    finder, edited = ConflictFinder(atlas.edits), atlas.facts_of(atlas.edits)
    found = [bool(finder.find(join(s.prompt, s.target))) for s in atlas.train]
    assert found == [s.fact in edited for s in atlas.train]
    assert sum(found) == {0: 142, 1: 145, 2: 147}[seed]


def test_every_fact_of_the_atlas_is_found() -> None:
    """Among all facts at once only names within longer names are found by mistake."""
    facts = {}
    for entry in read_table():
        prompt, *paraphrases = (template.format(entry.subject) for template in TEMPLATES[entry.relation])
        facts[f"{entry.subject}|{entry.relation}"] = Fact(
            entry.subject, prompt, "Xanadu", entry.answer, tuple(paraphrases)
        )
    finder, names = ConflictFinder(facts.values()), {fact.key: name for name, fact in facts.items()}
    wrong = set()
    atlas = Atlas(edits=0)
    for statement in atlas.train:
        found = {names[conflict.fact.key] for conflict in finder.find(join(statement.prompt, statement.target))}
        assert statement.fact in found
        wrong |= {(name.split("|")[0], statement.fact.split("|")[0]) for name in found - {statement.fact}}
    assert wrong == {
        ("Republic of the Congo", "Democratic Republic of the Congo"),
        ("Guinea", "Equatorial Guinea"),
        ("Guinea", "Guinea-Bissau"),
        ("Sudan", "South Sudan"),
    }
