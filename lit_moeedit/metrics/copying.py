"""Copying in context: random sequences that are repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.metrics._means import Means, means


def _copy_accuracy_update(predicted: Tensor, expected: Tensor) -> Tensor:
    """Return the share of right tokens of each sequence, ``[N]`` float64.

    Raises:
        ValueError: As :func:`copy_accuracy`.

    """
    for name, ids in (("predicted", predicted), ("expected", expected)):
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.shape[1]:
            raise ValueError(
                f"Expected `{name}` to be integer [N, length], length >= 1, got {ids.dtype} {list(ids.shape)}."
            )
    if predicted.shape != expected.shape:
        shapes = f"{list(predicted.shape)} and {list(expected.shape)}"
        raise ValueError(f"Expected `predicted` and `expected` of the same shape, got {shapes}.")
    right = predicted == expected
    return right.double().mean(1)


def _copy_accuracy_compute(total: Tensor, sequences: Tensor) -> dict[str, Tensor]:
    """Turn a sum ``[1]`` over sequences, and their number ``[1]``, into the mean; NaN without a sequence."""
    return means(CopyAccuracy.names, total, sequences)


def copy_accuracy(predicted: Tensor, expected: Tensor) -> dict[str, Tensor]:
    r"""Compute how well random sequences are continued that have been read once before.

    .. math::

        \text{accuracy} = \frac{1}{N (L - 1)} \sum_i \sum_{p=2}^{L}
        [\arg\max P(\cdot \mid s_i\, s_{i, <p}) = s_{i,p}]

    A model copies by attention alone, without facts, so a loss here is damage that no question about facts shows
    (induction heads, arXiv 2209.11895).

    Args:
        predicted: The likeliest tokens at the places of the second half from its second token on, ``[N, L - 1]``, any
            integer dtype. The first token of the second half cannot be known.
        expected: The tokens there, of the same shape.

    Returns:
        ``copy_accuracy``, a scalar in [0, 1], NaN without a sequence.

    Raises:
        ValueError: If an argument has a wrong shape or dtype.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import copy_accuracy
        >>> copy_accuracy(tensor([[5, 7], [1, 2]]), tensor([[5, 7], [1, 3]]))
        {'copy_accuracy': tensor(0.7500)}

    """
    found = _copy_accuracy_update(predicted, expected)
    return _copy_accuracy_compute(found.sum()[None], torch.tensor([len(found)], device=found.device))


class CopyAccuracy(Means):
    """Accuracy on the second half of random sequences that are repeated; see :func:`copy_accuracy`.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import CopyAccuracy
        >>> metric = CopyAccuracy()
        >>> metric.update(tensor([[5, 7]]), tensor([[5, 7]]))
        >>> metric.compute()
        {'copy_accuracy': tensor(1.)}

    """

    names = ("copy_accuracy",)
    unit = "share of tokens"

    def update(self, predicted: Tensor, expected: Tensor) -> None:
        """Add sequences; arguments and errors are those of :func:`copy_accuracy`."""
        found = _copy_accuracy_update(predicted, expected)
        self.add(found.sum()[None], torch.tensor([len(found)]))
