"""Block coordinate descent: never uphill, down to Woodbury's optimum."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import BlockCoordinateDescent, EditProblem, Woodbury
from lit_moeedit.solvers.bcd import _Block, _collect


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    edits=st.integers(1, 15),
    experts=st.integers(1, 5),
    d_hidden=st.integers(1, 8),
    ridge=st.sampled_from([0.01, 1.0, 10.0]),
    share=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_no_block_raises_the_objective(make_problem, edits, experts, d_hidden, ridge, share, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, seed=seed, share=share)
    start = float(problem.residuals.double().square().sum())
    objectives = [start]
    final = BlockCoordinateDescent(passes=3, seed=seed, on_block=objectives.append).solve(problem)
    assert len(objectives) == 1 + 3 * len(problem.experts())
    # a block that is already at its optimum may move by float32 rounding of the whole
    for before, after in pairwise(objectives):
        assert after <= before + 1e-5 * start
    assert objectives[-1] == pytest.approx(problem.objective(final), abs=1e-6 * start)


@pytest.mark.parametrize(("edits", "d_hidden"), [(6, 10), (30, 5)])  # dual, primal
def test_converges_to_the_optimum(make_problem, stacked, edits: int, d_hidden: int) -> None:
    problem = make_problem(edits, 4, d_hidden, ridge=1.0)
    best = Woodbury().solve(problem)
    objectives = [problem.objective(BlockCoordinateDescent(passes=passes).solve(problem)) for passes in (1, 4, 16, 64)]
    optimum = problem.objective(best)
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] > 1.001 * optimum  # one pass is not enough, so there was something to converge
    assert objectives[-1] == pytest.approx(optimum, rel=1e-5)  # float32
    last = BlockCoordinateDescent(passes=200).solve(problem)
    torch.testing.assert_close(stacked(last), stacked(best), rtol=1e-3, atol=1e-4)  # linear rate, float32


def test_one_expert_is_solved_in_one_block(make_problem, solution, stacked) -> None:
    for edits in (4, 20):
        problem = make_problem(edits, 1, 8, share=1.0)
        deltas = BlockCoordinateDescent(passes=1).solve(problem)
        torch.testing.assert_close(stacked(deltas), solution(problem), rtol=1e-4, atol=1e-5)  # float32 solve


def test_running_residual_is_what_is_left(make_problem) -> None:
    problem = make_problem(12, 3, 6, seed=2)  # experts with fewer and with more edits than dimensions
    blocks = [_Block(problem, expert, pairs) for expert, pairs in problem.experts()]
    assert {block.dual for block in blocks} == {True, False}
    running = problem.residuals.clone()
    for turn in (0, 1, 2, 1, 0, 0, 2):
        blocks[turn].update(running)
        left = problem.residuals - problem.prediction(_collect(problem, blocks))
        torch.testing.assert_close(running, left, rtol=1e-4, atol=1e-5)  # float32 sums taken in another order


def test_primal_and_dual_agree(make_problem) -> None:
    """The same block, once with as many edits as dimensions (dual) and once with one more, which asks for nothing."""
    small = make_problem(6, 1, 6, share=1.0)
    padded = EditProblem(
        torch.cat([small.edit_index, torch.tensor([6])]),
        torch.zeros(7, dtype=torch.long),
        torch.cat([small.features, torch.zeros(1, 6)]),
        torch.cat([small.residuals, torch.zeros(1, 5)]),
        1,
    )
    dual, primal = (_Block(problem, *problem.experts()[0]) for problem in (small, padded))
    assert dual.dual
    assert not primal.dual
    dual.update(small.residuals.clone())
    primal.update(padded.residuals.clone())
    torch.testing.assert_close(dual.left.T @ dual.right, primal.left.T @ primal.right, rtol=1e-4, atol=1e-5)  # float32


def test_the_seed_decides(make_problem) -> None:
    problem = make_problem(20, 5, 4)
    one, again, other = (BlockCoordinateDescent(passes=1, seed=seed).solve(problem) for seed in (3, 3, 4))
    assert torch.equal(one.left, again.left)
    assert not torch.equal(one.left, other.left)


def test_random_state_is_not_used(make_problem) -> None:
    problem = make_problem(8, 3, 4)
    before = torch.get_rng_state()
    BlockCoordinateDescent().solve(problem)
    assert torch.equal(torch.get_rng_state(), before)


def test_tolerance_stops_early(make_problem) -> None:
    problem = make_problem(20, 4, 3)
    per_pass = len(problem.experts())

    def passes(tolerance: float) -> int:
        seen: list[float] = []
        BlockCoordinateDescent(passes=50, tolerance=tolerance, on_block=seen.append).solve(problem)
        return len(seen) // per_pass

    assert passes(0.0) == 50
    assert 1 < passes(1e-3) < 50
    assert passes(1.0) == 1  # no pass can take off more than everything
    assert passes(1e-1) <= passes(1e-3)


def test_nothing_to_do() -> None:
    empty = torch.empty(0, dtype=torch.long)
    for residuals in (torch.empty(0, 3), torch.ones(2, 3)):
        deltas = BlockCoordinateDescent().solve(EditProblem(empty, empty, torch.empty(0, 4), residuals, 2))
        assert deltas.experts == []
        assert deltas.shape == (3, 4)


def test_singular_block_is_named() -> None:
    features = torch.ones(3, 4)
    problem = EditProblem(torch.arange(3), torch.full((3,), 1), features, torch.ones(3, 2), 2, ridge=0.0)
    with pytest.raises(torch.linalg.LinAlgError, match=r"the system of expert 1 at ridge 0 is singular"):
        BlockCoordinateDescent().solve(problem)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance must be at least 0, got -1.0"),
    ],
)
def test_wrong_settings_are_refused(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockCoordinateDescent(**arguments)
