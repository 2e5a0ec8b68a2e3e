"""Auto picks by size, and is exact whatever it picks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import Auto, EditProblem, ExpertDeltas, auto


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the solvers that Auto called."""
    names: list[str] = []

    def record(name: str, method: str) -> None:
        call = getattr(getattr(auto, name), method)

        def recording(*arguments) -> ExpertDeltas:
            names.append(name)
            return call(*arguments)

        monkeypatch.setattr(getattr(auto, name), method, recording)

    record("Woodbury", "solve")
    record("NormalEquations", "solve")
    record("ConjugateGradients", "solve_with")
    return names


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    edits=st.integers(0, 60),
    experts=st.integers(1, 6),
    d_hidden=st.integers(1, 12),
    ridge=st.sampled_from([1e-3, 1.0]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_reaches_the_least_objective(make_problem, least, edits, experts, d_hidden, ridge, share, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, share=share, seed=seed)
    assert problem.objective(Auto().solve(problem)) == pytest.approx(least(problem), rel=1e-5)


@pytest.mark.parametrize(
    ("edits", "experts", "d_hidden", "d_model", "share", "expected"),
    [
        (50, 16, 128, 256, 0.2, "Woodbury"),
        (1500, 2, 16, 64, 0.7, "NormalEquations"),
        (2000, 1000, 4, 64, 1 / 1000, "ConjugateGradients"),  # next to diagonal: each pair of edits rarely meets
    ],
)
def test_picks_by_size(make_problem, least, picked, edits, experts, d_hidden, d_model, share, expected: str) -> None:
    problem = make_problem(edits, experts, d_hidden, d_model, share=share)
    deltas = Auto().solve(problem)
    assert picked == [expected]
    assert problem.objective(deltas) == pytest.approx(least(problem), rel=1e-5)


@pytest.mark.parametrize(("edits", "experts", "d_hidden"), [(60, 3, 6), (10, 2, 3)])
def test_without_a_ridge_more_edits_than_dimensions_are_least_squares(
    make_problem, design, picked, edits: int, experts: int, d_hidden: int
) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=0.0)
    matrix = design(problem)
    misfit = problem.residuals.double() - matrix @ (torch.linalg.pinv(matrix) @ problem.residuals.double())
    assert problem.objective(Auto().solve(problem)) == pytest.approx(float(misfit.square().sum()), rel=1e-5)
    assert picked == ["NormalEquations"]


def test_few_edits_are_solved_at_once(make_problem, least, picked, monkeypatch) -> None:
    monkeypatch.setattr(auto.Costs, "of", None)
    problem = make_problem(auto.FEW, 3, 2)
    assert problem.objective(Auto().solve(problem)) == pytest.approx(least(problem), rel=1e-5)
    assert picked == ["Woodbury"]


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_rounding_is_no_overestimate(make_problem, design, scale: float) -> None:
    """Woodbury takes the largest sum of a row of G, and would need float64 wherever this number says so."""
    problem = make_problem(40, 5, 6, ridge=0.1)
    problem = replace(problem, features=scale * (problem.features + 0.5))
    matrix = design(problem)
    largest = float(torch.linalg.eigvalsh(matrix @ matrix.T).max()) * torch.finfo(torch.float32).eps / 0.1
    assert 0.5 * largest < auto._rounding(problem) < largest  # these features have most of their weight in common


def test_without_a_ridge_and_without_dimensions_to_spare(make_problem, least) -> None:
    problem: EditProblem = make_problem(20, 4, 30, ridge=0.0, share=1.0)
    left = problem.residuals.double() - problem.prediction(Auto().solve(problem)).double()
    assert float(left.norm()) < 1e-5 * float(torch.linalg.norm(problem.residuals))  # it interpolates, in float32
