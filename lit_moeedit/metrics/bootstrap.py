"""Confidence intervals of means over facts, by the bootstrap."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000
"""Default number of resamples."""
LEVEL = 0.95
"""Default share of the resamples that an interval covers."""
_BLOCK = 2**22
"""Maximum number of draws at a time, which bounds the memory used."""


def bootstrap_interval(
    values: Tensor, weights: Tensor | None = None, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Tensor:
    r"""Compute percentile bootstrap intervals of means over facts (Efron, 1979).

    T facts are drawn with replacement, ``resamples`` times; the same draws serve all M metrics. The interval of a
    metric reaches from the quantile (1 − level)/2 to the quantile (1 + level)/2 of

    .. math::

        \bar v_r = \sum_t c_{rt} v_t \Big/ \sum_t c_{rt} w_t

    where :math:`c_{rt}` is how often fact t was drawn. Facts are drawn as wholes: the paraphrases of a fact stand or
    fall together, so an interval over paraphrases as if they were independent would be too short.

    Args:
        values: Numerator of each fact, ``[M, T]`` or ``[T]``, real; such as the number of its paraphrases that hold.
        weights: Denominator of each fact, of the same shape; such as the number of its paraphrases. A fact with 0 has
            no part. ``None``: 1.
        resamples: Number of resamples R.
        level: Share of the resamples that the interval covers, in (0, 1).
        seed: Seed of the draws; no global random state is used.

    Returns:
        Lower and upper bounds, ``[M, 2]`` or ``[2]``, float64, on the CPU. NaN where fewer than two facts have a
        weight: nothing is known of how other facts would have fared. Of many equal values the interval has no width.

    Raises:
        ValueError: If an argument has a wrong shape or is out of range.

    Example:
        >>> from lit_moeedit.metrics import bootstrap_interval
        >>> bootstrap_interval(torch.tensor([1.0] * 80 + [0.0] * 20))
        tensor([0.7200, 0.8800], dtype=torch.float64)

    """
    values = values.detach().cpu().double()
    weights = torch.ones_like(values) if weights is None else weights.detach().cpu().double()
    if values.ndim not in (1, 2) or values.shape != weights.shape:
        shapes = f"{list(values.shape)} and {list(weights.shape)}"
        raise ValueError(f"Expected `values` and `weights` to be [M, T] or [T], both the same, got {shapes}.")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"Expected `resamples` >= 1 and `level` in (0, 1), got {resamples} and {level}.")
    rows, sizes = (x if x.ndim == 2 else x[None] for x in (values, weights))
    facts = values.shape[-1]
    bounds = torch.full((len(rows), 2), torch.nan, dtype=torch.float64)
    if facts:
        generator = torch.Generator().manual_seed(seed)
        means = []
        for block in torch.arange(resamples).split(max(1, _BLOCK // facts)):
            drawn = torch.randint(facts, (len(block), facts), generator=generator)
            counts = torch.zeros(len(block), facts, dtype=torch.float64)
            counts.scatter_add_(1, drawn, torch.ones_like(counts))
            means.append((counts @ rows.T) / (counts @ sizes.T))
        edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        # a resample of facts without a weight has no mean
        bounds = torch.cat(means).nanquantile(edges, dim=0).T
        bounds[(sizes > 0).sum(1) < 2] = torch.nan
    return bounds if values.ndim == 2 else bounds[0]
