"""Block coordinate descent: never uphill, down to Woodbury's optimum."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_moeedit.solvers import BlockCoordinateDescent, EditProblem, ExpertDeltas, Woodbury


@settings(derandomize=True, max_examples=30)
@given(
    edits=st.integers(1, 15),
    experts=st.integers(1, 5),
    d_hidden=st.integers(1, 8),
    ridge=st.sampled_from([0.01, 1.0, 10.0]),
    share=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_no_pass_raises_the_objective(make_problem, edits, experts, d_hidden, ridge, share, seed) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge, seed=seed, share=share)
    start = float(problem.residuals.double().square().sum())
    objectives = [start]
    for passes in range(1, 5):
        objectives.append(problem.objective(BlockCoordinateDescent(passes=passes, seed=seed).solve(problem)))
    # what is already at its optimum may move by float32 rounding of the whole
    for before, after in pairwise(objectives):
        assert after <= before + 1e-5 * start


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
    dual, primal = (BlockCoordinateDescent(passes=2).solve(problem) for problem in (small, padded))
    assert torch.equal(dual.right[small.edit_index.argsort()], small.features[small.edit_index.argsort()])
    assert torch.equal(primal.right, torch.eye(6))
    torch.testing.assert_close(dual.dense(0), primal.dense(0), rtol=1e-4, atol=1e-5)  # float32


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


def passes_until(problem: EditProblem, tolerance: float, most: int) -> int:
    """The number of passes after which the descent stopped: its deltas are those of just so many."""
    stopped = BlockCoordinateDescent(passes=most, tolerance=tolerance).solve(problem).left
    return next(n for n in range(1, most + 1) if torch.equal(BlockCoordinateDescent(n).solve(problem).left, stopped))


def test_tolerance_stops_early(make_problem) -> None:
    problem = make_problem(20, 4, 3)
    assert passes_until(problem, 0.0, 20) == 20
    assert 1 < passes_until(problem, 1e-3, 20) < 20
    assert passes_until(problem, 1.0, 20) == 1  # no pass can take off more than everything
    assert passes_until(problem, 1e-1, 20) <= passes_until(problem, 1e-3, 20)


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


@settings(derandomize=True, max_examples=40)
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


def test_only_experts_that_need_it_get_rows_of_their_own(make_problem) -> None:
    """Experts with four and five edits share a batch; in one of them two edits all but repeat each other."""
    some = make_problem(25, 1, 40, ridge=1e-3, share=1.0)
    expert = torch.tensor([0] * 4 + [1] * 5 + [2] * 4 + [3] * 5 + [4] * 4 + [5] * 3)
    features = some.features.clone()
    features[12] = 1.001 * features[9]
    problem = EditProblem(torch.arange(25), expert, features, some.residuals, 6, ridge=1e-3)
    deltas = BlockCoordinateDescent(passes=2, seed=1).solve(problem)
    changed = [
        not torch.equal(rows[1], features[pairs])
        for j, pairs in problem.experts()
        if (rows := deltas.rows(j)) is not None
    ]
    assert changed == [False, False, True, False, False, False]
    expected = problem.objective(dense_deltas(published(problem, 2, 1)))
    assert problem.objective(deltas) == pytest.approx(expected, rel=1e-5)


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize(("edits", "d_hidden"), [(40, 400), (400, 40)])  # dual, primal
def test_no_tensor_is_larger_than_the_problem_s(make_problem, edits: int, d_hidden: int) -> None:
    problem = make_problem(edits, 2, d_hidden, share=1.0)
    with Largest() as largest:
        BlockCoordinateDescent().solve(problem)
    assert largest.elements <= problem.features.numel()


def test_tolerance_is_of_the_objective(make_problem) -> None:
    """It stops after the first pass whose fall, taken from objectives evaluated one by one, is below it."""
    problem = make_problem(20, 4, 3, seed=5)
    seen = [float(problem.residuals.square().sum())]
    for passes in range(1, 12):
        seen.append(problem.objective(BlockCoordinateDescent(passes=passes).solve(problem)))
    falls = [(before - after) / before for before, after in pairwise(seen)]
    # halfway between the falls of two passes, so that rounding does not matter
    for number in (2, 5, 8):
        tolerance = (falls[number - 1] * falls[number]) ** 0.5
        expected = next(i for i, fall in enumerate(falls) if fall <= tolerance) + 1
        assert passes_until(problem, tolerance, 12) == expected


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


RELEASED = [
    [
        -0.1585, -0.03373, 0.02412, 0.21089, -0.15469, -0.18839, 0.08884, 0.20783, -0.11755,
        -0.08732, -0.11064, 0.1016, 0.0688, -0.17611, 0.09457, -0.12273, 0.2664, 0.08581,
    ],
    [
        -0.00087, 0.28423, 0.07946, -0.11045, 0.15161, -0.29668, -0.03688, 0.03987, -0.04369,
        0.01674, -0.40845, 0.37051, 0.0381, -0.32448, -0.03535, 0.09356, 0.2608, -0.07742,
    ],
    [
        0.11827, 0.02949, 0.3335, 0.0443, 0.05931, -0.21771, 0.01522, -0.25906, -0.10689,
        -0.00932, 0.05624, -0.16879, -0.13364, 0.23209, -0.22557, -0.0349, -0.1161, 0.38814,
    ],
    [
        0.22204, -0.19589, 0.02544, -0.05913, 0.25247, -0.25041, -0.33057, 0.26646, -0.09536,
        0.10447, -0.05918, -0.10204, 0.11173, -0.07316, 0.07084, -0.04635, -0.19271, 0.35344,
    ],
]  # fmt: skip
"""Applied deltas ``ΔW_j P_j``, row by row, that the code released with MoEEdit gives for :func:`_released_problem`."""


def _released_problem() -> tuple[EditProblem, Tensor]:
    """A problem of 7 edits and 4 experts, and the projectors of the experts."""
    edits, experts, d_hidden = torch.arange(7)[:, None, None], torch.arange(4)[:, None], torch.arange(6)
    keys = torch.sin(1.0 + 3.1 * edits + 5.7 * experts + 0.9 * d_hidden + 0.37 * edits * d_hidden)
    gates = 0.2 + 0.1 * ((2 * edits + experts) % 5)
    gates = torch.where((edits + experts) % 3 == 0, 0.0, gates)[..., 0]
    normals = torch.sin(2.0 + 1.7 * experts + 2.3 * d_hidden)
    normals = normals / normals.norm(dim=1, keepdim=True)
    projectors = torch.eye(6) - normals[:, :, None] * normals[:, None, :]
    edit, expert = gates.nonzero().T
    features = torch.einsum("nij,nj->ni", projectors[expert], gates[edit, expert, None] * keys[edit, expert])
    residuals = torch.cos(1.3 * torch.arange(7)[:, None] + 2.1 * torch.arange(3))
    return EditProblem(edit, expert, features, residuals, 4, ridge=1.0), projectors


def test_the_deltas_are_those_of_the_released_code() -> None:
    problem, projectors = _released_problem()
    deltas = BlockCoordinateDescent(passes=4, seed=42).solve(problem)
    applied = torch.stack([deltas.dense(expert) @ projectors[expert] for expert in range(4)])
    # the numbers have five digits after the point
    torch.testing.assert_close(applied.flatten(1), torch.tensor(RELEASED), rtol=0, atol=1e-5)
