"""The distance between the probabilities of the new and of the true target."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.metrics._means import Means, check_vector, means


def _probability_gap_update(log_prob_new: Tensor, log_prob_true: Tensor) -> Tensor:
    """Return the gaps of each prompt, ``[2, N]`` float64: of probabilities, and of log-probabilities in nats.

    Raises:
        ValueError: As :func:`probability_gap`.

    """
    for name, values in (("log_prob_new", log_prob_new), ("log_prob_true", log_prob_true)):
        check_vector(name, values, "floating point", values.is_floating_point())
    if len(log_prob_new) != len(log_prob_true):
        lengths = f"{len(log_prob_new)} and {len(log_prob_true)}"
        raise ValueError(f"Expected `log_prob_new` and `log_prob_true` of the same length, got {lengths}.")
    new, true = log_prob_new.detach().double(), log_prob_true.detach().double()
    return torch.stack([new.exp() - true.exp(), new - true])


def _probability_gap_compute(total: Tensor, prompts: Tensor) -> dict[str, Tensor]:
    """Turn sums ``[2]`` over prompts, and their numbers ``[2]``, into means; NaN without a prompt."""
    return means(ProbabilityGap.names, total, prompts)


def probability_gap(log_prob_new: Tensor, log_prob_true: Tensor) -> dict[str, Tensor]:
    r"""Compute by how much the new target is more probable than the true one.

    .. math::

        \frac1N \sum_i P_i(\text{new}) - P_i(\text{true}) \qquad
        \frac1N \sum_i \log P_i(\text{new}) - \log P_i(\text{true})

    where :math:`P` is the geometric mean of the probabilities of the target's tokens, so that long targets do not lose
    by their length. A share of preferred targets says on which side each fact is; the gap says how far.

    Args:
        log_prob_new: Mean token log-probability (nats) of the new target, ``[N]``, floating point.
        log_prob_true: The same of the true target. A prompt with NaN in either (without a true target) does not count.

    Returns:
        ``probability_gap`` in [-1, 1], and ``log_probability_gap`` in nats; NaN without a prompt that counts.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or length.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import probability_gap
        >>> probability_gap(tensor([0.9, 0.5]).log(), tensor([0.1, 0.5]).log())
        {'probability_gap': tensor(0.4000), 'log_probability_gap': tensor(1.0986)}

    """
    gaps = _probability_gap_update(log_prob_new, log_prob_true)
    return _probability_gap_compute(gaps.nansum(1), (~gaps.isnan()).sum(1))


class ProbabilityGap(Means):
    """Mean distance between the probabilities of the new and of the true target; see :func:`probability_gap`.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import ProbabilityGap
        >>> metric = ProbabilityGap()
        >>> metric.update(tensor([0.9]).log(), tensor([0.1]).log())
        >>> metric.compute()["probability_gap"]
        tensor(0.8000)

    """

    plot_lower_bound = None  # one is a probability, the other has no bound
    plot_upper_bound = None
    names = ("probability_gap", "log_probability_gap")
    unit = "gap (probability; nats)"

    def update(self, log_prob_new: Tensor, log_prob_true: Tensor) -> None:
        """Add prompts; arguments and errors are those of :func:`probability_gap`."""
        gaps = _probability_gap_update(log_prob_new, log_prob_true)
        self.add(gaps.nansum(1), (~gaps.isnan()).sum(1))
