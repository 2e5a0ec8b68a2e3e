"""Rows whose beginning stays as it is: its keys and values are kept, and only what follows is run."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lit_moeedit.models.partial_forward import logits


class _PrefixLayer(DynamicLayer):
    """Keeps the first ``length`` positions of the first forward; every later forward sees them, and adds nothing."""

    def __init__(self, length: int) -> None:
        super().__init__()
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
        # of a layer that is not run too, because transformers makes the mask of all layers from one of them
        return self.length if self.fixed else 0


class Prefix(Cache):
    """Keys and values of the first ``length`` positions of some rows, in the layers that are run.

    The first forward records them, from whole rows. After :meth:`fix`, forwards take the rest of each row only. In a
    causal model both say the same of the rest, as long as nothing changes in the first positions.

    A sliding window is the mask's matter, so all positions are kept for it, too.

    Args:
        layers: number of decoder layers of the model.
        length: positions that stay as they are. Rows are padded on their left up to it.
    """

    def __init__(self, layers: int, length: int) -> None:
        self._parts = [_PrefixLayer(length) for _ in range(layers)]
        super().__init__(layers=[*self._parts])

    def fix(self) -> None:
        """The rows are recorded."""
        for layer in self._parts:
            layer.fixed = True

    def select(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        for layer in self._parts:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def prefix_for(model: PreTrainedModel, length: int) -> Prefix | None:
    """An empty :class:`Prefix`, or ``None`` where the model's layers carry more than keys and values.

    Linear attention and state-space layers do, shared caches and indexers; transformers declares that by the cache
    that it makes for a config.
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
) -> Tensor:
    """Logits at ``m`` single positions, ``[m, vocabulary]``; the output embeddings are run on these alone.

    They are picked on the way into the output embeddings, so what a family does with logits behind them (scaling, soft
    capping) is done here too.

    Args:
        model: the model.
        input_ids: int64 ``[batch, length]``.
        attention_mask: int64 ``[batch, length]``, with the positions of ``prefix`` before them.
        positions: int64 ``[batch, length]``, position ids.
        rows: int64 ``[m]``.
        columns: int64 ``[m]``, within ``length``.
        prefix: what stands before the rows, or records it.
    """
    picked = False

    def pick(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal picked
        if not args or args[0].shape[:2] != input_ids.shape:
            return None
        picked = True
        return (args[0][rows, columns][None], *args[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        scores = logits(model, input_ids, attention_mask, positions, keep=0, cache=prefix)
    finally:
        if handle is not None:
            handle.remove()
    return scores[0] if picked else scores[rows, columns]
