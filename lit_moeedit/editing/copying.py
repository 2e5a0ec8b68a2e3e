"""The test of copying in context: random sequences of tokens that are repeated."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import pad, pad_id, position_ids, token_batches
from lit_moeedit.editing.kv_prefix import logits_at
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.models.token_budget import Budget, TokenBudget, forward_cost, logits_cost
from lit_moeedit.sharding.ranks import Ranks

SEQUENCES, LENGTH = 16, 32
"""Number of sequences, and tokens of each before it is repeated."""


def copied(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Read random sequences twice, and return what the model predicts the second time.

    The tokens are drawn evenly from those of the tokenizer that are not special; no global random state is used. The
    sequences are sharded over the ranks.

    Args:
        model: the model.
        tokenizer: its tokenizer; each sequence begins with its BOS token, if it has one.
        sequences: number of sequences.
        length: number of tokens of a sequence, at least 2.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work. Each calls this and gets the same result.
        seed: seed of the tokens.

    Returns:
        The likeliest tokens and the right ones from the second token of the repetition on, for
        :func:`~lit_moeedit.metrics.copy_accuracy`, both ``[sequences, length - 1]`` int64 on the CPU.

    Raises:
        ValueError: if the tokenizer has fewer than two tokens that the model embeds and that are not special.
    """
    ranks = ranks or Ranks.current()
    embedded = getattr(model.get_input_embeddings(), "num_embeddings", None) or model.config.vocab_size
    special = set(tokenizer.all_special_ids)
    known = torch.tensor([i for i in range(min(len(tokenizer), embedded)) if i not in special], dtype=torch.long)
    if len(known) < 2:
        raise ValueError(f"the tokenizer has {len(known)} tokens that are not special; copying needs at least 2")
    drawn = known[torch.randint(len(known), (sequences, length), generator=torch.Generator().manual_seed(seed))]
    bos = getattr(tokenizer, "bos_token_id", None)
    start = [] if bos is None else [bos]
    rows = [[*start, *row, *row[:-1]] for row in drawn.tolist()]
    width = len(rows[0])

    def run(tokens: int) -> Tensor:
        found = torch.zeros(sequences, length - 1, dtype=torch.long)
        with inference(model):
            for batch, mine in ranks.shard(list(token_batches([width] * sequences, tokens))):
                ids, mask = (x.to(model.device) for x in pad([rows[i] for i in batch], pad_id(tokenizer)))
                places = torch.arange(width - length + 1, width, device=ids.device)
                row = torch.arange(len(batch), device=ids.device).repeat_interleave(length - 1)
                scores = logits_at(model, ids, mask, position_ids(mask), row, places.repeat(len(batch)))
                if mine:
                    found[batch] = scores.argmax(-1).view(len(batch), -1).cpu()
            ranks.check_errors()
            ranks.all_reduce(found)
        return found

    cost = forward_cost(model, list(expert_layers(model).values())[-1]) + logits_cost(model) / 2
    budget = TokenBudget(token_budget, cost, model.device, ranks)
    return budget.run("copying", run, least=width, most=width * sequences), drawn[:, 1:]
