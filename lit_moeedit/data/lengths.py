"""Lengths of texts: long ones are cut before they are tokenized, and facts beyond a model's window are remarked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_moeedit.data.encoding import join, token_ids
from lit_moeedit.data.errors import short
from lit_moeedit.data.fact import Fact
from lit_moeedit.text import first_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

CHARACTERS = 16
"""Characters per token of a first cut. Prose has 3 to 6; a text whose tokens are longer is cut further back."""
MARGIN = 64
"""Tokens between the last one that is used and the cut, so that the cut does not change those that are used: tokenizers
split a text into words, or merge neighbouring letters, and both depend on the letters nearby only."""


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> str:
    """Cut a text whose first ``max_tokens`` tokens are used; these stay the same. Short texts are returned as they are.

    Example:
        >>> from lit_moeedit.data.corpus import train_tokenizer
        >>> len(beginning(train_tokenizer(["a b c"], 300), "a b c " * 10**6, max_tokens=4))
        255
    """
    length = CHARACTERS * max_tokens
    while length < len(text):
        # at a space, if there is one, because a word that is cut has other tokens
        space = text.rfind(" ", length // 2, length)
        cut = text[: space if space > 0 else length]
        if len(token_ids(tokenizer, [cut])[0]) >= max_tokens + MARGIN:
            return cut
        length *= 2
    return text


def cut_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> list[str]:
    """Cut texts as :func:`beginning` does, and log a warning about the number of those that are cut."""
    found = [beginning(tokenizer, text, max_tokens) for text in texts]
    cut = [len(text) for text, kept in zip(texts, found, strict=True) if len(kept) < len(text)]
    if cut:
        log.warning(
            "%d of %d texts are cut before they are tokenized (the longest has %s characters), because only their "
            "first %d tokens are used; put documents on lines of their own to use more of them",
            len(cut),
            len(texts),
            f"{max(cut):,}",
            max_tokens,
        )
    return found


def remark_long_facts(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], window: int | None, contexts: Sequence[str] = ("",)
) -> None:
    """Log a warning about facts with texts that are longer than the model's context window.

    Args:
        tokenizer: the model's tokenizer.
        facts: the facts; their prompts, paraphrases and neighbours are measured with their answers.
        window: number of tokens of the window; ``None`` if the model has none.
        contexts: the texts put before the prompts.
    """
    if window is None:
        return
    context = max(contexts, key=len)
    long, most = [], 0
    for fact in facts:
        prompt = join(context, fact.prompt) if context else fact.prompt
        texts = [join(text, fact.target_new) for text in (prompt, *fact.paraphrases)]
        texts += [join(neighbour.prompt, neighbour.target) for neighbour in fact.neighbours]
        # no letter has more than four tokens, the number of its bytes; a few special tokens come on top
        texts = [text for text in texts if 4 * len(text) + 8 > window]
        tokens = max(map(len, token_ids(tokenizer, texts)), default=0) if texts else 0
        if tokens > window:
            long.append(short(fact.prompt))
            most = max(most, tokens)
    if long:
        log.warning(
            "%d of %d facts have texts beyond the %s tokens of the model's context window (up to %s), where its "
            "answers mean little; shorten them: %s",
            len(long),
            len(facts),
            f"{window:,}",
            f"{most:,}",
            first_few(long),
        )
