"""Cached keys and values of the beginning of rows, so that only the rest of each row is run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lit_moeedit.models.partial_forward import hooked, logits


class _PrefixLayer(DynamicLayer):
    """Stores the first ``length`` positions of the first forward. Later forwards attend to them and store nothing."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it without annotations
        self.length, self.fixed = length, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.fixed:
            # copies: a view would keep the other positions alive
            self.keys = key_states[..., : self.length, :].clone()
            self.values = value_states[..., : self.length, :].clone()
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def get_seq_length(self) -> int:
        # also for a layer that is not run, because transformers derives the mask of all layers from one of them
        return self.length if self.fixed else 0


class Prefix(Cache):
    """Keys and values of the first ``length`` positions of some rows, in the layers that are run.

    The first forward records them from whole rows. After :meth:`fix`, forwards take only the rest of each row. A causal
    model computes the same for the rest either way, as long as nothing changes in the first positions.

    All positions are kept for a sliding window, too, because the attention mask implements it.

    Args:
        layers: number of decoder layers of the model.
        length: number of positions to keep. Rows are padded on the left up to it.
    """

    def __init__(self, layers: int, length: int) -> None:
        self._parts = [_PrefixLayer(length) for _ in range(layers)]
        super().__init__(layers=[*self._parts])

    def fix(self) -> None:
        """End the recording."""
        for layer in self._parts:
            layer.fixed = True

    def select(self, rows: Tensor) -> None:
        """Keep only some of the rows."""
        for layer in self._parts:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def prefix_for(model: PreTrainedModel, length: int) -> Prefix | None:
    """Return an empty :class:`Prefix`, or ``None`` if the model's layers have more state than keys and values.

    Linear attention, state-space layers, shared caches and indexers have more. The cache that transformers makes for
    the model's config shows it.
    """
    accepted = inspect.signature(model.forward).parameters
    if "past_key_values" not in accepted or "position_ids" not in accepted:
        return None
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=model.config).layers
    return Prefix(len(layers), length) if all(type(layer) in plain for layer in layers) else None


def logits_at(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    rows: Tensor,
    columns: Tensor,
    prefix: Prefix | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Compute logits ``[m, vocabulary]`` at ``m`` positions; the output embeddings are run on these alone.

    The positions are selected at the input of the output embeddings. What a model family does to logits afterwards
    (scaling, soft capping) is applied here, too.

    Args:
        model: the model.
        input_ids: int64 ``[batch, length]``.
        attention_mask: int64 ``[batch, length]``, or ``[batch, prefix length + length]`` after a recorded ``prefix``.
        positions: int64 ``[batch, length]``, position ids.
        rows: int64 ``[m]``, row of each position.
        columns: int64 ``[m]``, column of each position, within ``length``.
        prefix: keys and values of what precedes the rows, or an empty prefix that records them.
        weights: tensors that replace the parameters of these names.
    """
    picked = False

    def pick(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal picked
        if not args or args[0].shape[:2] != input_ids.shape:
            return None
        picked = True
        return (args[0][rows, columns][None], *args[1:])

    head = model.get_output_embeddings()
    with nullcontext() if head is None else hooked(head, pick, before=True):
        scores = logits(model, input_ids, attention_mask, positions, keep=0, cache=prefix, weights=weights)
    return scores[0] if picked else scores[rows, columns]
