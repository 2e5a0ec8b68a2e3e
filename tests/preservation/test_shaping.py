"""Preservation: what projectors and shaping matrices are, and which problem they solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_moeedit.preservation import shaping as projection
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.preservation.shaping import (
    CovariancePenalty,
    NullSpace,
    OutputPenalty,
    Preservation,
    Shaping,
    preservation_of,
)
from lit_moeedit.solvers import BlockCoordinateDescent, EditProblem, Solver, Woodbury
from tests.editing.recording import preservation


def second_moments(experts: int, d_hidden: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Random positive semi-definite matrices ``[experts, d_hidden, d_hidden]`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(experts, rank or 3 * d_hidden, d_hidden, generator=generator, dtype=torch.float64)
    return rows.mT @ rows / rows.shape[1]


def shaping(moments: Tensor, preserve="covariance", symmetric: bool = False, **options: Any) -> Shaping:
    """Of all experts, whose second moments are given as they are."""
    counted = SecondMoments(moments, torch.ones(len(moments), dtype=torch.long), torch.ones(1, dtype=torch.long))
    kept = preservation(preserve, **options)
    return Shaping.of(
        counted, torch.arange(len(moments)), kept, options.get("strength", kept.penalty((1, 1, 1), 1.0)), symmetric
    )


def shaping_matrices(moments: Tensor, preserve="covariance", **options: Any) -> Tensor:
    return shaping(moments, preserve, **options).matrices


@settings(derandomize=True, max_examples=30)
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


@settings(derandomize=True, max_examples=30)
@given(
    d_hidden=st.integers(1, 10),
    rank=st.integers(1, 12),
    strength=st.sampled_from([0.0, 0.5, 1e3]),
    seed=st.integers(0, 99),
)
def test_covariance_is_a_root_of_the_inverse(d_hidden: int, rank: int, strength: float, seed: int) -> None:
    moments = second_moments(2, d_hidden, rank, seed)
    inverse = torch.linalg.inv(torch.eye(d_hidden, dtype=torch.float64) + strength * moments)
    triangular = shaping_matrices(moments, strength=strength)
    symmetric = shaping_matrices(moments, strength=strength, symmetric=True)
    for matrices in (triangular, symmetric):
        # condition numbers up to 1e4 in float64
        torch.testing.assert_close(matrices.mT @ matrices, inverse, rtol=0, atol=1e-9)
    torch.testing.assert_close(symmetric, symmetric.mT)
    assert bool((torch.linalg.eigvalsh(symmetric) > 0).all())
    assert torch.equal(triangular, triangular.tril())


def test_covariance_of_moments_in_float32() -> None:
    moments = second_moments(2, 16, rank=5).float()
    matrices = shaping_matrices(moments, strength=1000.0)
    inverse = torch.linalg.inv(torch.eye(16, dtype=torch.float64) + 1000.0 * moments.double())
    assert matrices.dtype == torch.float32
    # computed in float64, whatever the condition number, and rounded at the end
    torch.testing.assert_close(matrices.double().mT @ matrices.double(), inverse, rtol=0, atol=1e-6)


def test_rounding_below_zero_does_not_matter() -> None:
    moments = torch.diag(torch.tensor([1.0, -1e-4])).repeat(2, 1, 1)  # 1 + strength * -1e-4 would be negative
    moments[1] = torch.diag(torch.tensor([3.0, 0.0]))
    found = shaping(moments, strength=1e5)
    torch.testing.assert_close(found.matrices[0], torch.diag(torch.tensor([(1 + 1e5) ** -0.5, 1.0])))
    torch.testing.assert_close(found.matrices[1], torch.diag(torch.tensor([(1 + 3e5) ** -0.5, 1.0])))
    assert bool(((found.energy_kept >= 0) & (found.energy_kept <= 1)).all())


@pytest.mark.parametrize("options", [{"preserve": "nullspace", "threshold": 0.5}, {"strength": 30.0},
                                     {"strength": 30.0, "symmetric": True}, {"strength": 0.0}])  # fmt: skip
@pytest.mark.parametrize("block", [1, 40, 10**9])
def test_energy_kept_is_what_deltas_cannot_reach(monkeypatch, options: dict[str, Any], block: int) -> None:
    monkeypatch.setattr(projection, "BLOCK", block)  # one expert at a time, two, or all
    moments = second_moments(5, 4, rank=3)
    moments[3] = 0.0
    counted = SecondMoments(moments * 7, torch.full((5,), 7), torch.tensor([7]))
    symmetric, strength = options.get("symmetric", False), options.get("strength")
    kept = CovariancePenalty(strength) if strength is not None else NullSpace(options["threshold"])
    found = Shaping.of(counted, torch.tensor([1, 3, 4]), kept, strength, symmetric)
    for row, expert in enumerate((1, 3, 4)):
        matrix, moment = found.matrices[row], moments[expert]
        torch.testing.assert_close(matrix, shaping_matrices(moments, **options)[expert])
        reached = (matrix @ moment @ matrix.T).trace() / moment.trace() if expert != 3 else 0.0
        assert float(found.energy_kept[row]) == pytest.approx(1 - float(reached), abs=1e-12)
    assert options != {"preserve": "nullspace", "threshold": 0.5} or 0.5 < float(found.energy_kept[0]) < 1


def test_the_output_form_minimises_what_it_says() -> None:
    """``Σ_t ‖r_t − Σ_j ΔW_j g k_tj‖² + λ Σ_j ‖ΔW_j‖² + μ Σ_j tr(ΔW_j C_j ΔW_jᵀ)``, solved over all experts at once."""
    ridge, weight, d_hidden = 0.3, 20.0, 5
    generator = torch.Generator().manual_seed(3)
    edits, experts = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([0, 2, 1, 2, 0])
    keys, wanted = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n, d in ((5, d_hidden), (3, 4)))
    moments = second_moments(3, d_hidden)
    counted = SecondMoments(moments * 7, torch.full((3,), 2), torch.tensor([7]), gated=True)
    shaping = Shaping.of(counted, torch.arange(3), OutputPenalty(weight / (3 * d_hidden)), weight / ridge)
    assert OutputPenalty(weight / (3 * d_hidden)).penalty((3, 4, d_hidden), ridge) == pytest.approx(weight / ridge)
    problem = EditProblem(edits, experts, shaping.features(keys, experts), wanted, 3, ridge)
    solution = Woodbury().solve(problem)
    found = solution.with_right(shaping.applied(solution.right, solution.expert_index))

    design = torch.zeros(3, 3 * d_hidden, dtype=torch.float64)
    for edit, expert, key in zip(edits.tolist(), experts.tolist(), keys, strict=True):
        design[edit, expert * d_hidden : (expert + 1) * d_hidden] = key
    penalty = torch.block_diag(*(ridge * torch.eye(d_hidden, dtype=torch.float64) + weight * moments))
    least = torch.linalg.solve(design.T @ design + penalty, design.T @ wanted)
    torch.testing.assert_close(torch.cat([found.dense(j).T for j in range(3)]), least)


def test_forms_need_their_own_moments() -> None:
    moments, one = torch.eye(2)[None], torch.ones(1, dtype=torch.long)
    for kept, gated in ((OutputPenalty(), False), (CovariancePenalty(), True), (NullSpace(), True)):
        with pytest.raises(ValueError, match=f"{type(kept).__name__} needs second moments with gated={not gated}"):
            Shaping.of(SecondMoments(moments, one, one, gated), torch.tensor([0]), kept, 1.0)


@pytest.mark.parametrize("preserve", ["nullspace", "covariance"])
def test_an_expert_that_saw_nothing_is_free(preserve) -> None:
    torch.testing.assert_close(shaping_matrices(torch.zeros(1, 4, 4), preserve), torch.eye(4)[None])


WOODBURY = Woodbury()


def keyed_problem(ridge: float) -> tuple[EditProblem, Tensor]:
    """Nine edits over three experts with gated keys for features, in float64, and second moments of the experts."""
    generator = torch.Generator().manual_seed(5)
    edit, expert = (torch.rand(9, 3, generator=generator) < 0.7).nonzero(as_tuple=True)
    gated = torch.randn(len(edit), 6, generator=generator, dtype=torch.float64)
    residuals = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return EditProblem(edit, expert, gated, residuals, 3, ridge), second_moments(3, 6, rank=4)


def applied(problem: EditProblem, preserve, moments: Tensor, solver: Solver = WOODBURY, **settings: Any) -> Tensor:
    """The applied deltas ``[3, d_model, d_hidden]``: shape, solve, shape back, as the editor does."""
    shapes = shaping(moments, preserve, **settings)
    shaped = shapes.features(problem.features, problem.expert_index)
    solution = solver.solve(
        EditProblem(problem.edit_index, problem.expert_index, shaped, problem.residuals, 3, problem.ridge)
    )
    deltas = solution.with_right(shapes.applied(solution.right, solution.expert_index))
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


@pytest.mark.parametrize("solver", [Woodbury(), BlockCoordinateDescent(passes=2)])
def test_either_root_gives_the_same_deltas(solver: Solver) -> None:
    problem, moments = keyed_problem(ridge=0.3)
    triangular, symmetric = (
        applied(problem, "covariance", moments, solver, strength=1000.0, symmetric=root) for root in (False, True)
    )
    torch.testing.assert_close(triangular, symmetric, rtol=0, atol=1e-5 * float(symmetric.abs().max()))


def test_rows_are_shaped_by_each_expert_s_own_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, matrices = torch.randn(5, 3, generator=generator), torch.randn(2, 3, 3, generator=generator)
    expert_index = torch.tensor([7, 2, 7, 2, 2])
    shapes = Shaping(torch.tensor([2, 7]), matrices, torch.ones(2))
    results = shapes.features(rows, expert_index), shapes.applied(rows, expert_index)
    for row, expert, feature, right in zip(rows, expert_index, *results, strict=True):
        matrix = matrices[0 if expert == 2 else 1]
        torch.testing.assert_close(feature, matrix @ row)
        torch.testing.assert_close(right, matrix.T @ row)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((preservation_of, "hard"), "a Preservation or one of output, covariance, nullspace, none, got 'hard'"),
        ((NullSpace, -1.0), "threshold must be at least 0, got -1.0"),
        ((NullSpace, float("nan")), "threshold must be at least 0, got nan"),
        ((CovariancePenalty, -1.0), "strength must be at least 0 and finite, got -1.0"),
        ((OutputPenalty, float("nan")), "strength must be at least 0 and finite, got nan"),
    ],
)
def test_wrong_settings_are_refused(arguments: tuple[Any, Any], message: str) -> None:
    make, setting = arguments
    with pytest.raises(ValueError, match=message):
        make(setting)


def test_names_stand_for_default_settings() -> None:
    for name, kind in (("output", OutputPenalty), ("covariance", CovariancePenalty), ("nullspace", NullSpace)):
        found = preservation_of(name)
        assert type(found) is kind and vars(found) == vars(kind())
    assert preservation_of("none") is None
    own = NullSpace(0.5)
    assert preservation_of(own) is own


def test_energy_of_a_preservation_of_ones_own() -> None:
    """Without a formula of its own for the energy, which is computed from the matrices then."""

    class Half(Preservation):
        def root(self, moments: Tensor, penalty: float | None, symmetric: bool) -> Tensor:
            return 0.5 * torch.eye(moments.shape[1]).expand_as(moments)

    counted = SecondMoments(torch.eye(3)[None], torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    assert float(Shaping.of(counted, torch.tensor([0]), Half()).energy_kept) == pytest.approx(0.75)


def test_a_preservation_of_ones_own_is_held_to_the_shape_of_its_matrices() -> None:
    class One(Preservation):
        def root(self, moments: Tensor, penalty: float | None, symmetric: bool) -> Tensor:
            return torch.eye(moments.shape[1])

    counted = SecondMoments(torch.eye(3)[None], torch.ones(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"One.root must return \[1, 3, 3\], got \[3, 3\]"):
        Shaping.of(counted, torch.tensor([0]), One())


def test_experts_without_a_matrix_are_named() -> None:
    shapes = Shaping(torch.tensor([2, 7]), torch.eye(3).expand(2, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="no edit visits experts 4: its solver must set changes_all_experts"):
        shapes.applied(torch.ones(2, 3), torch.tensor([2, 4]))


def test_experts_without_text_are_edited_freely_or_not_at_all() -> None:
    moments = torch.stack([torch.zeros(5, 5, dtype=torch.float64), second_moments(1, 5, rank=2)[0]])
    free, fixed = (NullSpace(1e-6, unused=unused).root(moments, None, False) for unused in (True, False))
    # products of eigenvectors in float64
    torch.testing.assert_close(free[0], torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(fixed[0], torch.zeros(5, 5, dtype=torch.float64))
    assert torch.equal(fixed[1], free[1]) and float(free[1].trace()) == pytest.approx(3.0)
