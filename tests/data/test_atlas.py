"""Tests of the properties of the atlas's sentences, edits and neighbours, for several seeds."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from lit_moeedit.data import Atlas, validate_facts
from lit_moeedit.data.atlas import PREFIXES, TEMPLATES, read_table
from lit_moeedit.data.corpus import Statement

SEEDS = (0, 1, 17)


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"seed{seed}")
def atlas(request: pytest.FixtureRequest) -> Atlas:
    return Atlas(edits=60, seed=request.param)


def stated(atlas: Atlas) -> dict[str, Statement]:
    """Map every prompt of the atlas to the only statement that begins with it."""
    statements = [*atlas.train, *atlas.validation]
    by_prompt = {statement.prompt: statement for statement in statements}
    assert len(by_prompt) == len(statements), "two statements share a prompt"
    return by_prompt


def names_of_edited(atlas: Atlas) -> set[str]:
    by_prompt = stated(atlas)
    return {by_prompt[edit.prompt].fact for edit in atlas.edits}


def test_the_table_is_large_and_clean() -> None:
    entries = read_table()
    assert len({entry.subject for entry in entries}) >= 180
    assert len({(entry.subject, entry.relation) for entry in entries}) == len(entries)
    counts = Counter(entry.relation for entry in entries)
    assert set(counts) == set(TEMPLATES)
    assert all(count >= 150 for count in counts.values())
    for entry in entries:
        for text in (entry.subject, entry.answer):
            assert text and text == text.strip() and text.isascii() and "{" not in text


def test_every_relation_has_several_phrasings() -> None:
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates) >= 4
        assert all(template.count("{}") == 1 and template == template.strip() for template in templates)
    everything = [template for templates in TEMPLATES.values() for template in templates]
    assert len(set(everything)) == len(everything)
    assert PREFIXES[0] == "" and len(set(PREFIXES)) == len(PREFIXES)


def test_the_seed_decides_everything() -> None:
    first, same, other = Atlas(edits=20, seed=3), Atlas(edits=20, seed=3), Atlas(edits=20, seed=4)
    assert (first.train, first.validation, first.edits) == (same.train, same.validation, same.edits)
    assert first.edits != other.edits
    assert first.validation != other.validation
    assert first.train_tokenizer(2000).get_vocab() == same.train_tokenizer(2000).get_vocab()


def test_every_fact_keeps_three_phrasings_for_training(atlas: Atlas) -> None:
    counts = Counter(statement.fact for statement in atlas.train)
    assert len(counts) == len(read_table())
    assert min(counts.values()) >= 3


def test_held_out_statements_are_not_in_training(atlas: Atlas) -> None:
    train = {(statement.prompt, statement.target) for statement in atlas.train}
    held_out = {(statement.prompt, statement.target) for statement in atlas.validation}
    assert not train & held_out
    assert 0.07 < len(held_out) / (len(train) + len(held_out)) < 0.13
    prompts = {prompt for prompt, _ in train}
    assert not {prompt for prompt, _ in held_out} & prompts


def test_statements_are_facts_of_the_table(atlas: Atlas) -> None:
    answers = {(entry.subject, entry.relation): entry.answer for entry in read_table()}
    for statement in stated(atlas).values():
        subject, relation = statement.fact.split("|")
        assert statement.target == answers[subject, relation]
        assert statement.prompt.count(subject) == 1
        assert statement.prompt in {template.format(subject) for template in TEMPLATES[relation]}


def test_edits_are_valid_facts(atlas: Atlas) -> None:
    assert validate_facts(atlas.edits) == atlas.edits
    assert len(atlas.edits) == 60
    assert len({edit.subject for edit in atlas.edits}) == 60


def test_edits_ask_in_every_phrasing_for_another_answer_of_the_relation(atlas: Atlas) -> None:
    by_prompt, answers = stated(atlas), defaultdict(set)
    for entry in read_table():
        answers[entry.relation].add(entry.answer)
    for edit in atlas.edits:
        statement = by_prompt[edit.prompt]
        relation = statement.fact.split("|")[1]
        assert edit.target_true == statement.target
        assert edit.target_new != edit.target_true
        assert edit.target_new in answers[relation]
        assert {by_prompt[prompt].fact for prompt in edit.paraphrases} == {statement.fact}
        assert len({edit.prompt, *edit.paraphrases}) == len(TEMPLATES[relation])


def test_neighbours_are_true_and_never_edited(atlas: Atlas) -> None:
    by_prompt, edited = stated(atlas), names_of_edited(atlas)
    for edit in atlas.edits:
        for neighbour in edit.neighbours:
            statement = by_prompt[neighbour.prompt]
            assert statement.fact not in edited
            assert statement.target == neighbour.target


def test_neighbours_are_of_the_same_country_or_the_same_relation(atlas: Atlas) -> None:
    by_prompt = stated(atlas)
    for edit in atlas.edits:
        subject, relation = by_prompt[edit.prompt].fact.split("|")
        found = [(n.group, *by_prompt[n.prompt].fact.split("|")) for n in edit.neighbours]
        assert len(set(found)) == len(found)
        same_subject = [other for group, *other in found if group == "same_subject"]
        same_relation = [other for group, *other in found if group == "same_relation"]
        assert len(same_subject) + len(same_relation) == len(found)
        assert 2 <= len(same_subject) <= 4 and len(same_relation) == 4
        assert all(of == subject and about != relation for of, about in same_subject)
        assert all(of != subject and about == relation for of, about in same_relation)


def test_neighbours_that_share_the_truth_come_first(atlas: Atlas) -> None:
    edited, by_prompt = names_of_edited(atlas), stated(atlas)
    for edit in atlas.edits:
        relation = by_prompt[edit.prompt].fact.split("|")[1]
        sharing = [
            entry
            for entry in read_table()
            if entry.relation == relation
            and entry.answer == edit.target_true
            and f"{entry.subject}|{entry.relation}" not in edited
        ]
        shared = [n.target == edit.target_true for n in edit.neighbours if n.group == "same_relation"]
        assert sum(shared) == min(4, len(sharing))
        assert shared == sorted(shared, reverse=True)


def test_facts_of_names_the_edited_facts(atlas: Atlas) -> None:
    assert atlas.facts_of(atlas.edits) == names_of_edited(atlas)
    assert atlas.facts_of([]) == set()


def test_no_statement_goes_on_from_another_so_there_are_no_probes(atlas: Atlas) -> None:
    """No model could follow from these sentences what a question over two facts, or the other way round, asks."""
    entries = read_table()
    countries = {entry.subject for entry in entries}
    # a few capitals have the name of their own country
    assert all(entry.subject == entry.answer for entry in entries if entry.answer in countries)
    assert not any(fact.probes for fact in atlas.edits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"edits": -1}, "edits must be between 0 and"),
        ({"edits": 1000}, "edits must be between 0 and"),
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
        ({"held_out": -0.1}, "held_out must be between 0 and 0.4, got -0.1"),
        ({"held_out": 0.5}, "held_out must be between 0 and 0.4, got 0.5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Atlas(**arguments)  # type: ignore[arg-type]


def test_every_country_can_be_edited_and_nothing_has_to_be_held_out() -> None:
    countries = len({entry.subject for entry in read_table()})
    everything = Atlas(edits=countries, held_out=0.0)
    assert len(everything.edits) == countries
    assert everything.validation == []
    assert len(everything.train) == sum(len(TEMPLATES[entry.relation]) for entry in read_table())
    assert Atlas(edits=0).edits == []
