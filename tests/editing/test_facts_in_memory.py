"""Facts given to an editor as objects, and remarks about those beyond the model's window."""

from __future__ import annotations

import pytest

from lit_moeedit.data import validate_facts
from lit_moeedit.data.facts import FactsError
from lit_moeedit.editing import Editor
from tests.editing.recording import QUICK


def test_an_editor_takes_objects(model, tokenizer, facts, unchanged) -> None:
    row = {"subject": facts[0].subject, "prompt": facts[0].prompt, "target_new": {"str": facts[0].target_new}}
    result = Editor([1], targets=QUICK, preserve="none").edit(model, tokenizer, [row])
    assert [fact.key for fact in result.facts] == [facts[0].key]
    unchanged(model)
    with pytest.raises(FactsError, match="facts, row 2, field 'prompt': is missing; expected a text"):
        Editor([1], preserve="none").edit(model, tokenizer, [row, {"subject": "Oslo", "target_new": "Peru"}])


def test_facts_beyond_the_window_are_remarked_where_they_are_checked(model, tokenizer, facts, caplog) -> None:
    model.config.max_position_embeddings = 3
    editor = Editor([1], targets=QUICK, preserve="none")
    editor.edit(model, tokenizer, facts[:2])
    assert caplog.text.count("2 of 2 facts have texts beyond the 3 tokens of the model's context window") == 1
    caplog.clear()
    editor.edit(model, tokenizer, validate_facts(facts[:2], tokenizer=tokenizer))
    assert "context window" not in caplog.text
