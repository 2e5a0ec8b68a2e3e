"""Bootstrap intervals: those of a loop, of the exact distribution, and with the coverage that they promise."""

from __future__ import annotations

import math
import random

import pytest
import torch

from lit_moeedit.metrics import bootstrap_interval
from lit_moeedit.metrics.bootstrap import RESAMPLES


def binomial(n: int, p: float) -> list[float]:
    """Probabilities of 0 to n successes."""
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def test_it_is_what_a_loop_over_the_same_draws_finds() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randint(0, 4, (2, 30), generator=generator)
    values = (torch.rand(2, 30, generator=generator) * weights).round()
    found = bootstrap_interval(values, weights, resamples=50, seed=7)
    draws = torch.randint(30, (50, 30), generator=torch.Generator().manual_seed(7)).tolist()
    for metric in range(2):
        means = sorted(
            sum(float(values[metric, t]) for t in drawn) / sum(int(weights[metric, t]) for t in drawn)
            for drawn in draws
        )

        def quantile(share: float, means: list[float] = means) -> float:
            place = share * (len(means) - 1)
            low, part = int(place), place % 1
            return means[low] + part * (means[min(low + 1, len(means) - 1)] - means[low])

        # float64 sums of 30 numbers
        assert found[metric].tolist() == pytest.approx([quantile(0.025), quantile(0.975)], rel=1e-12)


def test_blocks_of_draws_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_interval(values)
    monkeypatch.setattr("lit_moeedit.metrics.bootstrap._BLOCK", 40 * 7)
    torch.testing.assert_close(bootstrap_interval(values), whole, rtol=0, atol=0)


@pytest.mark.parametrize("successes", [3, 20, 38])
def test_bounds_are_quantiles_of_the_exact_distribution(successes: int) -> None:
    """Resampled successes are binomial, so the share of resamples beyond a bound is known."""
    n = 40
    low, high = bootstrap_interval(torch.tensor([1.0] * successes + [0.0] * (n - successes))).tolist()
    chances = binomial(n, successes / n)
    # five standard errors of a share of 2.5 % among 2,000 resamples
    slack = 5 * math.sqrt(0.025 * 0.975 / RESAMPLES)
    for beyond, at in (
        (sum(chances[: round(low * n)]), chances[round(low * n)]),
        (sum(chances[round(high * n) + 1 :]), chances[round(high * n)]),
    ):
        assert beyond <= 0.025 + slack and beyond + at >= 0.025 - slack


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(p: float) -> None:
    """The chance of each number of successes times whether its interval covers p: the exact coverage."""
    n = 60
    rows = torch.tensor([[1.0] * k + [0.0] * (n - k) for k in range(n + 1)])
    bounds = bootstrap_interval(rows, resamples=1000)
    covered = (bounds[:, 0] <= p) & (p <= bounds[:, 1])
    coverage = sum(chance for chance, hit in zip(binomial(n, p), covered.tolist(), strict=True) if hit)
    # steps of 1/60 make it swing around 95 %, and the percentile interval is known to be a little short
    assert 0.91 <= coverage <= 0.97


def test_simulated_facts_with_paraphrases_that_fall_together_are_covered() -> None:
    """Four paraphrases per fact that share their fate: taken one by one, the interval would be half as long."""
    draw, hits, hits_alone, trials = random.Random(0), 0, 0, 200
    for seed in range(trials):
        held = torch.tensor([4.0 * (draw.random() < 0.7) for _ in range(60)])
        low, high = bootstrap_interval(held, torch.full_like(held, 4), resamples=400, seed=seed).tolist()
        hits += low <= 0.7 <= high
        low, high = bootstrap_interval((held / 4).repeat(4), resamples=400, seed=seed).tolist()
        hits_alone += low <= 0.7 <= high
    # 95 % of 200 with three standard errors of 3; at half the length a normal variable is covered in 67 %
    assert hits >= 181 and hits_alone <= 155


def test_what_is_not_known_is_nan() -> None:
    values, weights = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 1, 1]]), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    found = bootstrap_interval(values, weights)
    assert found[0].isnan().all() and found[1].tolist() == [0.0, 1.0] and found[2].tolist() == [1.0, 1.0]
    assert bootstrap_interval(torch.zeros(2, 0)).isnan().all() and bootstrap_interval(torch.zeros(0)).shape == (2,)


def test_seeded_and_without_a_trace_in_the_global_state() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first, again, other = (bootstrap_interval(values, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"values": torch.zeros(2, 3), "weights": torch.zeros(2, 4)},
            r"\[M, T\] or \[T\], both the same, got \[2, 3\]",
        ),
        ({"values": torch.zeros(1, 2, 3)}, r"got \[1, 2, 3\]"),
        ({"values": torch.zeros(3), "resamples": 0}, "`resamples` >= 1"),
        ({"values": torch.zeros(3), "level": 1.0}, r"`level` in \(0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)  # type: ignore[arg-type]
