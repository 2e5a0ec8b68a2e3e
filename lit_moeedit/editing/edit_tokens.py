"""Keys and hidden states at the edit tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.models.partial_forward import inference, layer_output
from lit_moeedit.models.token_budget import Budget, TokenBudget, forward_cost, most_tokens
from lit_moeedit.sharding.ranks import Ranks


@dataclass(frozen=True)
class EditTokens:
    """Activations at ``n`` edit tokens, in the order of the prompts and of the edit tokens of each.

    Attributes:
        keys: keys, gates and experts of one layer. ``keys.token`` is the index of the edit token.
        hidden: ``[n, d_model]`` float32, output of the target layer.
    """

    keys: RoutedKeys
    hidden: Tensor


def edit_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Encoding],
    target_layer: ExpertLayer,
    layer: ExpertLayer,
    pad_token: int,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
) -> EditTokens:
    """Run prompts up to the target layer; return its output and one layer's keys at the edit tokens.

    The prompts are sharded over the ranks, and the results all-gathered.

    Args:
        model: the model.
        prompts: encoded prompts, each with one edit token or several.
        target_layer: the layer whose output is returned.
        layer: the layer whose keys are returned, not above ``target_layer``.
        pad_token: id to pad with.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work. Each calls this with the same prompts.

    Raises:
        TooLittleMemoryError: if memory does not suffice for the longest prompt alone.
    """
    ranks = ranks or Ranks.current()
    lengths, tokens_of = [len(prompt.ids) for prompt in prompts], [prompt.edit_tokens for prompt in prompts]
    longest, first = max(lengths), [0, *accumulate(map(len, tokens_of))]

    def run(tokens: int) -> EditTokens:
        size = max(1, min(tokens // longest, -(-len(prompts) // ranks.size)))
        together = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
        batches = list(unpadded(together, lengths, longest_padded(model)))
        mine, positions, index = True, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
        hidden, indices, parts = list[Tensor](), list[Tensor](), list[RoutedKeys]()

        def observe(_: ExpertLayer, keys: RoutedKeys) -> None:
            # from positions in the batch to indices of edit tokens; `positions` is ascending
            token = index[torch.searchsorted(positions, keys.token)]
            kept = len(token) if mine else 0
            parts.append(RoutedKeys(token[:kept], keys.expert[:kept], keys.gate[:kept], keys.key[:kept]))

        with inference(model), watch_keys([layer], select=lambda: positions, observe=observe):
            for batch, mine in ranks.shard(batches):
                ids, mask = (x.to(model.device) for x in pad([prompts[i].ids for i in batch], pad_token))
                numbers = [n for i in batch for n in range(first[i], first[i + 1])]
                places = [row * ids.shape[1] + token for row, i in enumerate(batch) for token in tokens_of[i]]
                index, positions = (torch.tensor(values, device=ids.device) for values in (numbers, places))
                output = layer_output(model, target_layer, ids, mask, position_ids(mask)).hidden
                kept = len(numbers) if mine else 0
                hidden.append(output.flatten(0, 1)[positions].float()[:kept])
                indices.append(index[:kept])
        ranks.check_errors()
        order = torch.argsort(ranks.all_gather(torch.cat(indices)))
        return EditTokens(_all_gather_keys(parts, ranks), ranks.all_gather(torch.cat(hidden))[order])

    cost, maximum = forward_cost(model, target_layer), most_tokens(model.device)
    budget = TokenBudget(token_budget, cost, model.device, ranks, maximum)
    return budget.run("features", run, least=longest, most=longest * len(prompts))


def _all_gather_keys(parts: Sequence[RoutedKeys], ranks: Ranks) -> RoutedKeys:
    """Return all ranks' keys, sorted by expert and then by edit token."""
    names = ("token", "expert", "gate", "key")
    token, expert, gate, key = (ranks.all_gather(torch.cat([getattr(part, name) for part in parts])) for name in names)
    order = torch.argsort(token, stable=True)
    order = order[torch.argsort(expert[order], stable=True)]
    return RoutedKeys(token[order], expert[order], gate[order], key[order])
