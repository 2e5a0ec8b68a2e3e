"""Weight changes are applied exactly, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas
from tests.sharding.whole_weights import EXPERTS, some_deltas, weight


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_commit_adds_the_dense_delta(transposed: bool) -> None:
    parameter, deltas = weight(transposed=transposed), some_deltas()
    before = parameter.detach().clone()
    with Transaction() as transaction:
        transaction.commit(parameter, deltas, transposed)
        assert transaction.touched == 2
    for expert in range(EXPERTS):
        delta = deltas.dense(expert)
        assert torch.equal(parameter[expert], before[expert] + (delta.T if transposed else delta))
    assert raw(parameter[[0, 2]]) == raw(before[[0, 2]])
    assert parameter.requires_grad
    assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    parameter, deltas = weight(dtype), some_deltas(scale=0.01)
    before = parameter.detach().clone()
    with Transaction() as transaction:
        transaction.commit(parameter, deltas)
    once = {j: (before[j].float() + deltas.dense(j)).to(dtype) for j in deltas.experts}
    twice = {j: before[j] + deltas.dense(j).to(dtype) for j in deltas.experts}
    assert all(torch.equal(parameter[j], once[j]) for j in deltas.experts)
    assert any(not torch.equal(once[j], twice[j]) for j in deltas.experts)  # the order of rounding can be seen


def test_float64_keeps_its_precision() -> None:
    parameter, deltas = weight(torch.float64), some_deltas()
    parameter.data += 1e-12
    before = parameter.detach().clone()
    with Transaction() as transaction:
        transaction.commit(parameter, deltas)
    for expert in deltas.experts:
        assert torch.equal(parameter[expert], before[expert] + deltas.dense(expert).double())


def test_half_precision_deltas_are_summed_in_float32() -> None:
    parameter, deltas = weight(), some_deltas(scale=1e-4, dtype=torch.bfloat16)
    before = parameter.detach().clone()
    with Transaction() as transaction:
        transaction.commit(parameter, deltas)
    for expert in deltas.experts:
        assert torch.equal(parameter[expert], before[expert] + deltas.dense(expert).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollback_after_several_commits_is_bit_identical(dtype: torch.dtype) -> None:
    first, second = weight(dtype), weight(dtype, transposed=True)
    first.data[1, 0, 0] = -0.0  # equal to 0.0, but not the same bits
    before = raw(first), raw(second)
    with Transaction() as transaction:
        for seed in range(3):
            transaction.commit(first, some_deltas(seed, scale=10.0**seed))
            transaction.commit(second, some_deltas(seed), transposed=True)
        assert transaction.touched == 4
        assert (raw(first), raw(second)) != before
        transaction.rollback()
        assert (raw(first), raw(second)) == before
        assert transaction.touched == 0


def test_the_storage_stays() -> None:
    parameter = weight()
    pointer = parameter.data_ptr()
    with Transaction() as transaction:
        transaction.commit(parameter, some_deltas())
        transaction.rollback()
    assert parameter.data_ptr() == pointer  # optimizers and sharding strategies hold on to it


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FloatingPointError])
def test_an_exception_rolls_back(error: type[BaseException]) -> None:
    parameter = weight()
    before = raw(parameter)
    with pytest.raises(error), Transaction() as transaction:
        transaction.commit(parameter, some_deltas())
        transaction.commit(parameter, some_deltas(1))
        assert raw(parameter) != before
        raise error
    assert raw(parameter) == before


def test_what_was_kept_cannot_be_rolled_back_later() -> None:
    parameter = weight()
    with Transaction() as transaction:
        transaction.commit(parameter, some_deltas())
    after = raw(parameter)
    transaction.rollback()
    assert raw(parameter) == after


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_delta_that_is_not_finite_is_refused_before_anything_changes(value: float) -> None:
    parameter, deltas = weight(), some_deltas()
    before = raw(parameter)
    right = deltas.right.clone()
    right[0, 0] = value  # of expert 3, which comes after expert 1
    with Transaction() as transaction:
        with pytest.raises(FloatingPointError, match="a delta has values that are not finite"):
            transaction.commit(parameter, deltas.with_right(right))
        assert raw(parameter) == before
        assert transaction.touched == 0


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e5), (torch.float32, 1e38)]
)  # 65504 is the largest float16; a product of finite factors can overflow in float32 too
def test_overflow_is_refused_before_anything_changes(dtype: torch.dtype, scale: float) -> None:
    parameter, deltas = weight(dtype), some_deltas()
    left = deltas.left.clone()
    left[1] = scale * torch.tensor([3.0, -3.0, 3.0])  # of expert 3 only
    large = ExpertDeltas(deltas.expert_index, deltas.row_index, left, 10 * deltas.right, EXPERTS)
    before = raw(parameter)
    with Transaction() as transaction:
        assert large.is_finite()
        with pytest.raises(FloatingPointError, match=rf"weights of expert 3 are not finite in {dtype}"):
            transaction.commit(parameter, large)
        assert raw(parameter) == before


def test_a_refused_commit_leaves_the_ones_before_to_be_rolled_back() -> None:
    parameter, other = weight(), weight(torch.float16)
    before = raw(parameter), raw(other)
    with pytest.raises(FloatingPointError), Transaction() as transaction:
        transaction.commit(parameter, some_deltas())
        transaction.commit(other, some_deltas(scale=1e6))
    assert (raw(parameter), raw(other)) == before


def test_weights_that_were_not_finite_are_refused() -> None:
    parameter = weight()
    parameter.data[1, 0, 0] = torch.nan
    with Transaction() as transaction, pytest.raises(FloatingPointError, match="weights of expert 1"):
        transaction.commit(parameter, some_deltas())


def test_commit_works_where_gradients_are_recorded() -> None:
    parameter = weight()
    loss = parameter.square().sum()
    loss.backward()
    gradient = raw(parameter.grad)
    with Transaction() as transaction:
        transaction.commit(parameter, some_deltas())
    assert parameter.is_leaf
    assert raw(parameter.grad) == gradient


def test_one_of_two_commits_of_an_expert_cannot_be_undone_alone() -> None:
    parameter, other = weight(), weight()
    start = parameter.detach().clone()
    with Transaction() as transaction:
        transaction.commit(parameter, some_deltas())
        transaction.commit(other, some_deltas())
        transaction.commit(parameter, some_deltas(1))
        both = parameter.detach().clone()
        for mark in (1, 2):
            with pytest.raises(ValueError, match="experts were committed before and after them"):
                transaction.undo(mark)
            assert raw(parameter) == raw(both)
        with pytest.raises(FloatingPointError):
            transaction.commit(parameter, some_deltas(scale=float("inf")))
        assert raw(parameter) == raw(both)
        transaction.undo()
        assert raw(parameter) == raw(start) == raw(other)
        transaction.commit(parameter, some_deltas())
        transaction.commit(other, some_deltas())
        transaction.undo(1)
        assert raw(other) == raw(start) != raw(parameter)
