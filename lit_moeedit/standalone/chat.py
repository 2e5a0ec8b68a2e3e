"""Facts as questions to a chat model: prompts in its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_moeedit.data.facts import Fact
from lit_moeedit.pretrained import as_value_error

_ANSWER = "ANSWER"


def in_chat(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> list[Fact]:
    """Put the prompts of facts, of their paraphrases, neighbours and probes into a tokenizer's chat template.

    Each becomes what the user says, up to the place where the model's answer begins.

    Raises:
        ValueError: if the tokenizer has no chat template, or one that cannot be used.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: leave out --chat, and give prompts to be continued")
    return [
        replace(
            fact,
            prompt=_asked(tokenizer, fact.prompt),
            paraphrases=tuple(_asked(tokenizer, text) for text in fact.paraphrases),
            neighbours=tuple(replace(own, prompt=_asked(tokenizer, own.prompt)) for own in fact.neighbours),
            probes=tuple(replace(own, prompt=_asked(tokenizer, own.prompt)) for own in fact.probes),
        )
        for fact in facts
    ]


def _asked(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    # rendered with an answer, because some templates put more before it than their prompt for generation has
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _ANSWER}]
    with as_value_error("the tokenizer's chat template cannot be used"):
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
        before, found, _ = str(text).rpartition(_ANSWER)
        if not found or prompt not in before:
            raise ValueError("the question or the answer is not in the text that it makes")
    return before
