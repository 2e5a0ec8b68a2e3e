"""Every expert's own ridge regression, against dense solutions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import PerExpertRidge, Woodbury


@settings(max_examples=40, deadline=None)
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


def test_a_singular_system_without_a_ridge_is_named(make_problem) -> None:
    with pytest.raises(torch.linalg.LinAlgError, match=r"the system of expert 0 at ridge 0 is singular"):
        PerExpertRidge().solve(make_problem(9, 1, 3, ridge=0.0, share=1.0))
