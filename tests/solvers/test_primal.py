"""Woodbury where there are more edits than dimensions, against the dense solution in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import Woodbury


@settings(derandomize=True, max_examples=60)
@given(
    edits=st.integers(20, 60),
    experts=st.integers(1, 4),
    d_hidden=st.integers(1, 5),
    ridge=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_reaches_the_least_objective(make_problem, least, edits, experts, d_hidden, ridge, share, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, share=share, seed=seed)
    assert problem.objective(Woodbury().solve(problem)) == pytest.approx(least(problem), rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_dimensions_that_are_nearly_dependent(make_problem, design, solution, stacked, scale: float) -> None:
    """Of two dimensions that differ by a thousandth, only one is wanted: float32 cannot tell which."""
    problem = make_problem(60, 3, 6, ridge=1e-3)
    features = scale * problem.features
    features[:, 5] = features[:, 0] + 1e-3 * features[:, 5]
    problem = replace(problem, features=features)
    wanted = design(problem) @ torch.eye(18, 5, dtype=torch.float64)
    problem = replace(problem, residuals=wanted.float())
    expected = solution(problem)
    error = stacked(Woodbury().solve(problem)) - expected
    assert float(error.norm()) < 1e-4 * float(expected.norm())  # float32 factors of the deltas


def test_without_a_ridge_it_is_least_squares(make_problem, design) -> None:
    problem = make_problem(60, 3, 6, ridge=0.0)
    matrix = design(problem)
    misfit = problem.residuals.double() - matrix @ (torch.linalg.pinv(matrix) @ problem.residuals.double())
    objective = problem.objective(Woodbury().solve(problem))
    assert objective == pytest.approx(float(misfit.square().sum()), rel=1e-5)


def test_the_smaller_system_is_solved(make_problem, least) -> None:
    """Of two experts with five dimensions each, deltas are dense from eleven edits on."""
    few, many = make_problem(10, 2, 5, share=1.0), make_problem(11, 2, 5, share=1.0)
    assert Woodbury().solve(few).right is few.features
    dense = Woodbury().solve(many)
    assert torch.equal(dense.right, torch.eye(5).repeat(2, 1))
    assert many.objective(dense) == pytest.approx(least(many), rel=1e-5)
    # only experts that are visited count
    assert Woodbury().solve(replace(few, num_experts=100)).right is few.features
    assert torch.equal(Woodbury().solve(replace(many, num_experts=100)).left, dense.left)


def test_singular_without_a_ridge_says_so(make_problem) -> None:
    problem = make_problem(30, 3, 6, ridge=0.0)
    features = problem.features.clone()
    features[:, 5] = features[:, 0]
    with pytest.raises(torch.linalg.LinAlgError, match="the system of 3 experts at ridge 0 is singular"):
        Woodbury().solve(replace(problem, features=features))


def test_bfloat16_is_computed_in_float32(make_problem, stacked) -> None:
    problem = make_problem(60, 3, 6, dtype=torch.bfloat16)
    wide = replace(problem, features=problem.features.float(), residuals=problem.residuals.float())
    deltas, expected = Woodbury().solve(problem), stacked(Woodbury().solve(wide))
    assert deltas.left.dtype == deltas.right.dtype == torch.bfloat16
    # the deltas are rounded once, by at most 2⁻⁹
    assert float((stacked(deltas) - expected).norm()) < 2**-9 * float(expected.norm())
