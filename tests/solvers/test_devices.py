"""Solvers on a device: the same solution as on the CPU, and it is where the problem is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lit_moeedit.solvers import (
    BlockCoordinateDescent,
    EditProblem,
    PerExpertRidge,
    Solver,
    Tucker,
    TuckerFactors,
    Woodbury,
)

SOLVERS: dict[str, Callable[[], Solver]] = {
    "woodbury": Woodbury,
    "descent": lambda: BlockCoordinateDescent(passes=2, tolerance=1e-6),
    "per expert": PerExpertRidge,
    "whole modes": Tucker,
}
TENSORS = ("edit_index", "expert_index", "features", "residuals")


def on(problem: EditProblem, device: torch.device) -> EditProblem:
    return replace(problem, **{name: getattr(problem, name).to(device) for name in TENSORS})


@pytest.mark.parametrize("ridge", [pytest.param(1.0, marks=pytest.mark.slow), 1e-7])
@pytest.mark.parametrize("shape", [(9, 5, 12), (30, 3, 7)], ids=["few edits", "many edits"])
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(cuda, make_problem, name: str, shape: tuple[int, int, int], ridge: float) -> None:
    problem = make_problem(*shape, ridge=ridge)
    plain, there = SOLVERS[name]().solve(problem), SOLVERS[name]().solve(on(problem, cuda))
    assert {there.left.device, there.right.device, there.expert_index.device, there.row_index.device} == {cuda}
    assert there.experts == plain.experts
    for expert in plain.experts:
        # the kernels are the same; where a solver takes another way on a GPU, sums are in another order
        scale = float(plain.dense(expert).abs().max())
        torch.testing.assert_close(there.dense(expert).cpu(), plain.dense(expert), rtol=1e-4, atol=1e-4 * scale)
    # sums of squares in float64 of deltas that agree as above
    assert there.square_norm() == pytest.approx(plain.square_norm(), rel=1e-3)
    assert on(problem, cuda).objective(there) == pytest.approx(problem.objective(plain), rel=1e-4)


def test_tucker(cuda, make_problem) -> None:
    problem = make_problem(9, 5, 12)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 5, 12, generator=generator)
    rows = torch.randn(30, 12, generator=generator)
    found = []
    for device in (torch.device("cpu"), cuda):
        factors = TuckerFactors.hosvd(weights.to(device), (rows.T @ rows).to(device), energy=0.9)
        solver = Tucker().with_factors(factors)
        found.append(solver.solve(on(problem, device)))
    plain, there = found
    assert there.left.device == there.right.device == cuda
    for expert in plain.experts:
        assert torch.equal(there.dense(expert).cpu(), plain.dense(expert))


def test_saved_deltas_and_factors(cuda, make_problem, tmp_path) -> None:
    problem = make_problem(9, 5, 12)
    there = Woodbury().solve(on(problem, cuda))
    there.save(tmp_path / "deltas.safetensors")
    read = type(there).load(tmp_path / "deltas.safetensors")
    assert read.left.device.type == "cpu" and torch.equal(
        read.dense(read.experts[0]), there.dense(read.experts[0]).cpu()
    )
    factors = TuckerFactors.hosvd(torch.randn(5, 5, 12).to(cuda))
    factors.save(tmp_path / "factors.safetensors")
    assert torch.equal(TuckerFactors.load(tmp_path / "factors.safetensors").input, factors.input.cpu())
