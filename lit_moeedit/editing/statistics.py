"""Second moments of the experts' keys over text that an edit must preserve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import encode, pad, pad_id, position_ids, token_batches
from lit_moeedit.editing.running import hidden_states, inference
from lit_moeedit.models.experts import ExpertLayer, RoutedKeys, watch_keys
from lit_moeedit.sharding.ranks import Ranks


@dataclass
class SecondMoments:
    """Sums over the tokens that were routed to each expert of one layer.

    Attributes:
        total: ``[E, d_hidden, d_hidden]`` float32, ``Σ k kᵀ``.
        count: ``[E]`` int64, tokens seen.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, layer: ExpertLayer) -> SecondMoments:
        """Empty sums for a layer."""
        experts, _, d_hidden = layer.shape
        device = layer.down_proj.device
        return cls(
            torch.zeros(experts, d_hidden, d_hidden, device=device),
            torch.zeros(experts, dtype=torch.long, device=device),
        )

    def add(self, keys: RoutedKeys) -> None:
        """Add the keys of some tokens."""
        counts = torch.bincount(keys.expert, minlength=len(self.count))
        self.count += counts
        for expert, rows in enumerate(keys.key.float().split(counts.tolist())):
            if len(rows):
                self.total[expert].addmm_(rows.T, rows)

    def mean(self, experts: Tensor) -> Tensor:
        """``C_j`` of the given experts ``[n]``: ``[n, d_hidden, d_hidden]``; zero for an expert that saw nothing."""
        return self.total[experts] / self.count[experts].clamp_min(1)[:, None, None]


def second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[ExpertLayer],
    texts: Sequence[str],
    token_budget: int = 8192,
    max_length: int = 512,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> dict[int, SecondMoments]:
    """Stream texts through the model and accumulate second moments of every expert in the given layers.

    Layers above the highest of ``layers`` are not run. The texts are dealt to the ranks, and the sums added up.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        layers: the layers to watch.
        texts: preservation text, one document each.
        token_budget: largest number of tokens (with padding) in one forward.
        max_length: longer texts are cut.
        progress: called with the texts done and all.
        ranks: the processes that share the work; each calls this with the same texts.

    Raises:
        ValueError: if there is no text.
    """
    ranks = ranks if ranks is not None else Ranks()
    if not texts:
        raise ValueError("there is no preservation text: second moments need at least one")
    rows = [e.ids[:max_length] for e in encode(tokenizer, texts, [""] * len(texts)) if e.ids]
    moments = {layer.index: SecondMoments.zeros(layer) for layer in layers}
    batches = list(token_batches([len(row) for row in rows], token_budget))
    mask, wanted = torch.empty(0), True
    top = max(layers, key=lambda layer: layer.index)

    def observe(layer: ExpertLayer, keys: RoutedKeys) -> None:
        if wanted:
            moments[layer.index].add(keys)

    with (
        inference(model),
        watch_keys(model, layers, select=lambda: mask.flatten().nonzero().squeeze(-1), observe=observe),
    ):
        for number, (batch, mine) in enumerate(ranks.deal(batches)):
            wanted = mine
            ids, mask = (x.to(model.device) for x in pad([rows[i] for i in batch], pad_id(tokenizer)))
            hidden_states(model, top, ids, mask, position_ids(mask))
            if progress is not None:
                progress(sum(map(len, batches[: (number + 1) * ranks.size])), len(rows))
    ranks.agree()
    for summed in moments.values():
        ranks.sum(summed.total, summed.count)
    return moments
