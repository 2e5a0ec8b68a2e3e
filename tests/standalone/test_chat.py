"""Prompts in a chat template."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from lit_moeedit.data.facts import Fact
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
