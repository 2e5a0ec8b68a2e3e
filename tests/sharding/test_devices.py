"""Weights on a device: they are changed, put back, read and checked where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lit_moeedit.sharding.expert_reader import ExpertReader
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.finite import check_finite
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas
from tests.sharding.whole_weights import EXPERTS, some_deltas, weight

CPU = torch.device("cpu")


def on(deltas: ExpertDeltas, device: torch.device) -> ExpertDeltas:
    names = ("expert_index", "row_index", "left", "right")
    return replace(deltas, **{name: getattr(deltas, name).to(device) for name in names})


def places(cuda: torch.device) -> Iterator[tuple[torch.device, torch.device]]:
    """Where weights and their change are: a saved edit, say, is read on the CPU."""
    yield from ((CPU, CPU), (cuda, cuda), (cuda, CPU))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transaction(cuda, monkeypatch, dtype: torch.dtype, transposed: bool) -> None:
    monkeypatch.setattr("lit_moeedit.sharding.commit.BLOCK", {"cpu": 7})
    found: list[Tensor] = []
    for device, beside in places(cuda):
        parameter = nn.Parameter(weight(dtype, transposed).detach().to(device))
        before = parameter.detach().clone()
        optimizer = torch.optim.AdamW([parameter], fused=True)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        trained = parameter.detach().clone()
        with Transaction([optimizer], reset_moments=True) as transaction:
            change = transaction.commit(parameter, on(some_deltas(), beside), transposed)
            transaction.commit(parameter, on(some_deltas(1), beside), transposed)
            assert change > 0 and not torch.equal(parameter, trained)
            transaction.rollback()
            assert torch.equal(parameter, trained)
            transaction.commit(parameter, on(some_deltas(), beside), transposed)
        with pytest.raises(FloatingPointError), Transaction([optimizer]) as transaction:
            transaction.commit(parameter, on(some_deltas(1), beside), transposed)
            transaction.commit(parameter, on(some_deltas(scale=torch.inf), beside), transposed)
        optimizer.step()
        assert parameter.device == before.device == device
        found.append(parameter.detach().cpu())
    for tensor in found[1:]:
        # products of a few numbers, maybe in another order
        torch.testing.assert_close(tensor, found[0], rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_reading(cuda, transposed: bool) -> None:
    plain = weight(transposed=transposed)
    there = ExpertReader(nn.Parameter(plain.detach().to(cuda)), transposed)
    reader = ExpertReader(plain, transposed)
    for block in (*range(EXPERTS), (slice(None), slice(0, 2))):
        assert there[block].device == cuda and torch.equal(there[block].cpu(), reader[block])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_fingerprints(cuda, dtype: torch.dtype) -> None:
    numbers = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).mul(100).to(dtype)
    assert fingerprints({"a": numbers.to(cuda), "b": numbers}, Ranks()) == fingerprints(
        {"a": numbers, "b": numbers.to(cuda)}, Ranks()
    )


def test_a_model_that_is_not_finite(cuda) -> None:
    model = nn.BatchNorm1d(3).to(cuda)
    check_finite(model, Ranks())
    with torch.no_grad():
        model.weight[1] = torch.inf
    with pytest.raises(FloatingPointError, match="weight"):
        check_finite(model, Ranks())


def test_ranks(cuda) -> None:
    tensor, ranks = torch.arange(3, device=cuda), Ranks()
    ranks.all_reduce(tensor)
    ranks.broadcast(tensor)
    assert ranks.all_gather(tensor).device == cuda
