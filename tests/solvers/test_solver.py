"""The base class of solvers: what a solver of one's own takes, and what solvers declare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_moeedit.solvers import (
    BlockCoordinateDescent,
    EditProblem,
    ExpertDeltas,
    LayerWeights,
    PerExpertRidge,
    Solver,
    Tucker,
    TuckerFactors,
    Woodbury,
)


class LeastSquares(Solver):
    """Joint ridge regression by ``torch.linalg.lstsq``, with the ridge as further rows."""

    def solve(self, problem: EditProblem) -> ExpertDeltas:
        stacked = problem.features.new_zeros(problem.num_edits, problem.num_experts, problem.features.shape[1])
        stacked[problem.edit_index, problem.expert_index] = problem.features
        rows = torch.cat([stacked.flatten(1), problem.ridge**0.5 * torch.eye(stacked[0].numel())])
        wanted = torch.cat([problem.residuals, problem.residuals.new_zeros(stacked[0].numel(), 5)])
        dense = torch.linalg.lstsq(rows, wanted).solution.T.unflatten(1, stacked.shape[1:]).movedim(1, 0)
        return ExpertDeltas.from_dense(torch.arange(problem.num_experts), dense, problem.num_experts)


def test_a_solver_of_one_s_own(make_problem, least) -> None:
    problem = make_problem(12, 4, 6)
    solver = LeastSquares()
    assert problem.objective(solver.solve(problem)) == pytest.approx(least(problem), rel=1e-5)
    assert solver.at_layer(LayerWeights(torch.ones(4, 5, 6))) is solver
    assert not (solver.changes_all_experts or solver.carries or solver.needs_moments)
    with pytest.raises(NotImplementedError, match="LeastSquares solves every layer by itself"):
        solver.carry(problem)
    with pytest.raises(NotImplementedError, match="LeastSquares solves every layer by itself"):
        solver.unfold(None, 1.0)


def test_a_solver_solves() -> None:
    class Idle(Solver):
        pass

    with pytest.raises(TypeError, match="solve"):
        Idle()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (Woodbury(), (False, False, False)),
        (BlockCoordinateDescent(), (False, False, False)),
        (PerExpertRidge(), (False, False, False)),
        (Tucker(), (True, True, True)),
        (Tucker(whiten=False), (True, True, False)),
        (Tucker(carry=False), (True, False, True)),
    ],
)
def test_what_solvers_declare(solver: Solver, expected: tuple[bool, bool, bool]) -> None:
    assert isinstance(solver, Solver)
    assert (solver.changes_all_experts, solver.carries, solver.needs_moments) == expected


EXPERTS, D_MODEL, D_HIDDEN = 4, 5, 6


def weights(seed: int = 0) -> Tensor:
    return torch.randn(EXPERTS, D_MODEL, D_HIDDEN, generator=torch.Generator().manual_seed(seed))


def metric() -> Tensor:
    rows = torch.randn(30, D_HIDDEN, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, D_HIDDEN)
    return rows.T @ rows / 30


class TestFactorsOfALayer:
    def test_are_those_of_its_weights(self) -> None:
        found = Tucker((2, 3, 4)).at_layer(LayerWeights(weights(), metric=metric())).factors
        expected = TuckerFactors.hosvd(weights(), metric(), (2, 3, 4))
        assert found is not None and found.energy == expected.energy
        for name in ("expert", "output", "input"):
            assert torch.equal(getattr(found, name), getattr(expected, name))

    def test_are_orthonormal_where_keys_are_whitened_already(self) -> None:
        found = Tucker((2, 3, 4)).at_layer(LayerWeights(weights(), metric=metric(), is_whitened=True)).factors
        assert found is not None
        # float32 products with a root whose condition number is 100
        torch.testing.assert_close(found.input.T @ found.input, torch.eye(4), rtol=0, atol=1e-4)

    def test_whitening_takes_moments(self) -> None:
        with pytest.raises(ValueError, match="a whitened input mode needs second moments"):
            Tucker().at_layer(LayerWeights(weights()))
        plain = Tucker(whiten=False).at_layer(LayerWeights(weights())).factors
        assert plain is not None
        # float32 eigenvectors
        torch.testing.assert_close(plain.input.T @ plain.input, torch.eye(plain.ranks[2]), rtol=0, atol=1e-5)

    def test_take_the_ranks_of_another_layer(self) -> None:
        top = Tucker(whiten=False, energy=0.7).at_layer(LayerWeights(weights()))
        assert top.factors is not None
        below = Tucker(whiten=False).at_layer(LayerWeights(weights(2)), like=top).factors
        assert below is not None and below.ranks == top.factors.ranks

    def test_unfold_what_was_carried(self, make_problem) -> None:
        problem = make_problem(7, EXPERTS, D_HIDDEN, d_model=D_MODEL)
        top = Tucker((2, 3, 4), whiten=False).at_layer(LayerWeights(weights()))
        below = Tucker(whiten=False).at_layer(LayerWeights(weights(2)), like=top)
        core = top.carry(problem)
        whole, half = top.solve(problem), top.unfold(core, 0.5)
        for expert in range(EXPERTS):
            torch.testing.assert_close(2 * half.dense(expert), whole.dense(expert))
        assert below.unfold(core, 0.5).experts == list(range(EXPERTS))
        assert not torch.equal(below.unfold(core, 0.5).dense(0), half.dense(0))

    def test_are_kept_under_their_key(self, tmp_path: Path) -> None:
        asked: list[Any] = []

        def key(metric: Tensor | None, settings: object) -> str:
            asked.append((metric, settings))
            return f"{settings!r}"

        solver, layer = Tucker((2, 3, 4), cache=tmp_path), LayerWeights(weights(), 3, metric(), key=key)
        first = solver.at_layer(layer).factors
        assert [path.name for path in tmp_path.iterdir()] == ["layer_3.safetensors"]
        # other weights under the same key: what is read is what was kept
        second = solver.at_layer(replace(layer, weights=weights(5))).factors
        assert first is not None and second is not None and torch.equal(first.expert, second.expert)
        assert asked[0][1] == ((2, 3, 4), solver.energy) and torch.equal(asked[0][0], metric())
        third = Tucker((2, 3, 3), cache=tmp_path).at_layer(layer).factors
        assert third is not None and third.ranks == (2, 3, 3)
        # without a key nothing says what they would be of
        Tucker((2, 3, 4), cache=tmp_path / "unused").at_layer(replace(layer, key=None))
        assert not (tmp_path / "unused").exists()

    def test_are_the_same_on_all_ranks(self, tmp_path: Path) -> None:
        """A rank that finds them computes them with the others all the same, writes no file, and takes the first's."""
        layer = LayerWeights(weights(), metric=metric(), key=lambda metric, settings: "one")
        Tucker((2, 3, 4), cache=tmp_path).at_layer(layer)
        before = (tmp_path / "layer_0.safetensors").stat().st_mtime_ns
        read: list[Any] = []

        class Reader:
            shape = weights().shape

            def __getitem__(self, block: Any) -> Tensor:
                read.append(block)
                return weights()[block]

        def broadcast(*tensors: Tensor) -> None:
            for tensor in tensors:
                tensor.fill_(2.0)

        other = replace(layer, weights=Reader(), any_rank=lambda here: True, broadcast=broadcast, is_first=False)
        found = Tucker((2, 3, 4), cache=tmp_path).at_layer(other).factors
        assert read and found is not None
        assert bool((found.expert == 2).all() and (found.output == 2).all() and (found.input == 2).all())
        assert (tmp_path / "layer_0.safetensors").stat().st_mtime_ns == before
