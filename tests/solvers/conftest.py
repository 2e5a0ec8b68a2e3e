"""Random edit problems, and their dense solution in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_moeedit.solvers import EditProblem, ExpertDeltas


def _problem(
    edits: int,
    experts: int,
    d_hidden: int,
    d_model: int = 5,
    ridge: float = 1.0,
    seed: int = 0,
    share: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> EditProblem:
    """Each (edit, expert) pair is routed with probability ``share``; features and residuals are standard normal."""
    generator = torch.Generator().manual_seed(seed)
    edit, expert = (torch.rand(edits, experts, generator=generator) < share).nonzero(as_tuple=True)
    order = torch.randperm(len(edit), generator=generator)  # pairs come in no particular order
    features = torch.randn(len(edit), d_hidden, generator=generator, dtype=torch.float64).to(dtype)
    residuals = torch.randn(edits, d_model, generator=generator, dtype=torch.float64).to(dtype)
    return EditProblem(edit[order], expert[order], features, residuals, experts, ridge)


def _design(problem: EditProblem) -> Tensor:
    """The stacked features ``[T, E · d_hidden]`` in float64, zero where an edit does not visit an expert."""
    d_hidden = problem.features.shape[1]
    matrix = torch.zeros(problem.num_edits, problem.num_experts * d_hidden, dtype=torch.float64)
    matrix.view(problem.num_edits, problem.num_experts, d_hidden)[problem.edit_index, problem.expert_index] = (
        problem.features.double()
    )
    return matrix


def _solution(problem: EditProblem) -> Tensor:
    """The dense minimiser ``[E, d_model, d_hidden]`` in float64; the one of least norm if the ridge is 0."""
    design, residuals = _design(problem), problem.residuals.double()
    if problem.ridge:
        system = design.T @ design + problem.ridge * torch.eye(design.shape[1], dtype=torch.float64)
        stacked = torch.linalg.solve(system, design.T @ residuals)
    else:
        stacked = torch.linalg.pinv(design) @ residuals
    return stacked.reshape(problem.num_experts, -1, residuals.shape[1]).mT


def _least(problem: EditProblem) -> float:
    """The least objective, ``λ tr(Rᵀ (ΦΦᵀ + λ I)⁻¹ R)``, in float64."""
    design, residuals = _design(problem), problem.residuals.double()
    system = design @ design.T + problem.ridge * torch.eye(len(design), dtype=torch.float64)
    return problem.ridge * float((residuals * torch.linalg.solve(system, residuals)).sum())


def _stacked(deltas: ExpertDeltas) -> Tensor:
    """All deltas ``[E, d_model, d_hidden]`` in float64."""
    return torch.stack([deltas.dense(expert) for expert in range(deltas.num_experts)]).double()


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., EditProblem]:
    return _problem


@pytest.fixture(scope="session")
def design() -> Callable[[EditProblem], Tensor]:
    return _design


@pytest.fixture(scope="session")
def solution() -> Callable[[EditProblem], Tensor]:
    return _solution


@pytest.fixture(scope="session")
def least() -> Callable[[EditProblem], float]:
    return _least


@pytest.fixture(scope="session")
def stacked() -> Callable[[ExpertDeltas], Tensor]:
    return _stacked
