"""A limit of the gradient of some rows of a batch, in a module that computes its loss by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_moeedit.models.experts import find_model
from lit_moeedit.models.partial_forward import hooked

log = logging.getLogger(__name__)


class LimitedRows:
    """A limit of the gradient of the last rows of batches.

    A loss is a mean over the tokens of all rows, which a module computes from its model's logits. In the backward pass,
    the gradient of the logits of each of the last rows is shortened to ``limit`` times the mean norm of those of the
    other rows, if it is longer. The value of the loss stays as it is. That needs a copy of the gradient of the logits
    for a moment.

    Args:
        limit: maximum norm of the gradient of a row's logits, in proportion to the mean of the other rows that have a
            loss; ``None`` for no limit.
        heading: beginning of messages.
    """

    def __init__(self, limit: float | None, heading: str) -> None:
        self.limit, self._heading = limit, heading
        self._is_checked = False

    @contextmanager
    def of(self, pl_module: L.LightningModule, rows: int, first: int) -> Iterator[None]:
        """Limit the rows from ``first`` on of a batch of ``rows`` rows, in the forward inside the context.

        If the logits of the model do not come from its output embeddings, as ``[rows, tokens, vocabulary]``, there is
        no limit, and a warning says so once.
        """
        if self.limit is None or first >= rows:
            yield
            return
        found = False

        def hook(module: nn.Module, inputs: Any, logits: Tensor) -> None:
            nonlocal found
            if logits.ndim == 3 and len(logits) == rows and logits.requires_grad:
                found = True
                logits.register_hook(lambda gradient: self._limited(gradient, first))

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

    def _limited(self, gradient: Tensor, first: int) -> Tensor:
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2), dtype=torch.float32)
        own, last = norms[:first], norms[first:]
        # rows without a loss tell nothing
        most = self.limit * own.sum() / (own > 0).sum().clamp(min=1)
        factors = torch.ones_like(norms)
        # the batch's own rows may all be without a loss
        factors[first:] = torch.where(most > 0, (most / last.clamp(min=1e-30)).clamp(max=1.0), 1.0)
        return gradient * factors.to(gradient.dtype)[:, None, None]
