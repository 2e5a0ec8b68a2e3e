"""Conjugate gradients: the operator, the gap that stops them, and when they hand over to Woodbury."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import ConjugateGradients, EditProblem, ExpertDeltas, Woodbury, conjugate
from lit_moeedit.solvers.conjugate import Operator, gap, iterate


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[EditProblem]:
    """Problems that Woodbury had to solve."""
    problems: list[EditProblem] = []

    class Recording(Woodbury):
        def solve(self, problem: EditProblem) -> ExpertDeltas:
            problems.append(problem)
            return super().solve(problem)

    monkeypatch.setattr(conjugate, "Woodbury", Recording)
    return problems


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    edits=st.integers(1, 40),
    experts=st.integers(1, 6),
    d_hidden=st.integers(1, 12),
    ridge=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_reaches_the_least_objective(make_problem, least, edits, experts, d_hidden, ridge, share, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, share=share, seed=seed)
    assert problem.objective(ConjugateGradients().solve(problem)) == pytest.approx(least(problem), rel=1e-5)


@pytest.mark.parametrize(("edits", "d_hidden"), [(30, 4), (6, 9)])  # through features, through kernels
def test_operator_equals_the_dense_system(make_problem, design, edits: int, d_hidden: int) -> None:
    problem = make_problem(edits, 5, d_hidden, ridge=0.3, dtype=torch.float64)
    matrix = design(problem)
    system = matrix @ matrix.T + 0.3 * torch.eye(edits, dtype=torch.float64)
    operator = Operator(problem)
    assert {direct for _, _, direct in operator.blocks} == {edits > d_hidden}
    torch.testing.assert_close(operator @ problem.residuals, system @ problem.residuals)
    torch.testing.assert_close(operator.diagonal, system.diagonal())


def test_the_gap_is_what_it_says(make_problem, least) -> None:
    """``‖R − (G + λI)A‖²`` is the objective minus the dual one, so never less than what can still be gained."""
    problem = make_problem(30, 4, 8, d_model=40, dtype=torch.float64)
    for most in (1, 2, 3, 4):
        left, used = iterate(Operator(problem), problem.residuals, 1e-30, most)
        assert used is None
        deltas = ExpertDeltas(problem.expert_index, problem.edit_index, left, problem.features, 4)
        missing = problem.residuals - Operator(problem) @ left
        dual = float((problem.residuals * left).sum() + (missing * left).sum())
        squared = float(missing.square().sum())
        assert squared == pytest.approx(problem.objective(deltas) - dual, rel=1e-6)
        assert problem.objective(deltas) - least(problem) <= squared
        # estimated from 16 random combinations of 40 columns
        assert gap(problem, left) == pytest.approx(squared / float((problem.residuals * left).sum()), rel=0.6)


def test_stops_when_the_tolerance_is_reached(make_problem, least, handed_over) -> None:
    problem = make_problem(200, 6, 40, d_model=20)
    excess = []
    for tolerance in (1e-1, 1e-3, 1e-6):
        excess.append(problem.objective(ConjugateGradients(tolerance).solve(problem)) / least(problem) - 1)
        assert excess[-1] <= tolerance
    assert excess == sorted(excess, reverse=True)
    assert excess[0] > 1e-6
    assert not handed_over


def test_too_few_iterations_are_not_passed_off_as_a_solution(make_problem, least, handed_over) -> None:
    problem = make_problem(60, 4, 20, ridge=1e-3)
    deltas = ConjugateGradients(iterations=3).solve(problem)
    assert handed_over == [problem]
    assert problem.objective(deltas) == pytest.approx(least(problem), rel=1e-5)


def test_what_float32_does_not_hold_is_noticed(make_problem, least, handed_over) -> None:
    """The running residual of the iteration may fall for ever while the true one does not."""
    problem = make_problem(200, 1, 32, ridge=1e-3, share=1.0)
    assert iterate(Operator(problem), problem.residuals, 5e-6, 100)[1] is not None
    deltas = ConjugateGradients().solve(problem)
    assert handed_over == [problem]
    assert problem.objective(deltas) == pytest.approx(least(problem), rel=1e-5)


def test_without_a_ridge_woodbury_solves(make_problem, handed_over) -> None:
    problem = make_problem(6, 3, 12, ridge=0.0, share=0.8)
    ConjugateGradients().solve(problem)
    assert handed_over == [problem]


def test_no_residual_asks_for_nothing(make_problem) -> None:
    problem = make_problem(6, 3, 4)
    deltas = ConjugateGradients().solve(replace(problem, residuals=torch.zeros_like(problem.residuals)))
    assert not deltas.left.any()


def test_nothing_to_do() -> None:
    empty = torch.empty(0, dtype=torch.long)
    for residuals in (torch.empty(0, 3), torch.ones(2, 3)):
        deltas = ConjugateGradients().solve(EditProblem(empty, empty, torch.empty(0, 4), residuals, 2))
        assert deltas.experts == []
        assert deltas.shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be positive, got 0.0"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConjugateGradients(**arguments)
