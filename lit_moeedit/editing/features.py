"""Keys and hidden states at the edit tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.editing.running import hidden_states, inference
from lit_moeedit.models.experts import ExpertLayer, RoutedKeys, watch_keys


@dataclass(frozen=True)
class EditTokens:
    """What a forward saw at the edit tokens of ``n`` prompts.

    Attributes:
        keys: keys, gates and experts of one layer, or ``None`` if no layer was asked for; ``keys.token`` counts
            prompts.
        hidden: ``[n, d_model]`` float32, output of the target layer.
    """

    keys: RoutedKeys | None
    hidden: Tensor


def edit_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Encoding],
    target_layer: ExpertLayer,
    layer: ExpertLayer | None,
    pad_token: int,
    token_budget: int = 16384,
) -> EditTokens:
    """Run prompts up to the target layer; return its output and one layer's keys at the edit tokens.

    Args:
        model: the model.
        prompts: encoded prompts with an edit token each.
        target_layer: the layer whose output is wanted.
        layer: the layer whose keys are wanted (not above ``target_layer``), if any.
        pad_token: id to pad with.
        token_budget: largest number of tokens (with padding) in one forward.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    size = max(1, token_budget // longest)
    hidden: list[Tensor] = []
    parts: list[RoutedKeys] = []
    start, positions = 0, torch.empty(0, dtype=torch.long)

    def observe(_: ExpertLayer, keys: RoutedKeys) -> None:
        # from positions in the batch back to the prompts' numbers; `positions` is ascending
        prompt = torch.searchsorted(positions, keys.token) + start
        parts.append(RoutedKeys(prompt, keys.expert, keys.gate, keys.key))

    with (
        inference(model),
        watch_keys(model, [] if layer is None else [layer], select=lambda: positions, observe=observe),
    ):
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            ids, mask = (x.to(model.device) for x in pad([prompt.ids for prompt in batch], pad_token))
            tokens = torch.tensor([prompt.edit_token for prompt in batch], device=ids.device)
            positions = torch.arange(len(batch), device=ids.device) * ids.shape[1] + tokens
            output = hidden_states(model, target_layer, ids, mask, position_ids(mask))
            hidden.append(output.flatten(0, 1)[positions].float())
    return EditTokens(_concatenate(parts) if parts else None, torch.cat(hidden))


def _concatenate(parts: Sequence[RoutedKeys]) -> RoutedKeys:
    merged = (torch.cat([getattr(part, name) for part in parts]) for name in ("token", "expert", "gate", "key"))
    token, expert, gate, key = merged
    order = torch.argsort(expert, stable=True)
    return RoutedKeys(token[order], expert[order], gate[order], key[order])
