"""Block coordinate descent: never uphill, down to Woodbury's optimum."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import BlockCoordinateDescent, EditProblem, ExpertDeltas, Woodbury
from lit_moeedit.solvers.bcd import _blocks, _collect


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
    blocks = _blocks(problem)
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
    [dual], [primal] = _blocks(small), _blocks(padded)
    assert dual.dual
    assert not primal.dual
    falls = torch.zeros(2, dtype=torch.float64)
    dual.update(small.residuals.clone(), falls[0])
    primal.update(padded.residuals.clone(), falls[1])
    expected = small.residuals.double().square().sum() - small.objective(_collect(small, [dual]))
    torch.testing.assert_close(falls, expected.expand(2), rtol=1e-5, atol=0)  # float32
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


def published(problem: EditProblem, passes: int, seed: int) -> torch.Tensor:
    """Deltas ``[E, d_model, d_hidden]`` of the printed equations in float64: each block sums over all others again."""
    features = torch.zeros(problem.num_experts, problem.num_edits, problem.features.shape[1], dtype=torch.float64)
    features[problem.expert_index, problem.edit_index] = problem.features.double()
    deltas = torch.zeros(problem.num_experts, problem.residuals.shape[1], features.shape[2], dtype=torch.float64)
    generator, visited = torch.Generator().manual_seed(seed), torch.unique(problem.expert_index)
    for _ in range(passes):
        for j in visited[torch.randperm(len(visited), generator=generator)]:
            missing = problem.residuals.double()
            for other in range(problem.num_experts):
                if other != j:
                    missing = missing - features[other] @ deltas[other].T
            system = features[j].T @ features[j] + problem.ridge * torch.eye(features.shape[2], dtype=torch.float64)
            deltas[j] = torch.linalg.solve(system, features[j].T @ missing).T
    return deltas


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    edits=st.integers(1, 40),
    experts=st.integers(1, 6),
    d_hidden=st.integers(1, 12),
    ridge=st.sampled_from([1e-3, 0.1, 1.0]),
    passes=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_equals_the_published_form(make_problem, edits, experts, d_hidden, ridge, passes, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, seed=seed)
    expected = dense_deltas(published(problem, passes, seed))
    deltas = BlockCoordinateDescent(passes=passes, seed=seed).solve(problem)
    # rounding the residuals alone does this much to an objective that falls to next to nothing
    noise = 1e-12 * float(problem.residuals.double().square().sum())
    assert problem.objective(deltas) == pytest.approx(problem.objective(expected), rel=1e-5, abs=noise)


def dense_deltas(dense: torch.Tensor) -> ExpertDeltas:
    """Deltas ``[E, d_model, d_hidden]`` as rows of identities."""
    experts, _, d_hidden = dense.shape
    return ExpertDeltas(
        torch.arange(experts).repeat_interleave(d_hidden),
        torch.arange(experts * d_hidden),
        dense.mT.flatten(0, 1),
        torch.eye(d_hidden).to(dense).repeat(experts, 1),
        experts,
    )


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize(("edits", "d_hidden"), [(6, 40), (40, 6)])
def test_features_that_are_nearly_dependent(make_problem, edits: int, d_hidden: int, scale: float) -> None:
    """Each edit visits one expert; its last features all but repeat its first: large rows would cancel in float32."""
    some = make_problem(edits, 1, d_hidden, ridge=1e-3, share=1.0)
    expert = torch.arange(edits) % 2
    features = scale * some.features
    features[-2:] = 1.001 * features[:2]
    problem = EditProblem(torch.arange(edits), expert, features, some.residuals, 2, ridge=1e-3)
    deltas = BlockCoordinateDescent(passes=3, seed=1).solve(problem)
    expected = problem.objective(dense_deltas(published(problem, 3, 1)))
    assert problem.objective(deltas) == pytest.approx(expected, rel=1e-5)


def test_only_experts_that_need_it_are_solved_in_float64(make_problem) -> None:
    """Experts with four and five edits share a batch; in one of them two edits all but repeat each other."""
    some = make_problem(25, 1, 40, ridge=1e-3, share=1.0)
    expert = torch.tensor([0] * 4 + [1] * 5 + [2] * 4 + [3] * 5 + [4] * 4 + [5] * 3)
    features = 30 * some.features
    features[12] = 1.001 * features[9]
    problem = EditProblem(torch.arange(25), expert, features, some.residuals, 6, ridge=1e-3)
    assert [block.inverse.dtype == torch.float64 for block in _blocks(problem)] == [False, False, True] + 3 * [False]
    deltas = BlockCoordinateDescent(passes=2, seed=1).solve(problem)
    expected = problem.objective(dense_deltas(published(problem, 2, 1)))
    assert problem.objective(deltas) == pytest.approx(expected, rel=1e-5)


def test_inverses_have_no_more_numbers_than_features(make_problem) -> None:
    problem = make_problem(20, 6, 9, seed=4, share=0.45)
    blocks = _blocks(problem)
    assert {block.dual for block in blocks} == {True, False}
    kept = {block.inverse.data_ptr(): block.inverse.untyped_storage() for block in blocks}
    kept = {storage.data_ptr(): storage for storage in kept.values()}  # of the batches that they were computed in
    assert sum(storage.nbytes() for storage in kept.values()) <= problem.features.nbytes


@pytest.mark.parametrize("edits", [6, 30])  # dual, primal
def test_a_start_saves_passes(make_problem, edits: int) -> None:
    problem = make_problem(edits, 4, 10)
    half = BlockCoordinateDescent(passes=3, seed=1).solve(problem)
    through = BlockCoordinateDescent(passes=2, seed=2).solve(problem, half)
    begun = problem.objective(half)
    assert problem.objective(through) < begun
    assert problem.objective(through) < problem.objective(BlockCoordinateDescent(passes=2, seed=2).solve(problem))
    # from the optimum there is nowhere to go
    best = Woodbury().solve(problem)
    seen = [problem.objective(best)]
    BlockCoordinateDescent(passes=2, on_block=seen.append).solve(problem, best)
    assert seen == pytest.approx([seen[0]] * len(seen), rel=1e-5)


def test_a_start_equals_the_published_form_from_there(make_problem, stacked) -> None:
    """One pass over two experts, written out."""
    problem, other = make_problem(9, 2, 4, seed=1, share=0.8), make_problem(5, 2, 4, seed=2)
    start = Woodbury().solve(other)
    order = torch.randperm(2, generator=torch.Generator().manual_seed(7)).tolist()
    deltas, features = stacked(start), torch.zeros(2, 9, 4, dtype=torch.float64)
    features[problem.expert_index, problem.edit_index] = problem.features.double()
    seen: list[float] = []
    for j in order:
        missing = problem.residuals.double() - features[1 - j] @ deltas[1 - j].T
        system = features[j].T @ features[j] + torch.eye(4, dtype=torch.float64)
        deltas[j] = torch.linalg.solve(system, features[j].T @ missing).T
        seen.append(problem.objective(dense_deltas(deltas)))
    objectives: list[float] = []
    got = BlockCoordinateDescent(passes=1, seed=7, on_block=objectives.append).solve(problem, start)
    torch.testing.assert_close(stacked(got), deltas, rtol=1e-4, atol=1e-5)  # float32
    assert objectives == pytest.approx(seen, rel=1e-5)


def test_a_start_drops_experts_that_nobody_visits(make_problem) -> None:
    problem = make_problem(6, 3, 4)
    away = problem.expert_index != 1
    fewer = EditProblem(problem.edit_index[away], problem.expert_index[away], problem.features[away],
                        problem.residuals, 3)  # fmt: skip
    deltas = BlockCoordinateDescent().solve(fewer, Woodbury().solve(problem))
    assert deltas.experts == [0, 2]


def test_a_start_of_another_shape_is_refused(make_problem) -> None:
    start = Woodbury().solve(make_problem(4, 3, 5))
    with pytest.raises(ValueError, match=r"start must have 3 experts of shape \(5, 4\), got 3 of \(5, 5\)"):
        BlockCoordinateDescent().solve(make_problem(4, 3, 4), start)


@pytest.mark.parametrize("begun", [False, True])
def test_tolerance_is_of_the_objective(make_problem, begun: bool) -> None:
    """It stops after the first pass whose fall, taken from objectives evaluated one by one, is below it."""
    problem = make_problem(20, 4, 3, seed=5)
    start = BlockCoordinateDescent(passes=1, seed=9).solve(problem) if begun else None
    seen = [problem.objective(start) if start is not None else float(problem.residuals.square().sum())]
    for passes in range(1, 30):
        seen.append(problem.objective(BlockCoordinateDescent(passes=passes).solve(problem, start)))
    falls = [(before - after) / before for before, after in pairwise(seen)]
    # halfway between the falls of two passes, so that rounding does not matter
    for number in (2, 5, 8):
        tolerance = (falls[number - 1] * falls[number]) ** 0.5
        expected = next(i for i, fall in enumerate(falls) if fall <= tolerance) + 1
        blocks: list[float] = []
        BlockCoordinateDescent(passes=30, tolerance=tolerance, on_block=blocks.append).solve(problem, start)
        assert len(blocks) == expected * len(problem.experts())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(make_problem, dtype: torch.dtype) -> None:
    deltas = BlockCoordinateDescent().solve(make_problem(6, 2, 3, dtype=dtype))
    assert deltas.left.dtype == deltas.right.dtype == dtype
    assert deltas.is_finite()


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
