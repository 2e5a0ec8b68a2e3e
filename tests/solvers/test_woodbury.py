"""Woodbury against the dense solution of the stacked ridge regression in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import EditProblem, Woodbury
from lit_moeedit.solvers.woodbury import gram

TOLERANCE = 1e-4  # what float32 keeps of its 7 digits in a system whose condition number is up to about 1e3


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.norm())


@settings(derandomize=True, max_examples=80)
@given(
    edits=st.integers(1, 12),
    experts=st.integers(1, 5),
    d_hidden=st.integers(1, 8),
    d_model=st.integers(1, 6),
    ridge=st.sampled_from([0.1, 1.0, 10.0]),
    share=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_equals_the_dense_solution(
    make_problem, design, solution, stacked, edits, experts, d_hidden, d_model, ridge, share, seed
) -> None:
    problem = make_problem(edits, experts, d_hidden, d_model, ridge, seed, share)
    got, expected = stacked(Woodbury().solve(problem)), solution(problem)
    # relative to what residuals of this size can ask for: a drawn residual may happen to lie outside all features,
    # and then the solution itself is next to nothing
    features = float(design(problem).norm())
    scale = float(problem.residuals.norm()) / features if features else 1.0
    assert float((got - expected).norm()) <= TOLERANCE * max(scale, float(expected.norm()))


@pytest.mark.parametrize(
    ("edits", "experts", "d_hidden", "ridge"),
    [
        (1, 3, 4, 1.0),  # one edit
        (5, 3, 16, 1e-3),  # fewer edits than dimensions
        (40, 4, 3, 0.1),  # more edits than all experts together have dimensions
        (60, 8, 24, 1e-2),
    ],
)
def test_relative_error(make_problem, solution, stacked, edits, experts, d_hidden, ridge) -> None:
    problem = make_problem(edits, experts, d_hidden, ridge=ridge)
    assert error(stacked(Woodbury().solve(problem)), solution(problem)) < TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize(("edits", "experts", "d_hidden"), [(200, 1, 32), (200, 4, 8), (150, 3, 60)])
@pytest.mark.parametrize("ridge", [1.0, 1e-3, 1e-5])
def test_objective_however_badly_conditioned(make_problem, least, scale, edits, experts, d_hidden, ridge) -> None:
    """Edits above the rank of the features, and a ridge far below what float32 keeps of their Gram matrix."""
    problem = make_problem(edits, experts, d_hidden, ridge=ridge)
    problem = replace(problem, features=scale * problem.features)
    assert problem.objective(Woodbury().solve(problem)) == pytest.approx(least(problem), rel=1e-5)


def test_rows_are_shared_unless_they_would_cancel(make_problem) -> None:
    problem = make_problem(40, 2, 32, ridge=1e-3, share=1.0)
    shared = Woodbury().solve(problem)
    assert shared.left.shape == (40, 5)
    assert shared.right is problem.features
    twins = problem.features.clone()
    for _, pairs in problem.experts():
        pairs = pairs[problem.edit_index[pairs].argsort()]
        twins[pairs[1::2]] = twins[pairs[::2]] + 1e-3 * twins[pairs[1::2]]
    own = Woodbury().solve(replace(problem, features=1000 * twins))
    assert own.left.shape == (64, 5)


def test_narrow_experts_keep_an_orthonormal_basis(make_problem, solution, stacked) -> None:
    """The three edits of each expert all but agree on their features, and ask for different things."""
    some = make_problem(30, 1, 20, share=1.0)
    expert = torch.arange(10).repeat_interleave(3)
    features = 1000 * (some.features[expert] + 1e-3 * some.features)
    problem = EditProblem(torch.arange(30), expert, features, some.residuals, 10, ridge=1e-1)
    deltas = Woodbury().solve(problem)
    assert deltas.right is not problem.features
    for expert in deltas.experts:
        rows = deltas.rows(expert)
        assert rows is not None
        identity = torch.eye(len(rows[1]))
        torch.testing.assert_close(rows[1] @ rows[1].T, identity, rtol=0, atol=1e-5)  # rounded to float32
    assert error(stacked(deltas), solution(problem)) < TOLERANCE


def test_is_the_minimum(make_problem) -> None:
    problem = make_problem(9, 3, 5, ridge=0.5)
    best = Woodbury().solve(problem)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nudge = 0.05 * torch.randn(best.left.shape, generator=generator)
        assert problem.objective(replace(best, left=best.left + nudge)) > problem.objective(best)


def test_no_edit() -> None:
    empty = torch.empty(0, dtype=torch.long)
    deltas = Woodbury().solve(EditProblem(empty, empty, torch.empty(0, 4), torch.empty(0, 3), 2))
    assert deltas.experts == []
    assert torch.equal(deltas.dense(1), torch.zeros(3, 4))


def test_an_edit_without_a_pair_changes_nothing(make_problem, stacked) -> None:
    problem = make_problem(6, 3, 4)
    away = problem.edit_index != 2
    lonely = EditProblem(problem.edit_index[away], problem.expert_index[away], problem.features[away],
                         problem.residuals, 3)  # fmt: skip
    assert not gram(lonely)[2].any()
    louder = replace(lonely, residuals=lonely.residuals.index_fill(0, torch.tensor([2]), 1e3))
    deltas = Woodbury().solve(louder)
    assert torch.equal(stacked(deltas), stacked(Woodbury().solve(lonely)))
    assert not louder.prediction(deltas)[2].any()


def test_gram_counts_only_experts_that_both_edits_visit(make_problem, design) -> None:
    problem = make_problem(8, 4, 3)
    matrix = design(problem)
    torch.testing.assert_close(gram(problem).double(), matrix @ matrix.T, rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("share", [0.005, 0.05])
def test_gram_of_many_experts(make_problem, design, share: float) -> None:
    problem = make_problem(60, 512, 4, share=share)
    matrix = design(problem)
    torch.testing.assert_close(gram(problem).double(), matrix @ matrix.T, rtol=1e-5, atol=1e-5)  # float32 sums
    torch.testing.assert_close(gram(problem, torch.float64), matrix @ matrix.T)


def test_no_ridge_interpolates_with_the_least_norm(make_problem, solution, stacked) -> None:
    problem = make_problem(6, 3, 12, ridge=0.0, share=0.8)
    deltas = Woodbury().solve(problem)
    assert error(stacked(deltas), solution(problem)) < TOLERANCE
    assert error(problem.prediction(deltas), problem.residuals) < TOLERANCE


def singular(
    ridge: float, scale: float = 1.0, gap: float = 0.0, seed: int = 3, dtype: torch.dtype = torch.float32
) -> EditProblem:
    """Five edits of one expert; the last has the features of the first, up to ``gap``, and asks for the same."""
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    features[4] = features[0] + gap * torch.randn(8, generator=generator, dtype=torch.float64)
    wanted = features @ torch.randn(8, 3, generator=generator, dtype=torch.float64)
    return EditProblem(
        torch.arange(5), torch.zeros(5, dtype=torch.long), features.to(dtype), wanted.to(dtype), 1, ridge
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_singular_without_a_ridge_says_so(dtype: torch.dtype, scale: float) -> None:
    message = r"the system of 5 edits at ridge 0 is singular \(pivot 5 of 5\).*use a larger ridge"
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        Woodbury().solve(singular(0.0, scale, dtype=dtype))


def test_edits_without_any_pair_are_singular_without_a_ridge() -> None:
    empty = torch.empty(0, dtype=torch.long)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        Woodbury().solve(EditProblem(empty, empty, torch.empty(0, 4), torch.ones(2, 3), 2, ridge=0.0))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ridge", [1e-4, 1e-3, 1e-1])
def test_equal_edits_need_only_some_ridge(solution, stacked, seed: int, ridge: float) -> None:
    """In float32 the Gram matrix of features this long is not even positive definite: its ridge is below the noise."""
    problem = singular(ridge, scale=100.0, seed=seed)
    assert error(stacked(Woodbury().solve(problem)), solution(problem)) < TOLERANCE


@pytest.mark.parametrize(("scale", "gap", "ridge"), [(100.0, 0.1, 1e-3), (30.0, 0.1, 1e-3), (30.0, 0.1, 1e-2)])
def test_what_float32_cannot_hold_is_solved_in_float64(solution, stacked, scale, gap, ridge) -> None:
    problem = singular(ridge, scale, gap)
    rounded = gram(problem)
    rounded.diagonal().add_(ridge)
    left = torch.linalg.solve(rounded.double(), problem.residuals.double())
    deltas, expected = Woodbury().solve(problem), solution(problem)
    # solving the rounded matrix is not enough, however precisely
    assert error(stacked(replace(deltas, left=left.float())), expected) > 10 * TOLERANCE
    assert error(stacked(deltas), expected) < TOLERANCE


@settings(derandomize=True, max_examples=25)
@given(seed=st.integers(0, 1000))
def test_order_of_edits_pairs_and_experts_does_not_matter(make_problem, stacked, seed: int) -> None:
    problem = make_problem(8, 4, 5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    edits, pairs = torch.randperm(8, generator=generator), torch.randperm(problem.num_pairs, generator=generator)
    experts = torch.randperm(4, generator=generator)  # expert j is called experts[j] now
    where = torch.argsort(edits)  # edit t stands at where[t] now
    shuffled = EditProblem(
        where[problem.edit_index[pairs]],
        experts[problem.expert_index[pairs]],
        problem.features[pairs],
        problem.residuals[edits],
        4,
    )
    first, second = Woodbury().solve(problem), Woodbury().solve(shuffled)
    # the sums are taken in another order
    torch.testing.assert_close(stacked(second)[experts], stacked(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled.prediction(second), problem.prediction(first)[edits], rtol=1e-5, atol=1e-5)


def test_linear_in_the_residuals(make_problem, stacked) -> None:
    one, two = make_problem(8, 3, 5, seed=1), make_problem(8, 3, 5, seed=2)
    two = replace(one, residuals=two.residuals)
    both = replace(one, residuals=3 * one.residuals - 2 * two.residuals)
    solve = Woodbury().solve
    expected = 3 * stacked(solve(one)) - 2 * stacked(solve(two))
    torch.testing.assert_close(stacked(solve(both)), expected, rtol=1e-5, atol=1e-5)  # float32 rounding


def test_bfloat16_is_computed_in_float32(make_problem, stacked) -> None:
    problem = make_problem(40, 4, 16, dtype=torch.bfloat16)
    assert gram(problem).dtype == torch.float32
    wide = replace(problem, features=problem.features.float(), residuals=problem.residuals.float())
    expected = stacked(Woodbury().solve(wide))
    # each factor is rounded once, by at most 2⁻⁹
    assert error(stacked(Woodbury().solve(problem)), expected) < 2 * 2**-9


def test_dtype_is_kept(make_problem) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        deltas = Woodbury().solve(make_problem(4, 2, 3, dtype=dtype))
        assert deltas.left.dtype == deltas.right.dtype == dtype
        assert deltas.is_finite()
