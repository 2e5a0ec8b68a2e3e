"""Low-rank changes joined and cut: the same dense change, with fewer terms."""

from __future__ import annotations

import pytest
import torch

from lit_moeedit.solvers import ExpertDeltas
from lit_moeedit.solvers.compression import cut, join


def some_deltas(seed: int, terms: int = 6, dtype: torch.dtype = torch.float32) -> ExpertDeltas:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, 3, (terms,), generator=generator)
    left = torch.randn(2, 7, generator=generator, dtype=dtype)
    return ExpertDeltas(
        experts, torch.arange(terms) % 2, left, torch.randn(terms, 5, generator=generator, dtype=dtype), 4
    )


def dense(deltas: ExpertDeltas) -> torch.Tensor:
    return torch.stack([deltas.dense(expert) for expert in range(4)])


def test_joined_is_the_sum() -> None:
    parts = [some_deltas(0), some_deltas(1, 3), some_deltas(2, 1, torch.float64)]
    joined = join(parts)
    assert joined.left.dtype == torch.float64
    # the order of a sum in float64
    torch.testing.assert_close(dense(joined), sum(dense(part).double() for part in parts), rtol=0, atol=1e-6)


def test_cut_to_the_rank_loses_nothing() -> None:
    one = some_deltas(0)
    doubled = join([one, one, some_deltas(0, 2)])
    found = cut(doubled)
    # factors are rounded to float32
    torch.testing.assert_close(dense(found), dense(doubled), rtol=1e-5, atol=1e-5)
    for expert in found.experts:
        assert found.expert_index.eq(expert).sum() == torch.linalg.matrix_rank(doubled.dense(expert))
    assert len(found.right) < len(doubled.right)


@pytest.mark.parametrize("rank", [1, 2])
def test_cut_to_a_rank_is_the_nearest(rank: int) -> None:
    deltas = some_deltas(3, 20)
    found = cut(deltas, rank)
    for expert in deltas.experts:
        values = torch.linalg.svdvals(deltas.dense(expert).double())
        error = (deltas.dense(expert) - found.dense(expert)).double().norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)  # rounded to float32


def test_refusals() -> None:
    with pytest.raises(ValueError, match="changes of one layer"):
        join([])
    other = ExpertDeltas(torch.tensor([0]), torch.tensor([0]), torch.ones(1, 7), torch.ones(1, 6), 4)
    with pytest.raises(ValueError, match="changes of one layer"):
        join([some_deltas(0), other])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        cut(other, 0)


def test_a_change_of_nothing() -> None:
    nothing = ExpertDeltas(torch.tensor([1]), torch.tensor([0]), torch.zeros(1, 7), torch.zeros(1, 5), 4)
    assert not bool(dense(cut(nothing)).any())
