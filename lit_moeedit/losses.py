"""Training losses of a batch that is spread over ranks; they equal those of one process with the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_moeedit.data.encoding import IGNORED_LABEL

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor without gradients over the ranks, possibly in place."""


class Loss(NamedTuple):
    """A loss of the batch of all ranks.

    Attributes:
        local: the loss that this rank differentiates. Its mean over the ranks, and so its gradient after the optimizer
            has averaged it, is that of the whole batch.
        value: the loss of the whole batch without gradients, the same on all ranks.
    """

    local: Tensor
    value: Tensor


def next_token_loss(logits: Tensor, labels: Tensor, label_smoothing: float, ranks: int, all_reduce: AllReduce) -> Loss:
    """Compute the mean cross entropy over the labels of all ranks, however many each of them has.

    Args:
        logits: logits of this rank, ``[batch, length, vocabulary]``.
        labels: int64 ``[batch, length]``; each is predicted at the position before it, and -100 is ignored.
        label_smoothing: smoothing of the cross entropy.
        ranks: number of ranks.
        all_reduce: sums a tensor over the ranks.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    is_counted = labels != IGNORED_LABEL
    # the softmax is computed for these rows only, because most positions are ignored
    rows, targets = logits[is_counted].float(), labels[is_counted]
    if ranks == 1:
        loss = F.cross_entropy(rows, targets, label_smoothing=label_smoothing)
        return Loss(loss, loss.detach())
    local = F.cross_entropy(rows, targets, label_smoothing=label_smoothing, reduction="sum")
    total, count = all_reduce(torch.stack([local.detach(), is_counted.sum()]))
    return Loss(ranks * local / count, total / count)


def balancing_loss(
    auxiliary: Tensor, logits: Sequence[Tensor], mask: Tensor, k: int | None, ranks: int, all_reduce: AllReduce
) -> Loss:
    r"""Compute the load-balancing loss of the routers (Switch, arXiv 2101.03961; global batch, arXiv 2501.11873).

    .. math:: E \sum_j f_j \, p_j

    Here ``f_j`` is the number of tokens routed to expert ``j`` and ``p_j`` the sum of its router probabilities, both
    divided by the number of tokens. Both are over all layers together, as in transformers, and over all ranks.

    Args:
        auxiliary: the loss that transformers computes for the batch of this rank. It is the result on one rank, and its
            mean over the ranks is the result for families whose routers do not return logits.
        logits: logits of the routers, by layer, ``[batch · length, E]``.
        mask: attention mask, ``[batch, length]``; positions with 0 are ignored.
        k: experts per token; ``None`` if it is unknown.
        ranks: number of ranks.
        all_reduce: sums a tensor over the ranks.
    """
    if ranks == 1:
        return Loss(auxiliary, auxiliary.detach())
    if k is None or any(layer.ndim != 2 or len(layer) != mask.numel() for layer in logits):
        return Loss(auxiliary, all_reduce(auxiliary.detach().clone()) / ranks)
    return switch_loss(logits, mask, k, ranks, all_reduce)


def switch_loss(logits: Sequence[Tensor], mask: Tensor, k: int, ranks: int, all_reduce: AllReduce) -> Loss:
    """Compute the formula of :func:`balancing_loss`, with its arguments."""
    experts = logits[0].shape[-1]
    mask = mask.flatten().to(logits[0].device, torch.float32)
    routed, probability = mask.new_zeros(experts), mask.new_zeros(experts)
    for layer in logits:
        probabilities = layer.softmax(-1)
        routed.index_add_(0, probabilities.topk(k).indices.flatten(), mask.repeat_interleave(k))
        probability = probability + (probabilities.float() * mask[:, None]).sum(0)
    tokens = len(logits) * mask.sum(0, keepdim=True)
    total = all_reduce(torch.cat([routed, probability.detach(), tokens]))
    weight = experts * total[:experts] / total[-1] ** 2
    return Loss(ranks * (weight * probability).sum(), (weight * total[experts:-1]).sum())
