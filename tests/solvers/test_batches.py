"""Batches of experts: every pair once, little padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.solvers import EditProblem
from lit_moeedit.solvers import batches as module
from lit_moeedit.solvers.batches import expert_batches


@settings(derandomize=True, max_examples=40)
@given(
    edits=st.integers(0, 40),
    experts=st.integers(1, 60),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_every_pair_is_in_one_batch(make_problem, edits, experts, share, seed) -> None:
    problem = make_problem(edits, experts, 3, share=share, seed=seed)
    seen = []
    for batch in expert_batches(problem):
        valid = torch.ones_like(batch.pairs, dtype=torch.bool) if batch.valid is None else batch.valid
        seen.append(batch.pairs[valid])
        assert torch.equal(batch.edits, problem.edit_index[batch.pairs])
        owners = problem.expert_index[batch.pairs]
        assert bool((owners == owners[:, :1])[valid].all())
        features = batch.features(problem, torch.float64)
        assert torch.equal(features[valid], problem.features[batch.pairs[valid]].double())
        assert not features[~valid].any()
        assert int(valid.sum(1).min()) >= 0.8 * valid.shape[1]
    assert torch.equal(torch.cat([problem.edit_index[:0], *seen]).sort()[0], torch.arange(problem.num_pairs))


def test_experts_with_few_pairs_go_together(make_problem) -> None:
    assert len(list(expert_batches(make_problem(10, 500, 4, share=0.2)))) < 15


@pytest.mark.parametrize("budget", [1, 100, 2000])
def test_batches_keep_their_budget(make_problem, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    monkeypatch.setattr(module, "BUDGET", budget)
    problem: EditProblem = make_problem(30, 40, 7)
    for batch in expert_batches(problem):
        count, longest = batch.pairs.shape
        assert count == 1 or count * longest * max(longest, 7) <= budget
