"""Greedy generation up to a natural stop."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import encode, pad, pad_id, position_ids, token_batches
from lit_moeedit.editing.evaluation import scoring_cost
from lit_moeedit.editing.kv_prefix import logits_at
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.models.token_budget import Budget, TokenBudget
from lit_moeedit.sharding.ranks import Ranks

MAX_ANSWER_TOKENS = 24
"""Default of the maximum number of tokens of an answer."""
_END = re.compile(r"[!?\n\u3002\uff01\uff1f]|(?<=\w{4})\.(?=\s|$)")
"""End of a line or sentence. A full stop within a number, or after a short word (`St. Petersburg`), is none.

The three code points are those of CJK."""


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int = MAX_ANSWER_TOKENS,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
    to_end: bool = True,
) -> list[str]:
    """Generate the continuation of each prompt greedily, to an end-of-text token or the end of the sentence or line.

    The prompts are sharded over the ranks, and the answers all-reduced.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: the prompts.
        tokens: maximum number of tokens of an answer.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work. Each calls this with the same prompts and gets the same result.
        to_end: whether the end of a sentence or line is one of the text; if not, only an end-of-text token is.

    Raises:
        TooLittleMemoryError: if memory does not suffice for the longest prompt alone.
    """
    ranks = ranks or Ranks.current()
    prompt_ids = [encoding.ids for encoding in encode(tokenizer, prompts, [""] * len(prompts))]
    lengths, longest = [len(ids) for ids in prompt_ids], longest_padded(model)
    full = [length + tokens for length in lengths]
    ends = _end_tokens(model, tokenizer)

    def run(size: int) -> list[list[int]]:
        # a row that may be padded now may be too long for it after some tokens
        batches = unpadded(token_batches(full, size), lengths, None if longest is None else longest - tokens)
        with inference(model):
            # ids by prompt, shifted by one, so that 0 is none
            found = torch.zeros(len(prompt_ids), tokens, dtype=torch.long)
            for batch, mine in ranks.shard(list(batches)):
                rows = {i: list(prompt_ids[i]) for i in batch}
                active = list(batch) if mine else []
                for step in range(tokens):
                    if not ranks.any(bool(active)):
                        break
                    # a rank that has finished runs one row in step with the others
                    running = active or [batch[0]]
                    ids, mask = (x.to(model.device) for x in pad([rows[i] for i in running], pad_id(tokenizer)))
                    row, column = torch.arange(len(running), device=ids.device), mask.sum(1) - 1
                    chosen = logits_at(model, ids, mask, position_ids(mask), row, column).argmax(-1).tolist()
                    for i, token in zip(active, chosen, strict=False):
                        rows[i].append(token)
                        found[i, step] = token + 1
                    added = [rows[i][lengths[i] :] for i in active]
                    texts = tokenizer.batch_decode(added, skip_special_tokens=True) if active else []
                    active = [
                        i
                        for i, ids, text in zip(active, added, texts, strict=True)
                        if ids[-1] not in ends and not (to_end and _END.search(text.lstrip()))
                    ]
            ranks.check_errors()
            ranks.all_reduce(found)
            return [[token - 1 for token in row if token] for row in found.tolist()]

    if not prompt_ids:
        return []
    budget = TokenBudget(token_budget, scoring_cost(model, 1 / min(lengths)), model.device, ranks)
    added = budget.run("generation", run, least=max(full), most=max(full) * len(full))
    texts = tokenizer.batch_decode(added, skip_special_tokens=True)
    return [_to_end(text) if to_end else text.strip() for text in texts]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokens that end a text."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ends = found if isinstance(found, list) else [found]
    return {end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)}


def _to_end(text: str) -> str:
    """Cut a text at the end of its first sentence or line.

    Example:
        >>> _to_end(" St. Petersburg, since 1712. It"), _to_end("Oslo. Peru"), _to_end(" 3.5 m"), _to_end("Rome.")
        ('St. Petersburg, since 1712', 'Oslo', '3.5 m', 'Rome')
    """
    text = text.lstrip()
    end = _END.search(text)
    return text[: end.start() if end else None].strip().removesuffix(".")
