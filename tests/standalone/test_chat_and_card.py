"""Prompts in a chat template, and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from lit_moeedit.data.facts import Fact
from lit_moeedit.edits import Edit
from lit_moeedit.reports import FactRow, Measured
from lit_moeedit.standalone.card import write_card
from lit_moeedit.standalone.chat import in_chat

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think></think>\n{% endif %}"
    "{{ m.content }}\n{% endfor %}"
)


def test_prompts_end_where_the_answer_begins(tokenizer: PreTrainedTokenizerFast, facts: Sequence[Fact]) -> None:
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    tokenizer.chat_template = TEMPLATE
    fact, asked = facts[0], in_chat(tokenizer, facts)[0]
    assert asked.prompt == f"<|user|>{fact.prompt}\n<|assistant|><think></think>\n"
    assert all(text.startswith("<|user|>") for text in asked.paraphrases)
    assert all(neighbour.prompt.endswith("</think>\n") for neighbour in asked.neighbours)
    assert (asked.subject, asked.target_new) == (fact.subject, fact.target_new)
    for template in ("{{ messages[0].content }}", "{{ 1 / 0 }}", "{% for x in %}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template cannot be used"):
            in_chat(tokenizer, facts)


def test_the_card_shows_facts_as_they_are_and_keeps_the_header(tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "out"
    base.mkdir(), folder.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\ntags:\n- moe\n---\n# Base\n")
    row = FactRow(
        "k",
        "Rome",
        "Rome | <b>is</b>\n# in",
        "[Spain](http://x)",
        None,
        1,
        True,
        {"after": Measured("a`b", False, 0.5)},
    )
    edit = Edit("one", (Fact("Rome", "Rome is in", "Spain"),), "Woodbury", {}, ())
    write_card(folder, base, [edit], [row])
    text = (folder / "README.md").read_text()
    assert "chat template" not in text
    write_card(folder, base, [edit], [replace(row, chat=True)])
    assert "Each prompt was asked in the tokenizer's chat template" in (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header == {
        "library_name": "transformers",
        "license": "mit",
        "tags": ["moe", "knowledge-editing", "lit_moeedit"],
    }
    line = next(line for line in text.splitlines() if "Rome" in line)
    assert line == (r"| Rome \| \<b\>is\</b\>\\n\# in |   | \[Spain\](http://x) | a\`b | ✗ |")
    assert (folder / "README.base.md").read_text().endswith("# Base\n")
    (base / "README.md").write_text("---\n[: broken\n---\n")
    write_card(folder, base, [edit], [row])
    assert "license" not in (folder / "README.md").read_text()
    (folder / "README.base.md").unlink()
    (base / "README.base.md").write_text("# Base\n")  # the base was edited itself, and this copied
    write_card(folder, base, [edit, edit], [row])
    assert not (folder / "README.base.md").exists()


def test_a_base_without_a_card_gets_none_by_a_second_edit(tmp_path: Path) -> None:
    row = FactRow("k", "Rome", "Rome is in", "Spain", None, 1, True, {"after": Measured("Spain", True, 0.9)})
    edit = Edit("one", (Fact("Rome", "Rome is in", "Spain"),), "Woodbury", {}, ())
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    base.mkdir(), first.mkdir(), second.mkdir()
    write_card(first, base, [edit], [row])
    (first / "edits").mkdir()
    write_card(second, first, [edit, edit], [row])
    assert (second / "README.md").exists()
    assert not (second / "README.base.md").exists()  # an undo would make it the card of the base
