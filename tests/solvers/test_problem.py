"""The edit problem: what it refuses, what it counts, and what its objective is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lit_moeedit.solvers import EditProblem, ExpertDeltas

VALID: dict[str, Any] = {
    "edit_index": torch.tensor([0, 0, 1]),
    "expert_index": torch.tensor([1, 3, 1]),
    "features": torch.ones(3, 2),
    "residuals": torch.ones(2, 5),
    "num_experts": 4,
    "ridge": 1.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"edit_index": torch.tensor([0, 0, 1], dtype=torch.int32)},
            "edit_index must be int64 [N], got torch.int32 [3]",
        ),
        ({"expert_index": torch.tensor([[1, 3, 1]])}, "expert_index must be int64 [N], got torch.int64 [1, 3]"),
        ({"expert_index": torch.tensor([1, 3])}, "edit_index has 3 pairs, expert_index 2"),
        ({"features": torch.ones(4, 2)}, "features must be [N=3, d_hidden], got [4, 2]"),
        ({"features": torch.ones(3)}, "features must be [N=3, d_hidden], got [3]"),
        ({"residuals": torch.ones(2)}, "residuals must be [T, d_model], got [2]"),
        ({"features": torch.ones(3, 2).double()}, "same floating-point dtype, got torch.float64 and torch.float32"),
        (
            {"features": torch.ones(3, 2).long(), "residuals": torch.ones(2, 5).long()},
            "same floating-point dtype, got torch.int64 and torch.int64",
        ),
        ({"edit_index": torch.tensor([0, 0, 2])}, "edit_index must be in [0, 2), got [0, 2]"),
        ({"edit_index": torch.tensor([0, -1, 1])}, "edit_index must be in [0, 2), got [-1, 1]"),
        ({"expert_index": torch.tensor([1, 4, 1])}, "expert_index must be in [0, 4), got [1, 4]"),
        ({"expert_index": torch.tensor([1, 1, 1])}, "an (edit, expert) pair occurs more than once"),
        ({"ridge": -0.5}, "ridge must be at least 0, got -0.5"),
        ({"ridge": float("nan")}, "ridge must be at least 0, got nan"),
        ({"ridge": float("inf")}, "ridge must be finite, got inf"),
        ({"features": torch.full((3, 2), torch.inf)}, "features has values that are not finite"),
        ({"residuals": torch.full((2, 5), torch.nan)}, "residuals has values that are not finite"),
    ],
)
def test_wrong_input_is_refused_with_its_reason(change: dict[str, Any], message: str) -> None:
    EditProblem(**VALID)
    with pytest.raises(ValueError, match=re.escape(message)):
        EditProblem(**{**VALID, **change})


def test_experts_are_ascending_and_list_their_pairs() -> None:
    problem = EditProblem(**VALID)
    assert (problem.num_edits, problem.num_pairs) == (2, 3)
    assert [(expert, pairs.tolist()) for expert, pairs in problem.experts()] == [(1, [0, 2]), (3, [1])]


@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_objective_and_prediction_equal_the_sums_written_out(make_problem, ridge: float) -> None:
    problem = make_problem(7, 4, 3, ridge=ridge)
    other = make_problem(7, 4, 3, seed=1)  # deltas of other pairs, so that experts are missing and ranks differ
    deltas = ExpertDeltas(other.expert_index, other.edit_index, other.residuals, other.features, 4)
    predicted = torch.zeros(7, 5, dtype=torch.float64)
    for t, j, feature in zip(problem.edit_index, problem.expert_index, problem.features, strict=True):
        predicted[t] += deltas.dense(int(j)).double() @ feature.double()
    penalty = sum(float(deltas.dense(j).double().square().sum()) for j in range(4))
    expected = float((problem.residuals.double() - predicted).square().sum()) + ridge * penalty
    # sums of some dozens of float32 products
    torch.testing.assert_close(problem.prediction(deltas).double(), predicted, rtol=1e-5, atol=1e-5)
    assert problem.objective(deltas) == pytest.approx(expected, rel=1e-5)
