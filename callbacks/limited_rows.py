"""A limit of the gradient of some rows of a batch, in a module that computes its loss by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_moeedit.data.encoding import IGNORED_LABEL
from lit_moeedit.models.experts import find_model
from lit_moeedit.models.partial_forward import hooked

log = logging.getLogger(__name__)


class LimitedRows:
    """A limit of the gradient of the last rows of batches.

    A loss is a mean over the tokens of all rows, which a module computes from its model's logits. In the backward pass,
    the gradient of the logits of each of the last rows is multiplied by a factor of at most 1: a row whose labels have
    the probability 0 gets ``limit`` times the mean norm of the other rows, and each other row less in proportion. The
    value of the loss stays as it is.

    The gradient is changed in place where it is contiguous, since another copy of it would be as large as the logits.
    If a loss adds another tensor of the same shape to the logits, the two share it, and that tensor's gradient may be
    limited, too.

    Args:
        limit: maximum norm of the gradient of a row's logits, in proportion to the mean of the other rows that have a
            loss; ``None`` for no limit.
        heading: beginning of messages.
    """

    def __init__(self, limit: float | None, heading: str) -> None:
        self.limit, self._heading = limit, heading
        self._is_checked = False

    @contextmanager
    def of(self, pl_module: L.LightningModule, labels: Tensor, first: int) -> Iterator[None]:
        """Limit the rows from ``first`` on of a batch, in the first forward inside the context that has its shape.

        If the logits of the model do not come from its output embeddings, as ``[rows, tokens, vocabulary]``, there is
        no limit, and a warning says so once.

        Args:
            pl_module: the module.
            labels: labels of the batch, ``[rows, tokens]``.
            first: index of the first row that is limited.
        """
        if self.limit is None or first >= len(labels):
            yield
            return
        found = False

        def hook(module: nn.Module, inputs: Any, logits: Tensor) -> None:
            nonlocal found
            if not found and logits.ndim == 3 and logits.shape[:2] == labels.shape and logits.requires_grad:
                found = True
                last = logits.detach()[first:].clone()  # a view would keep the logits of all rows
                logits.register_hook(lambda gradient: self._limited(gradient, last, labels[first:]))

        head = find_model(pl_module).get_output_embeddings()
        if head is None:
            yield
        else:
            with hooked(head, hook):
                yield
        if not found and not self._is_checked:
            log.warning(
                "%sthe gradient of statements of edited facts has no limit, because the model's output embeddings do "
                "not compute logits of the whole batch; the training loss may rise",
                self._heading,
            )
        self._is_checked = True

    def _limited(self, gradient: Tensor, last: Tensor, labels: Tensor) -> Tensor:
        """Limit the gradient of the last rows, in place where that can be done: logits of long batches are large."""
        assert self.limit is not None
        first = len(gradient) - len(last)
        norms = torch.linalg.vector_norm(gradient[:first], dim=(1, 2), dtype=torch.float32)
        # rows without a loss tell nothing
        mean = norms.sum() / (norms > 0).sum().clamp(min=1)
        longest = longest_gradients(gradient[first:], last, labels)
        # the batch's own rows may all be without a loss
        factors = torch.where(mean > 0, self.limit * mean / longest, 1.0).clamp(max=1.0)
        if gradient.requires_grad or not gradient.is_contiguous():
            gradient = gradient.clone()
        gradient[first:] *= factors.to(gradient.dtype)[:, None, None]
        return gradient


def longest_gradients(gradient: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    r"""Compute the norms that the gradients of rows would have if their labels had the probability 0.

    The gradient of a cross entropy is ``s (p - y)``, with a factor ``s`` that only the loss knows. At the label it is
    ``-s (1 - p)``, so that ``s`` follows from the probability. With another loss, such as one with label smoothing,
    this is too small for labels that are known, and the norm that the gradient has is the least that counts.

    Args:
        gradient: gradient of the logits, ``[rows, tokens, vocabulary]``; it is 0 at tokens without a loss.
        logits: likewise.
        labels: ``[rows, tokens]``; the logits of a token are those of the next label.

    Returns:
        ``[rows]`` in float32, above 0: ``s`` times the square root of twice the number of labels.
    """
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(gradient.device)
    is_label, place = following != IGNORED_LABEL, following.clamp(min=0)[..., None]
    pull = -gradient.gather(-1, place).squeeze(-1).float() * is_label
    missing = (1.0 - logits.float().log_softmax(-1).gather(-1, place).squeeze(-1).exp()) * is_label
    scale = pull.sum(-1) / missing.sum(-1).clamp(min=1e-6)
    norms = torch.linalg.vector_norm(gradient, dim=(1, 2), dtype=torch.float32)
    return torch.maximum(scale * (2.0 * is_label.sum(-1)).sqrt(), norms).clamp(min=1e-30)
