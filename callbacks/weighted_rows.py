"""A smaller weight of some rows of a batch in the gradient, in a module that computes its loss by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor, nn

from lit_moeedit.models.experts import find_model
from lit_moeedit.models.partial_forward import hooked

log = logging.getLogger(__name__)


class WeightedRows:
    """The weight of the last rows of batches in the gradient.

    A loss is a mean over the tokens of all rows, which a module computes from its model's logits. The gradient of the
    logits of some rows is multiplied by the weight in the backward pass; the value of the loss stays as it is. That
    needs a copy of the gradient of the logits for a moment.

    Args:
        weight: weight of the rows, in proportion to that of the others.
        heading: beginning of messages.
    """

    def __init__(self, weight: float, heading: str) -> None:
        self.weight, self._heading = weight, heading
        self._is_checked = False

    @contextmanager
    def of(self, pl_module: L.LightningModule, rows: int, first: int) -> Iterator[None]:
        """Weight the rows from ``first`` on of a batch of ``rows`` rows, in the forward inside the context.

        If the logits of the model do not come from its output embeddings, as ``[rows, tokens, vocabulary]``, the rows
        count like the others, and a warning says so once.
        """
        head = find_model(pl_module).get_output_embeddings()
        if self.weight == 1.0 or first >= rows:
            yield
            return
        found = False

        def hook(module: nn.Module, inputs: Any, logits: Tensor) -> None:
            nonlocal found
            if logits.ndim == 3 and len(logits) == rows and logits.requires_grad:
                found = True
                logits.register_hook(lambda gradient: self._weighted(gradient, first))

        if head is None:
            yield
        else:
            with hooked(head, hook):
                yield
        if not found and not self._is_checked:
            log.warning(
                "%sstatements of edited facts count as much as other rows, because the model's output embeddings do "
                "not compute logits of the whole batch; the training loss may rise",
                self._heading,
            )
        self._is_checked = True

    def _weighted(self, gradient: Tensor, first: int) -> Tensor:
        gradient = gradient.clone()
        gradient[first:] *= self.weight
        return gradient
