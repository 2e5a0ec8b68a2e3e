"""Accuracy on the probes of edits: portability, multi-hop questions and reversed questions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_moeedit.metrics._means import Means, check_vector

Kind = Literal["portability", "multi_hop", "reversed"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


def _probe_accuracy_update(right: Tensor, facts: Tensor) -> Tensor:
    """Return the share of right answers of each fact that has probes, ``[F]`` float64, facts ascending.

    Raises:
        ValueError: As :func:`probe_accuracy`.

    """
    check_vector("right", right, "bool", right.dtype == torch.bool)
    integer = not (facts.is_floating_point() or facts.is_complex() or facts.dtype == torch.bool)
    check_vector("facts", facts, "integer", integer)
    if len(right) != len(facts):
        raise ValueError(f"Expected `right` and `facts` of the same length, got {len(right)} and {len(facts)}.")
    _, place, probes = facts.unique(return_inverse=True, return_counts=True)
    held = torch.zeros(len(probes), dtype=torch.float64, device=right.device).index_add_(0, place, right.double())
    shares: Tensor = held / probes
    return shares


def _probe_accuracy_compute(total: Tensor, facts: Tensor) -> Tensor:
    """Turn a sum over facts and their number, of any shape, into float32 means; NaN without a fact."""
    return (total / facts).float()


def probe_accuracy(right: Tensor, facts: Tensor) -> Tensor:
    r"""Compute the share of probes that are answered right, first in each fact, then on average over the facts.

    .. math::

        \text{accuracy} = \frac1F \sum_t \frac{1}{|Q_t|} \sum_{q \in Q_t} [q \text{ is answered right}]

    so that a fact with many questions weighs no more than one with a single question.

    Args:
        right: True if greedy decoding generates one of the probe's answers, ``[N]``, bool.
        facts: Index of the fact of each probe, ``[N]``, any integer dtype.

    Returns:
        A scalar in [0, 1], NaN without a probe.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or length.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import probe_accuracy
        >>> probe_accuracy(tensor([True, True, False, False]), facts=tensor([0, 1, 1, 1]))
        tensor(0.6667)

    """
    found = _probe_accuracy_update(right, facts)
    return _probe_accuracy_compute(found.sum(), torch.tensor(len(found), device=found.device))


class ProbeAccuracy(Means):
    """Accuracy on the probes of edits by kind, a mean over facts of means over probes; see :func:`probe_accuracy`.

    All probes of one kind of a fact belong in one update.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import ProbeAccuracy
        >>> metric = ProbeAccuracy()
        >>> metric.update("portability", tensor([True, True, False]), facts=tensor([0, 1, 1]))
        >>> metric.compute()["portability"], metric.compute()["reversed"]
        (tensor(0.7500), tensor(nan))

    """

    names = _KINDS
    unit = "share of probes"

    def update(self, kind: Kind, right: Tensor, facts: Tensor) -> None:
        """Add the probes of one kind of some facts.

        Args:
            kind: ``"portability"``, ``"multi_hop"`` or ``"reversed"``.
            right: As for :func:`probe_accuracy`.
            facts: As for :func:`probe_accuracy`.

        Raises:
            ValueError: As :func:`probe_accuracy`, and if ``kind`` is unknown.

        """
        if kind not in _KINDS:
            raise ValueError(f"Expected `kind` to be one of {_KINDS}, got {kind!r}.")
        found = _probe_accuracy_update(right, facts)
        own = torch.tensor([kind == name for name in _KINDS], device=found.device)
        self.add(own * found.sum(), own * len(found))
