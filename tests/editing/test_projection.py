"""Preservation: what projectors and shaping matrices are, and which problem they solve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_moeedit.editing.projection import check_preserve, shape_rows, shaping_matrices
from lit_moeedit.solvers import EditProblem, Woodbury


def second_moments(experts: int, d_hidden: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Random positive semi-definite matrices ``[experts, d_hidden, d_hidden]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(experts, rank or 3 * d_hidden, d_hidden, generator=generator, dtype=torch.float64)
    return rows.mT @ rows / rows.shape[1]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(d_hidden=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 1000))
def test_nullspace_is_the_orthogonal_projector_onto_small_eigenvalues(d_hidden: int, rank: int, seed: int) -> None:
    moments = second_moments(2, d_hidden, rank, seed)
    # not where a rank below d_hidden leaves eigenvalues that are 0 up to rounding
    threshold = max(1e-6, float(torch.linalg.eigvalsh(moments).quantile(0.6)))
    projectors = shaping_matrices(moments, "nullspace", threshold=threshold)
    torch.testing.assert_close(projectors, projectors.mT)
    torch.testing.assert_close(projectors @ projectors, projectors)
    for moment, projector in zip(moments, projectors, strict=True):
        values, vectors = torch.linalg.eigh(moment)
        kept = values > threshold
        assert float((projector @ vectors[:, kept]).norm()) < 1e-10  # float64
        torch.testing.assert_close(projector @ vectors[:, ~kept], vectors[:, ~kept])
        assert round(float(projector.trace())) == int((~kept).sum())


def test_nullspace_in_float32() -> None:
    projectors = shaping_matrices(second_moments(3, 16).float(), "nullspace", threshold=0.5)
    assert 0 < float(projectors[0].trace()) < 16
    # eigenvectors of float32 are orthogonal to about sqrt(16) units in the last place
    torch.testing.assert_close(projectors @ projectors, projectors, rtol=0, atol=1e-5)
    torch.testing.assert_close(projectors, projectors.mT, rtol=0, atol=1e-5)


def test_threshold_is_inclusive() -> None:
    moment = torch.diag(torch.tensor([0.0, 0.02, 0.03]))[None]
    projector = shaping_matrices(moment, "nullspace", threshold=0.02)[0]
    torch.testing.assert_close(projector, torch.diag(torch.tensor([1.0, 1.0, 0.0])))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    d_hidden=st.integers(1, 10),
    rank=st.integers(1, 12),
    strength=st.sampled_from([0.0, 0.5, 1e3]),
    seed=st.integers(0, 99),
)
def test_covariance_is_the_inverse_square_root(d_hidden: int, rank: int, strength: float, seed: int) -> None:
    moments = second_moments(2, d_hidden, rank, seed)
    matrices = shaping_matrices(moments, "covariance", strength=strength)
    identity = torch.eye(d_hidden, dtype=torch.float64).expand_as(moments)
    # condition numbers up to 1e4 in float64
    torch.testing.assert_close(matrices @ (identity + strength * moments) @ matrices, identity, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrices, matrices.mT)
    assert bool((torch.linalg.eigvalsh(matrices) > 0).all())


def test_covariance_in_float32() -> None:
    moments = second_moments(2, 16, rank=5).float()
    matrices = shaping_matrices(moments, "covariance", strength=1000.0)
    identity = torch.eye(16)
    # the condition number of I + β C is about 1e4, of which float32 leaves three digits
    torch.testing.assert_close(
        matrices @ (identity + 1000.0 * moments) @ matrices, identity.expand(2, -1, -1), rtol=0, atol=5e-3
    )


def test_rounding_below_zero_does_not_matter() -> None:
    moment = torch.diag(torch.tensor([1.0, -1e-4]))[None]  # 1 + strength * -1e-4 would be negative
    matrix = shaping_matrices(moment, "covariance", strength=1e5)[0]
    torch.testing.assert_close(matrix, torch.diag(torch.tensor([(1 + 1e5) ** -0.5, 1.0])))


def test_none_is_the_identity() -> None:
    assert torch.equal(shaping_matrices(torch.ones(2, 3, 3), "none"), torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("preserve", ["nullspace", "covariance"])
def test_an_expert_that_saw_nothing_is_free(preserve) -> None:
    torch.testing.assert_close(shaping_matrices(torch.zeros(1, 4, 4), preserve), torch.eye(4)[None])


def keyed_problem(ridge: float) -> tuple[EditProblem, Tensor]:
    """Nine edits over three experts with gated keys for features, in float64, and second moments of the experts."""
    generator = torch.Generator().manual_seed(5)
    edit, expert = (torch.rand(9, 3, generator=generator) < 0.7).nonzero(as_tuple=True)
    gated = torch.randn(len(edit), 6, generator=generator, dtype=torch.float64)
    residuals = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return EditProblem(edit, expert, gated, residuals, 3, ridge), second_moments(3, 6, rank=4)


def applied(problem: EditProblem, preserve, moments: Tensor, **settings: float) -> Tensor:
    """The applied deltas ``[3, d_model, d_hidden]``: shape, solve, shape back, as the editor does."""
    experts = torch.arange(3)
    matrices = shaping_matrices(moments, preserve, **settings)
    shaped = shape_rows(problem.features, problem.expert_index, experts, matrices)
    solution = Woodbury().solve(
        EditProblem(problem.edit_index, problem.expert_index, shaped, problem.residuals, 3, problem.ridge)
    )
    deltas = solution.with_right(shape_rows(solution.right, solution.expert_index, experts, matrices))
    return torch.stack([deltas.dense(j) for j in range(3)])


def test_covariance_solves_the_penalised_problem() -> None:
    """``min Σ_t ‖r_t − Σ_j ΔW_j g k‖² + λ Σ_j tr(ΔW_j (I + β C_j) ΔW_jᵀ)``, solved directly."""
    problem, moments = keyed_problem(ridge=0.3)
    design = torch.zeros(9, 18, dtype=torch.float64)
    for t, j, key in zip(problem.edit_index, problem.expert_index, problem.features, strict=True):
        design[t, 6 * j : 6 * j + 6] = key
    penalty = torch.block_diag(*(torch.eye(6, dtype=torch.float64) + 20.0 * moment for moment in moments))
    direct = torch.linalg.solve(design.T @ design + 0.3 * penalty, design.T @ problem.residuals)
    expected = direct.reshape(3, 6, 4).mT
    torch.testing.assert_close(applied(problem, "covariance", moments, strength=20.0), expected)


def test_nullspace_solves_the_constrained_problem() -> None:
    """The ridge problem over deltas of the form ``ΔW_j P_j``, solved in coordinates of the null spaces."""
    problem, moments = keyed_problem(ridge=0.3)
    bases = []
    for moment in moments:
        values, vectors = torch.linalg.eigh(moment)
        bases.append(vectors[:, values <= 0.5])
    assert all(0 < basis.shape[1] < 6 for basis in bases)
    design = torch.zeros(9, 18, dtype=torch.float64)
    for t, j, key in zip(problem.edit_index, problem.expert_index, problem.features, strict=True):
        design[t, 6 * j : 6 * j + 6] = key
    free = torch.block_diag(*bases)
    inside = design @ free
    direct = torch.linalg.solve(
        inside.T @ inside + 0.3 * torch.eye(free.shape[1], dtype=torch.float64), inside.T @ problem.residuals
    )
    expected = (free @ direct).reshape(3, 6, 4).mT
    torch.testing.assert_close(applied(problem, "nullspace", moments, threshold=0.5), expected)


def test_shape_rows_uses_each_expert_s_own_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, matrices = torch.randn(5, 3, generator=generator), torch.randn(2, 3, 3, generator=generator)
    matrices = matrices + matrices.mT
    expert_index = torch.tensor([7, 2, 7, 2, 2])
    shaped = shape_rows(rows, expert_index, torch.tensor([2, 7]), matrices)
    for row, expert, result in zip(rows, expert_index, shaped, strict=True):
        torch.testing.assert_close(result, matrices[0 if expert == 2 else 1] @ row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hard", 0.02, 1.0), "preserve must be one of nullspace, covariance, none, got 'hard'"),
        (("nullspace", -1.0, 1.0), "threshold must be at least 0, got -1.0"),
        (("nullspace", float("nan"), 1.0), "threshold must be at least 0, got nan"),
        (("covariance", 0.02, -1.0), "strength must be at least 0, got -1.0"),
        (("covariance", 0.02, float("nan")), "strength must be at least 0, got nan"),
    ],
)
def test_wrong_settings_are_refused(arguments: tuple[str, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_preserve(*arguments)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4)])
def test_matrices_must_be_square_and_stacked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"second_moment must be \[n, d_hidden, d_hidden\], got"):
        shaping_matrices(torch.zeros(shape), "nullspace")
