"""Every expert's own ridge regression, against dense solutions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import EditProblem, PerExpertRidge, Woodbury


@settings(max_examples=40)
@given(
    edits=st.integers(0, 9),
    d_hidden=st.integers(1, 12),
    ridge=st.floats(1e-2, 10.0),
    seed=st.integers(0, 1000),
)
def test_each_expert_minimises_its_own_objective(
    make_problem, edits: int, d_hidden: int, ridge: float, seed: int
) -> None:
    problem = make_problem(edits, 4, d_hidden, ridge=ridge, seed=seed)
    deltas = PerExpertRidge().solve(problem)
    features, residuals = problem.features.double(), problem.residuals.double()
    for expert in range(4):
        pairs = (problem.expert_index == expert).nonzero().squeeze(-1).tolist()
        rows, wanted = features[pairs], torch.zeros(len(pairs), 5, dtype=torch.float64)
        for i, pair in enumerate(pairs):
            own = problem.edit_index == problem.edit_index[pair]
            wanted[i] = residuals[problem.edit_index[pair]] * features[pair].norm() / features[own].norm(dim=-1).sum()
        system = rows.T @ rows + ridge * torch.eye(d_hidden, dtype=torch.float64)
        expected = torch.linalg.solve(system, rows.T @ wanted).T
        # a float32 solve of systems with condition numbers up to 1e4
        torch.testing.assert_close(deltas.dense(expert).double(), expected, rtol=1e-3, atol=1e-4)


def test_without_a_ridge_the_shares_add_up_to_the_residual(make_problem) -> None:
    problem = make_problem(3, 4, 12, ridge=0.0, share=0.9)
    # more dimensions than edits: every expert reaches its share
    torch.testing.assert_close(
        problem.prediction(PerExpertRidge().solve(problem)), problem.residuals, rtol=1e-3, atol=1e-4
    )


def test_the_joint_solution_is_never_worse(make_problem) -> None:
    for seed in range(5):
        problem = make_problem(20, 6, 8, ridge=0.5, seed=seed)
        alone, joint = (problem.objective(solver.solve(problem)) for solver in (PerExpertRidge(), Woodbury()))
        assert joint < 0.95 * alone


def test_a_singular_system_without_a_ridge_is_named() -> None:
    index = torch.arange(3)
    problem = EditProblem(index, torch.ones_like(index), torch.ones(3, 4), torch.ones(3, 2), 2, ridge=0.0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"the system of expert 1 at ridge 0 is singular"):
        PerExpertRidge().solve(problem)


def test_more_edits_than_dimensions_are_least_squares_without_a_ridge(make_problem) -> None:
    problem = make_problem(9, 1, 3, ridge=0.0, share=1.0)
    expected = torch.linalg.lstsq(problem.features, problem.residuals[problem.edit_index]).solution.T
    # float32 solves of a system with a condition number of about 10
    torch.testing.assert_close(PerExpertRidge().solve(problem).dense(0), expected, rtol=1e-4, atol=1e-5)
