"""Experts replaced by those of another parameter: bit by bit, undone with the transaction, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_moeedit.interrupts import held
from lit_moeedit.sharding.replacement import replace_experts
from lit_moeedit.sharding.transaction import Transaction
from tests.sharding.whole_weights import some_deltas, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_experts_are_those_of_the_source(dtype: torch.dtype) -> None:
    target, source = weight(dtype), nn.Parameter(-weight(dtype).detach())
    before = target.detach().clone()
    with held(Transaction()) as transaction:
        replace_experts(transaction, target, source, [0, 3])
        transaction.keep()
    assert torch.equal(target[[0, 3]], source[[0, 3]]) and torch.equal(target[[1, 2]], before[[1, 2]])


def test_rollback_after_further_changes() -> None:
    target, source = weight(), nn.Parameter(weight().detach() * 2)
    before = target.detach().clone()
    with pytest.raises(KeyError), held(Transaction()) as transaction:
        transaction.commit(target, some_deltas())
        replace_experts(transaction, target, source, [1, 2])
        transaction.commit(target, some_deltas(1))
        raise KeyError
    assert torch.equal(target, before)


@pytest.mark.parametrize("source", [torch.zeros(4, 3, 4), torch.zeros(4, 3, 5, dtype=torch.float64)])
def test_another_shape_or_dtype(source: torch.Tensor) -> None:
    target = weight()
    before = target.detach().clone()
    with pytest.raises(ValueError, match="expected a copy of the experts"), held(Transaction()) as transaction:
        replace_experts(transaction, target, nn.Parameter(source), [0])
    assert torch.equal(target, before)
