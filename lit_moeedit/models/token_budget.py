"""How many tokens go through a model at once: as many as memory has room for, and fewer where it runs out."""

from __future__ import annotations

import gc
import logging
import re
import traceback
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.models.experts import ExpertLayer, experts_per_token
from lit_moeedit.models.partial_forward import decoder_layers
from lit_moeedit.sharding.device_memory import free_memory
from lit_moeedit.sharding.ranks import Ranks, is_out_of_memory

log = logging.getLogger(__name__)

T = TypeVar("T")
Budget = int | Literal["auto"]
"""Largest number of tokens (with padding) in one forward; ``auto`` chooses it from free memory."""

LARGEST = 16384
"""Tokens that ``auto`` chooses at most."""
SHARE = 0.8
"""Share of the free memory that ``auto`` fills: kernels' work space and fragments of the allocator come on top."""
FLOAT = 4
"""Bytes of a float32 number."""


class TooLittleMemoryError(RuntimeError):
    """Memory has no room for the smallest batch."""


def check_budget(budget: Budget) -> None:
    """Raise ``ValueError`` if a setting is no budget."""
    if budget == "auto":
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"token_budget must be a whole number or 'auto', got {budget!r}")
    if budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {budget}")


class TokenBudget:
    """The largest number of tokens in one forward of a phase, the same on all ranks.

    Making one with ``auto`` is a collective operation. Under ZeRO stage 3 a forward is one, too: there ranks go on with
    fewer tokens if memory runs out on all of them at the same place. If it runs out on one alone, the others wait for
    it in that forward, see :class:`~lit_moeedit.sharding.ranks.Ranks`.

    Args:
        given: a number, which is obeyed as long as memory does not run out, or ``auto``.
        cost: bytes that a token takes in the phase, for ``auto``.
        device: where the model is.
        ranks: the processes that share the work.

    Attributes:
        tokens: the budget. It falls by half, and stays there, whenever memory runs out.
    """

    def __init__(self, given: Budget, cost: float, device: torch.device, ranks: Ranks) -> None:
        check_budget(given)
        self.device, self.ranks = device, ranks
        self.tokens = given if isinstance(given, int) else ranks.least(fitting(cost, free_memory(device, ranks.size)))

    def run(self, phase: str, work: Callable[[int], T], least: int, most: int) -> T:
        """Return ``work(tokens)``; where memory runs out on any rank, all begin again with half as many tokens.

        Args:
            phase: names the work.
            work: does it, with at most so many tokens in a forward. It may be called again after it has failed.
            least: tokens of the longest row, or of what else cannot be divided.
            most: tokens (with padding) of all rows together.

        Raises:
            TooLittleMemoryError: if there is no room for that, on all ranks.
        """
        while True:
            try:
                with self.ranks.together():
                    return work(self.tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).split("\n")[0]
                # the frames of the failed forward hold what it has filled memory with
                traceback.clear_frames(error.__traceback__)
            self.ranks.forget()
            release(self.device)
            if self.tokens <= least:
                self._give_up(phase, least, message)
            self.tokens = max(least, min(self.tokens, most) // 2)
            log.warning("%s: memory ran out; going on with at most %d tokens at a time", phase, self.tokens)

    def _give_up(self, phase: str, least: int, message: str) -> None:
        wanted = re.search(r"Tried to allocate ([\d.]+ [KMGT]?i?B)", message)
        free = free_memory(self.device) / 2**30
        need = f"{wanted[1]} were asked for, {free:.2f} GiB are free" if wanted else f"{free:.2f} GiB are free"
        raise TooLittleMemoryError(
            f"{phase}: {self.device} has no room for the smallest batch, {least} tokens ({need}): use a larger card, "
            f"shorter texts, or a model that is sharded over more cards. ({message})"
        )


def fitting(cost: float, free: float) -> int:
    """Number of tokens of ``cost`` bytes each that ``auto`` takes where ``free`` bytes are free.

    Example:
        >>> fitting(cost=1e6, free=5e9), fitting(cost=1.0, free=5e9), fitting(cost=1e9, free=0)
        (4000, 16384, 1)
    """
    return max(1, min(LARGEST, int(SHARE * free / max(cost, 1.0))))


def release(device: torch.device) -> None:
    """Give memory back that nothing uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- what a token takes -----------------------------------------------------------------------------------------------


def forward_cost(model: PreTrainedModel, layer: ExpertLayer) -> int:
    """Bytes that a token takes at most in a forward up to ``layer`` without gradients.

    One layer's tensors are alive at a time. Most are those of the experts, if all run at once: a pair's input and
    output with what is made on the way (gates, biases, sums), its key, and the key as second moments take it.
    """
    _, d_model, d_hidden = layer.shape
    k, itemsize = experts_per_token(model), layer.down_proj.element_size()
    dense = max(_widths(other, 0) for other in decoder_layers(model, layer))
    inside = (8 if layer.experts.has_bias else 4) * itemsize + 4 * FLOAT
    return 2 * dense * itemsize + k * (4 * d_model * itemsize + d_hidden * inside)


def target_cost(model: PreTrainedModel, layer: ExpertLayer, kept: float, predicted: float) -> float:
    """Bytes that a token of a row takes at most while target vectors are optimised.

    Args:
        model: the model.
        layer: the target layer.
        kept: share of the tokens that run with gradients through the layers above: those from the edit token on.
        predicted: predictions for each token of a row; each has logits of the whole vocabulary.
    """
    layers = decoder_layers(model, layer)
    above = layers[next(i for i, other in enumerate(layers) if other is layer.layer) + 1 :]
    itemsize = layer.down_proj.element_size()
    # inputs of products with frozen weights are not saved, what norms make in float32 is
    saved = 0.75 * itemsize * sum(_widths(other, experts_per_token(model)) for other in above)
    return forward_cost(model, layer) + kept * saved + predicted * logits_cost(model)


def logits_cost(model: PreTrainedModel) -> int:
    """Bytes that the logits of one position take with their logarithms, and with the gradients of both."""
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    return 4 * FLOAT * int(vocabulary)


def _widths(layer: torch.nn.Module, k: int) -> int:
    """Elements of a token's inputs and outputs of all products of a decoder layer, with ``k`` of its experts."""

    def width(weight: Tensor) -> int:
        shape = getattr(weight, "ds_shape", weight.shape)
        return (k if len(shape) == 3 else 1) * sum(shape[-2:]) if len(shape) >= 2 else 2 * shape.numel()

    return sum(width(weight) for weight in layer.parameters())
