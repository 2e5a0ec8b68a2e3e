"""The system over the features' dimensions against the dense solution in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import EditProblem, NormalEquations


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    edits=st.integers(1, 40),
    experts=st.integers(1, 5),
    d_hidden=st.integers(1, 8),
    ridge=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_reaches_the_least_objective(make_problem, least, edits, experts, d_hidden, ridge, share, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, share=share, seed=seed)
    assert problem.objective(NormalEquations().solve(problem)) == pytest.approx(least(problem), rel=1e-5)


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
    error = stacked(NormalEquations().solve(problem)) - expected
    assert float(error.norm()) < 1e-4 * float(expected.norm())  # float32 factors of the deltas


def test_without_a_ridge_it_is_least_squares(make_problem, design) -> None:
    problem = make_problem(60, 3, 6, ridge=0.0)
    matrix = design(problem)
    misfit = problem.residuals.double() - matrix @ (torch.linalg.pinv(matrix) @ problem.residuals.double())
    objective = problem.objective(NormalEquations().solve(problem))
    assert objective == pytest.approx(float(misfit.square().sum()), rel=1e-5)


def test_singular_without_a_ridge_says_so(make_problem) -> None:
    with pytest.raises(torch.linalg.LinAlgError, match="the system of 3 experts at ridge 0 is singular"):
        NormalEquations().solve(make_problem(5, 3, 6, ridge=0.0))


def test_nothing_to_do() -> None:
    empty = torch.empty(0, dtype=torch.long)
    for residuals in (torch.empty(0, 3), torch.ones(2, 3)):
        deltas = NormalEquations().solve(EditProblem(empty, empty, torch.empty(0, 4), residuals, 2))
        assert deltas.experts == []
        assert deltas.shape == (3, 4)
