"""Keys and hidden states at the edit tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.partial_forward import hidden_states, inference
from lit_moeedit.models.token_budget import Budget, TokenBudget, forward_cost
from lit_moeedit.sharding.ranks import Ranks


@dataclass(frozen=True)
class EditTokens:
    """What a forward saw at the edit tokens of ``n`` prompts.

    Attributes:
        keys: keys, gates and experts of one layer; ``keys.token`` counts prompts.
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

    The prompts are dealt to the ranks; each gets the result for all of them.

    Args:
        model: the model.
        prompts: encoded prompts with an edit token each.
        target_layer: the layer whose output is wanted.
        layer: the layer whose keys are wanted, not above ``target_layer``.
        pad_token: id to pad with.
        token_budget: largest number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work; each calls this with the same prompts.

    Raises:
        TooLittleMemoryError: if there is no memory for the longest prompt alone.
    """
    ranks = ranks if ranks is not None else Ranks()
    longest = max(len(prompt.ids) for prompt in prompts)
    budget = TokenBudget(token_budget, forward_cost(model, target_layer), model.device, ranks)

    def run(tokens: int) -> EditTokens:
        size = max(1, min(tokens // longest, -(-len(prompts) // ranks.size)))
        return _edit_tokens(model, prompts, target_layer, layer, pad_token, size, ranks)

    return budget.run("features", run, least=longest, most=longest * len(prompts))


def _edit_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Encoding],
    target_layer: ExpertLayer,
    layer: ExpertLayer,
    pad_token: int,
    size: int,
    ranks: Ranks,
) -> EditTokens:
    """Run prompts, ``size`` of them in a forward; see :func:`edit_tokens`."""
    hidden: list[Tensor] = []
    numbers: list[Tensor] = []
    parts: list[RoutedKeys] = []
    batch, wanted, positions = range(0), True, torch.empty(0, dtype=torch.long)

    def observe(_: ExpertLayer, keys: RoutedKeys) -> None:
        # from positions in the batch back to the prompts' numbers; `positions` is ascending
        prompt = torch.searchsorted(positions, keys.token) + batch.start
        kept = len(prompt) if wanted else 0
        parts.append(RoutedKeys(prompt[:kept], keys.expert[:kept], keys.gate[:kept], keys.key[:kept]))

    batches = [range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)]
    with inference(model), watch_keys(model, [layer], select=lambda: positions, observe=observe):
        for batch, wanted in ranks.shard(batches):
            ids, mask = (x.to(model.device) for x in pad([prompts[i].ids for i in batch], pad_token))
            tokens = torch.tensor([prompts[i].edit_token for i in batch], device=ids.device)
            positions = torch.arange(len(batch), device=ids.device) * ids.shape[1] + tokens
            output = hidden_states(model, target_layer, ids, mask, position_ids(mask))
            kept = len(batch) if wanted else 0
            hidden.append(output.flatten(0, 1)[positions].float()[:kept])
            numbers.append(torch.tensor(batch[:kept], dtype=torch.long, device=ids.device))
    ranks.check_errors()
    order = torch.argsort(ranks.all_gather(torch.cat(numbers)))
    return EditTokens(_concatenate(parts, ranks), ranks.all_gather(torch.cat(hidden))[order])


def _concatenate(parts: Sequence[RoutedKeys], ranks: Ranks) -> RoutedKeys:
    """All ranks' keys, by expert and within each by prompt, whoever ran which."""
    names = ("token", "expert", "gate", "key")
    token, expert, gate, key = (ranks.all_gather(torch.cat([getattr(part, name) for part in parts])) for name in names)
    order = torch.argsort(token, stable=True)
    order = order[torch.argsort(expert[order], stable=True)]
    return RoutedKeys(token[order], expert[order], gate[order], key[order])
