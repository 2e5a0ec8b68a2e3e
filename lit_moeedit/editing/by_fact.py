"""Metrics fact by fact, of which the means and their intervals are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_moeedit.metrics import bootstrap_interval

Interval = tuple[float, float]
"""Lower and upper bound."""


def sums_by_fact(owner: Tensor, facts: int, right: Tensor, counted: Tensor | None = None) -> Tensor:
    """Add up what holds, and what counts, for each fact.

    Args:
        owner: ``[N]`` int64, index of the fact of each prompt.
        facts: number of facts T.
        right: ``[N]``, a value or whether a prompt holds.
        counted: ``[N]`` bool, whether it counts; ``None``: all do.

    Returns:
        ``[2, T]`` float64. The metric is the sum of the first row over that of the second.

    Example:
        >>> sums_by_fact(torch.tensor([0, 0, 2]), 3, torch.tensor([True, False, True])).tolist()
        [[1.0, 0.0, 1.0], [2.0, 0.0, 1.0]]
    """
    counted = torch.ones_like(owner, dtype=torch.bool) if counted is None else counted
    rows = torch.stack([right.double().masked_fill(~counted, 0.0), counted.double()])
    return torch.zeros(2, facts, dtype=torch.float64).index_add_(1, owner, rows)


def success_by_fact(
    counts: Mapping[str, Sequence[int]],
    preferred: Mapping[str, Tensor],
    compared: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    exact_before: Tensor | None,
    groups: Sequence[str],
) -> dict[str, Tensor]:
    """Take apart the metrics of :class:`~lit_moeedit.metrics.EditSuccess` by fact.

    Args:
        counts: by rate (``efficacy``, ``generalization``, ``specificity``), number of prompts of each fact.
        preferred: by rate, ``[N]`` bool, whether the right answer is preferred.
        compared: by rate, ``[N]`` bool, whether there is another answer.
        exact: by rate, ``[N]`` bool, whether the right answer is generated.
        exact_before: the same of the neighbours before the edit; ``None`` if it is not known.
        groups: group of each neighbour.

    Returns:
        By metric, the result of :func:`sums_by_fact`; without ``score`` and ``utility``, which are no means over facts.
    """
    found = {}
    owners = {rate: torch.arange(len(own)).repeat_interleave(torch.tensor(own)) for rate, own in counts.items()}
    for rate, owner in owners.items():
        facts = len(counts[rate])
        found[rate] = sums_by_fact(owner, facts, preferred[rate], compared[rate])
        found[f"{rate}_accuracy"] = sums_by_fact(owner, facts, exact[rate])
    if exact_before is not None:
        owner, facts, held = owners["specificity"], len(counts["specificity"]), exact["specificity"] & exact_before
        found["specificity_retained"] = sums_by_fact(owner, facts, held, exact_before)
        for group in sorted(set(groups)):
            own = exact_before & torch.tensor([name == group for name in groups], dtype=torch.bool)
            found[f"specificity_retained_{group}"] = sums_by_fact(owner, facts, held, own)
    return found


def intervals(by_fact: Mapping[str, Tensor], seed: int = 0) -> dict[str, Interval]:
    """Compute 95 % bootstrap intervals over facts, see :func:`~lit_moeedit.metrics.bootstrap_interval`.

    Args:
        by_fact: by metric, ``[2, T]``, from :func:`sums_by_fact`. The number of facts may differ between metrics.
        seed: seed of the resamples, the same facts for all metrics of as many facts.

    Returns:
        Lower and upper bound by metric, without those that are not known or not finite.
    """
    found: dict[str, Interval] = {}
    for size in sorted({sums.shape[1] for sums in by_fact.values()}):
        names = [name for name, sums in by_fact.items() if sums.shape[1] == size]
        values, weights = torch.stack([by_fact[name] for name in names], dim=1)
        bounds = bootstrap_interval(values, weights, seed=seed).tolist()
        known = {name: (low, high) for name, (low, high) in zip(names, bounds, strict=True)}
        found |= {name: pair for name, pair in known.items() if all(map(math.isfinite, pair))}
    return {name: found[name] for name in by_fact if name in found}
