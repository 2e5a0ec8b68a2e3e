"""Growth of the weights of edited experts."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_moeedit.metrics._means import Means, check_vector


def _weight_growth_update(before: Tensor, after: Tensor) -> Tensor:
    """Return the relative growth of each expert's norm, ``[E]`` float64.

    Raises:
        ValueError: As :func:`weight_growth`.

    """
    for name, norms in (("before", before), ("after", after)):
        check_vector(name, norms, "floating point", norms.is_floating_point())
    if len(before) != len(after):
        raise ValueError(f"Expected `before` and `after` of the same length, got {len(before)} and {len(after)}.")
    if bool((before <= 0).any()):
        raise ValueError(f"Expected norms > 0 in `before`, got {float(before.min())}.")
    return after.detach().double() / before.detach().double() - 1


def _weight_growth_compute(highest: Tensor, total: Tensor, experts: Tensor) -> dict[str, Tensor]:
    """Turn the maximum and the sum of growths, and their number, into the results; NaN without an expert."""
    highest = torch.where(experts > 0, highest, torch.nan)
    return {"weight_growth_max": highest.float(), "weight_growth_mean": (total / experts).float()}


def weight_growth(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    r"""Compute by how much edits let the weights of the edited experts grow.

    .. math::

        \max_j \frac{\lVert W_j' \rVert_F}{\lVert W_j \rVert_F} - 1 \qquad
        \frac{1}{|J|} \sum_{j \in J} \frac{\lVert W_j' \rVert_F}{\lVert W_j \rVert_F} - 1

    over the edited experts J of all layers. Norms that grow with every further edit are the first sign of a model that
    many edits will break.

    Args:
        before: Frobenius norms of the experts' down-projections before the edit, ``[J]``, floating point, > 0.
        after: The same after it.

    Returns:
        ``weight_growth_max`` and ``weight_growth_mean``, scalars ≥ -1 without a unit, 0 where nothing has grown, NaN
        without an expert.

    Raises:
        ValueError: If an argument has a wrong shape, dtype or length, or a norm before the edit is not positive.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import weight_growth
        >>> weight_growth(tensor([2.0, 4.0]), tensor([2.0, 5.0]))
        {'weight_growth_max': tensor(0.2500), 'weight_growth_mean': tensor(0.1250)}

    """
    growth = _weight_growth_update(before, after)
    highest = torch.cat([growth, growth.new_full((1,), -torch.inf)]).max()
    return _weight_growth_compute(highest, growth.sum(), torch.tensor(len(growth), device=growth.device))


class WeightGrowth(Means):
    """Relative growth of the norms of edited experts, its maximum and mean; see :func:`weight_growth`.

    Args:
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import WeightGrowth
        >>> metric = WeightGrowth()
        >>> metric.update(tensor([2.0, 4.0]), tensor([2.0, 5.0]))
        >>> metric.compute()["weight_growth_max"]
        tensor(0.2500)

    """

    higher_is_better = False
    plot_lower_bound = -1.0
    plot_upper_bound = None
    names = ("weight_growth_mean",)
    unit = "relative growth of the norm"

    highest: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("highest", torch.tensor(-torch.inf, dtype=torch.float64), dist_reduce_fx="max")

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add experts; arguments and errors are those of :func:`weight_growth`."""
        growth = _weight_growth_update(before, after)
        self.add(growth.sum()[None], torch.tensor([len(growth)]))
        self.highest = torch.cat([growth.to(self.highest), self.highest[None]]).max()

    def compute(self) -> dict[str, Tensor]:
        """Return the maximum and the mean of the growth, NaN without an expert."""
        return _weight_growth_compute(self.highest, self.sums[0], self.counts[0])
