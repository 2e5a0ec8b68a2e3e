"""Factors in the coordinates of shaped keys: with whole modes they leave the exact solution as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lit_moeedit.editing.layer_weights import layer_weights
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.preservation.shaping import Shaping
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers import EditProblem, Tucker, Woodbury
from tests.editing.recording import preservation

E, D_MODEL, D_HIDDEN, T = 6, 12, 16, 5


@pytest.mark.parametrize("preserve", ["covariance", "output"])
@pytest.mark.parametrize("largest", [1.0, 30.0, 10_000.0])
def test_whole_modes_are_the_exact_solution_whatever_the_spectrum(preserve: str, largest: float) -> None:
    """All experts have the same second moment; its directions hold energies from 1e-6 to ``largest`` squared."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, D_HIDDEN)
    scales[0] = largest
    keys = torch.randn(1000, D_HIDDEN, generator=generator) * scales
    total = (keys.T @ keys).expand(E, D_HIDDEN, D_HIDDEN).clone()
    moments = SecondMoments(total, torch.full((E,), 1000), torch.tensor([1000]), gated=preserve == "output")
    weight = torch.nn.Parameter(0.1 * torch.randn(E, D_MODEL, D_HIDDEN, generator=generator))
    layer = SimpleNamespace(index=0, is_transposed=False, num_experts=E, shape=(E, D_MODEL, D_HIDDEN), down_proj=weight)
    expert = torch.cat([torch.randperm(E, generator=generator)[:2] for _ in range(T)])
    edit = torch.arange(T).repeat_interleave(2)
    seen = torch.randn(2 * T, D_HIDDEN, generator=generator) * scales
    shaping = Shaping.of(moments, torch.arange(E), preservation(preserve), 1e4, symmetric=True)
    features = shaping.features(seen, expert)
    problem = EditProblem(edit, expert, features, torch.randn(T, D_MODEL, generator=generator), E, ridge=1e-3)
    exact = Woodbury().solve(problem)
    whole = Tucker(energy=1.0, carry=False)
    found = whole.at_layer(layer_weights(layer, moments, 1e4, Ranks())).solve(problem)  # type: ignore[arg-type]
    for j in expert.unique().tolist():
        # both solve in float32, of a system whose condition is at most ‖G‖ / λ = 1e4
        torch.testing.assert_close(
            found.dense(j), exact.dense(j), rtol=1e-3, atol=1e-3 * float(exact.dense(j).abs().max())
        )
