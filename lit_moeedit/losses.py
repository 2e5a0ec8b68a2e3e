"""Training losses of a batch that is spread over ranks: those of one process that has all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_moeedit.data.encoding import IGNORED_LABEL

Total = Callable[[Tensor], Tensor]
"""Adds up a tensor without gradient over the ranks, maybe in place."""


class Loss(NamedTuple):
    """A loss of the batch of all ranks.

    Attributes:
        share: what this rank derives. The mean over the ranks, whose gradient the optimizer gets, is the loss.
        value: the loss without gradient, the same on all ranks.
    """

    share: Tensor
    value: Tensor


def next_token_loss(logits: Tensor, labels: Tensor, label_smoothing: float, ranks: int, total: Total) -> Loss:
    """Mean cross entropy over all counted tokens, however many of them each rank has.

    Args:
        logits: this rank's, ``[batch, length, vocabulary]``.
        labels: int64 ``[batch, length]``; each is predicted at the position before it, and -100 does not count.
        label_smoothing: of the cross entropy.
        ranks: number of ranks.
        total: the sum over them.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED_LABEL
    # only the counted rows: most of the softmax would be of positions that nobody asks for
    rows, wanted = logits[counted].float(), labels[counted]
    if ranks == 1:
        loss = F.cross_entropy(rows, wanted, label_smoothing=label_smoothing)
        return Loss(loss, loss.detach())
    own = F.cross_entropy(rows, wanted, label_smoothing=label_smoothing, reduction="sum")
    everybodys, count = total(torch.stack([own.detach(), counted.sum()]))
    return Loss(ranks * own / count, everybodys / count)


def balancing_loss(
    auxiliary: Tensor, logits: Sequence[Tensor], attention_mask: Tensor, k: int | None, ranks: int, total: Total
) -> Loss:
    r"""Load-balancing loss of the routers over the batch of all ranks (Switch 2101.03961; global batch 2501.11873).

    .. math:: E \sum_j f_j \, p_j

    with ``f_j`` tokens sent to expert ``j`` and ``p_j`` the sum of its router probabilities, both divided by the
    number of tokens and over all layers together, as transformers does it for one process.

    Args:
        auxiliary: what transformers computes of this rank's batch; it is taken as it is on one rank, and its mean over
            the ranks if the family's routers return something else than logits.
        logits: of the routers, by layer, ``[batch · length, E]``.
        attention_mask: ``[batch, length]``; positions with 0 do not count.
        k: experts per token; ``None`` if that is not known.
        ranks: number of ranks.
        total: the sum over them.
    """
    if ranks == 1:
        return Loss(auxiliary, auxiliary.detach())
    if k is None or any(layer.ndim != 2 or len(layer) != attention_mask.numel() for layer in logits):
        return Loss(auxiliary, total(auxiliary.detach().clone()) / ranks)
    return switch_loss(logits, attention_mask, k, ranks, total)


def switch_loss(logits: Sequence[Tensor], attention_mask: Tensor, k: int, ranks: int, total: Total) -> Loss:
    """The formula of :func:`balancing_loss`; the arguments are its."""
    experts = logits[0].shape[-1]
    mask = attention_mask.flatten().to(logits[0].device, torch.float32)
    sent, probability = mask.new_zeros(experts), mask.new_zeros(experts)
    for layer in logits:
        routed = layer.softmax(-1)
        sent.index_add_(0, routed.topk(k).indices.flatten(), mask.repeat_interleave(k))
        probability = probability + (routed.float() * mask[:, None]).sum(0)
    tokens = len(logits) * mask.sum(0, keepdim=True)
    everybodys = total(torch.cat([sent, probability.detach(), tokens]))
    tokens = everybodys[-1]
    weight = experts * everybodys[:experts] / tokens**2
    return Loss(ranks * (weight * probability).sum(), (weight * everybodys[experts:-1]).sum())
