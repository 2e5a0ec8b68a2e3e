"""The number of tokens in one forward: as many as fit into memory, and fewer after memory has run out."""

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
from lit_moeedit.sharding.shards import whole_shape

log = logging.getLogger(__name__)

T = TypeVar("T")
Budget = int | Literal["auto"]
"""Maximum number of tokens (with padding) in one forward; ``auto`` chooses it by the free memory."""

MAX_TOKENS = 16384
"""Maximum number of tokens that ``auto`` chooses, unless a phase has its own."""
GPU_TOKENS = 2 * MAX_TOKENS
"""The same for forwards without gradients on a GPU, where few tokens take less time than the start of the kernels."""
MEMORY_SHARE = 0.8
"""Share of the free memory that ``auto`` fills; the rest is for workspaces of kernels and for fragmentation."""
FLOAT32_BYTES = 4
"""Bytes of a float32 element."""


class TooLittleMemoryError(RuntimeError):
    """The smallest batch does not fit into memory."""


def check_budget(budget: Budget) -> None:
    """Raise ``ValueError`` if a setting is not a valid budget."""
    if budget == "auto":
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise ValueError(f"token_budget must be a whole number or 'auto', got {budget!r}")
    if budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {budget}")


class TokenBudget:
    """The maximum number of tokens in one forward of a phase, the same on all ranks.

    Construction with ``auto`` is a collective operation. So is a forward under ZeRO stage 3: there all ranks must run
    out of memory at the same layer to go on with fewer tokens. If one rank alone runs out, the others wait for it in
    that forward, see :class:`~lit_moeedit.sharding.ranks.Ranks`.

    Args:
        given: a number of tokens, which holds until memory runs out, or ``auto``.
        cost: bytes of memory per token in this phase, for ``auto``.
        device: the device of the model.
        ranks: the processes that share the work.
        maximum: what ``auto`` chooses at most.

    Attributes:
        tokens: the budget. It is halved each time memory runs out, and stays so.
    """

    def __init__(
        self, given: Budget, cost: float, device: torch.device, ranks: Ranks, maximum: int = MAX_TOKENS
    ) -> None:
        check_budget(given)
        self.device, self.ranks = device, ranks
        if isinstance(given, int):
            self.tokens = given
        else:
            self.tokens = ranks.least(tokens_that_fit(cost, free_memory(device, ranks.size), maximum))

    def run(self, phase: str, work: Callable[[int], T], least: int, most: int) -> T:
        """Return ``work(tokens)``; if memory runs out on any rank, all ranks restart with half as many tokens.

        Args:
            phase: name of the work, for messages.
            work: does it with the given maximum number of tokens in a forward. It may be called again after a failure.
            least: number of tokens of the longest row, or of the largest other unit that cannot be divided.
            most: number of tokens (with padding) of all rows together.

        Raises:
            TooLittleMemoryError: ``least`` tokens do not fit; raised on all ranks.
        """
        while True:
            try:
                with self.ranks.together():
                    return work(self.tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error).split("\n")[0]
                # the frames of the failed forward keep its tensors alive
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
        need = f"{wanted[1]} were requested, {free:.2f} GiB are free" if wanted else f"{free:.2f} GiB are free"
        raise TooLittleMemoryError(
            f"{phase}: {self.device} has no room for the smallest batch, {least} tokens ({need}): use a larger card, "
            f"shorter texts, or a model that is sharded over more cards. ({message})"
        )


def tokens_that_fit(cost: float, free: float, maximum: int = MAX_TOKENS) -> int:
    """Compute the number of tokens that ``auto`` takes, from bytes per token and free bytes.

    Example:
        >>> tokens_that_fit(cost=1e6, free=5e9), tokens_that_fit(cost=1.0, free=5e9), tokens_that_fit(cost=1e9, free=0)
        (4000, 16384, 1)
    """
    return max(1, min(maximum, int(MEMORY_SHARE * free / max(cost, 1.0))))


def most_tokens(device: torch.device) -> int:
    """Return the maximum number of tokens that ``auto`` chooses for a forward without gradients."""
    return MAX_TOKENS if device.type == "cpu" else GPU_TOKENS


def release(device: torch.device) -> None:
    """Release memory that is no longer in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- memory per token -------------------------------------------------------------------------------------------------


def forward_cost(model: PreTrainedModel, layer: ExpertLayer) -> int:
    """Estimate the maximum number of bytes per token in a forward up to ``layer`` without gradients.

    The tensors of one layer are alive at a time. Most of them belong to the experts, if all are computed at once: for
    each pair its input, output and intermediate tensors (gates, biases, sums), its key, and the key's copy for second
    moments.
    """
    _, d_model, d_hidden = layer.shape
    k, itemsize = experts_per_token(model), layer.down_proj.element_size()
    dense = max(_widths(other, 0) for other in decoder_layers(model, layer))
    inside = (8 if layer.experts.has_bias else 4) * itemsize + 4 * FLOAT32_BYTES
    return 2 * dense * itemsize + k * (4 * d_model * itemsize + d_hidden * inside)


def target_cost(model: PreTrainedModel, layer: ExpertLayer, kept: float, predicted: float) -> float:
    """Estimate the maximum number of bytes per token of a row while target vectors are optimised.

    Args:
        model: the model.
        layer: the target layer.
        kept: share of the tokens that pass the layers above with gradients: those from the edit token on.
        predicted: number of predictions per token of a row; each has logits of the whole vocabulary.
    """
    layers = decoder_layers(model, layer)
    above = layers[next(i for i, other in enumerate(layers) if other is layer.layer) + 1 :]
    itemsize = layer.down_proj.element_size()
    # autograd saves no inputs of products with frozen weights, but the float32 tensors of norms
    saved = 0.75 * itemsize * sum(_widths(other, experts_per_token(model)) for other in above)
    return forward_cost(model, layer) + kept * saved + predicted * logits_cost(model)


def logits_cost(model: PreTrainedModel) -> int:
    """Estimate the bytes of the logits of one position, of their log-softmax, and of the gradients of both."""
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    return 4 * FLOAT32_BYTES * int(vocabulary)


def _widths(layer: torch.nn.Module, k: int) -> int:
    """Count a token's elements in the inputs and outputs of all products of a decoder layer, with ``k`` experts."""

    def width(weight: Tensor) -> int:
        shape = whole_shape(weight)
        return (k if len(shape) == 3 else 1) * sum(shape[-2:]) if len(shape) >= 2 else 2 * shape.numel()

    return sum(width(weight) for weight in layer.parameters())
