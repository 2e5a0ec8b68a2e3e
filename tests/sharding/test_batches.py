"""Changes of many experts in one product are those of each in its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_moeedit.sharding.batches import Batches
from lit_moeedit.solvers import ExpertDeltas

CPU = torch.device("cpu")
D_MODEL, D_HIDDEN = 5, 4


def deltas_of(counts: list[int], dtype: torch.dtype = torch.float32) -> ExpertDeltas:
    """Deltas of one expert after the other, every other one of a larger layer, with so many terms; in no order."""
    generator = torch.Generator().manual_seed(sum(counts))
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 2
    expert = expert[torch.randperm(len(expert), generator=generator)]
    return ExpertDeltas(
        expert,
        torch.randint(3, (len(expert),), generator=generator),
        torch.randn(3, D_MODEL, generator=generator).to(dtype),
        torch.randn(len(expert), D_HIDDEN, generator=generator).to(dtype),
        2 * len(counts),
    )


def in_double(deltas: ExpertDeltas, expert: int) -> Tensor:
    terms = (deltas.expert_index == expert).nonzero()[:, 0]
    return deltas.left[deltas.row_index[terms]].double().T @ deltas.right[terms].double()


@settings(derandomize=True, max_examples=60)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=12), most=st.integers(1, 500), transposed=st.booleans())
def test_each_expert_has_its_own_change(counts: list[int], most: int, transposed: bool) -> None:
    deltas = deltas_of(counts)
    batches = Batches(deltas, CPU, transposed, most)
    found = list(batches)
    assert list(itertools.chain.from_iterable(batch.experts for batch in found)) == deltas.experts
    for batch in found:
        dense = batches.dense(batch)
        assert batch.rows.tolist() == batch.experts
        if len(batch.experts) > 1:
            longest = max(len(deltas.right[deltas.expert_index == expert]) for expert in batch.experts)
            assert len(batch.experts) * max(D_MODEL * D_HIDDEN, longest * (D_MODEL + D_HIDDEN)) <= most
        for expert, change in zip(batch.experts, dense.mT if transposed else dense, strict=True):
            # 30 products in float32
            torch.testing.assert_close(change.double(), in_double(deltas, expert), rtol=1e-5, atol=1e-5)


def test_batches_are_as_large_as_is_allowed() -> None:
    size = D_MODEL * D_HIDDEN
    assert [len(batch.experts) for batch in Batches(deltas_of([1] * 7), CPU, False, 3 * size)] == [3, 3, 1]
    # a long one among short ones would make zeros of the rest
    lengths = [len(batch.experts) for batch in Batches(deltas_of([1, 1, 30, 1, 1]), CPU, False, 3 * size)]
    assert lengths == [2, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_the_factors(dtype: torch.dtype) -> None:
    deltas = deltas_of([2, 5], dtype)
    batches = Batches(deltas, CPU, False, 1000)
    (batch,) = batches
    dense = batches.dense(batch)
    assert dense.dtype == dtype
    for expert, change in zip(batch.experts, dense, strict=True):
        # sums of 5 products, rounded to 8 bits in bfloat16
        close = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(change.double(), in_double(deltas, expert), **close)


def test_nothing_changes_in_no_batch() -> None:
    none = torch.zeros(0, dtype=torch.long)
    deltas = ExpertDeltas(none, none, torch.zeros(0, D_MODEL), torch.zeros(0, D_HIDDEN), 3)
    assert list(Batches(deltas, CPU, False, 1000)) == []
