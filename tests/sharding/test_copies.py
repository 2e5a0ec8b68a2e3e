"""Further copies of a parameter are written with it, or not at all; lent parameters get their own values back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_moeedit.sharding.fingerprint import Part
from lit_moeedit.sharding.lending import exchanged, lent
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from tests.sharding.whole_weights import EXPERTS, some_deltas, weight


def made() -> tuple[nn.Parameter, list[nn.Parameter]]:
    """A parameter, and two copies of it in other precisions and with other values."""
    own = weight()
    return own, [nn.Parameter(own.detach().to(dtype) * 1.5) for dtype in (torch.float64, torch.bfloat16)]


@pytest.mark.parametrize("reset_moments", [False, True])
def test_copies_get_the_same_change(reset_moments: bool) -> None:
    (own, copies), deltas = made(), some_deltas()
    before = [tensor.detach().clone() for tensor in (own, *copies)]
    with Transaction(reset_moments=reset_moments, copies={own: copies}) as transaction:
        transaction.commit(own, deltas)
        transaction.commit(own, deltas)
        assert transaction.touched == 2
    for tensor, old in zip((own, *copies), before, strict=True):
        for expert in range(EXPERTS):
            expected = old[expert].double()
            for _ in range(2):
                expected = (expected + deltas.dense(expert)).to(old.dtype).double()
            # float64 sums are not rounded, the others once in each commit
            assert torch.allclose(tensor[expert].double(), expected, rtol=1e-2 if old.dtype == torch.bfloat16 else 1e-6)


def test_a_rollback_puts_copies_back_bit_by_bit() -> None:
    (own, copies), deltas = made(), some_deltas()
    before = [tensor.detach().clone() for tensor in (own, *copies)]
    with Transaction(copies={own: copies}) as transaction:
        transaction.commit(own, deltas)
        transaction.commit(own, deltas)
        transaction.rollback()
    assert all(torch.equal(tensor, old) for tensor, old in zip((own, *copies), before, strict=True))
    with pytest.raises(KeyboardInterrupt), Transaction(copies={own: copies}) as transaction:
        transaction.commit(own, deltas)
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, old) for tensor, old in zip((own, *copies), before, strict=True))


def test_a_copy_that_does_not_become_finite_undoes_all() -> None:
    own, _ = made()
    small = nn.Parameter(torch.full_like(own, 6e4, dtype=torch.float16))
    deltas = some_deltas(scale=1e4)
    before = own.detach().clone()
    with Transaction(copies={own: [small]}) as transaction:
        with pytest.raises(FloatingPointError, match=r"not finite in torch\.float16"):
            transaction.commit(own, deltas)
        assert torch.equal(own, before) and bool((small == 6e4).all()) and transaction.touched == 0


def test_lent_values_are_given_back_with_what_was_written_to_them() -> None:
    own, other = nn.Parameter(torch.randn(3, dtype=torch.bfloat16)), torch.randn(3)
    before, shown = own.detach().clone(), other.clone()
    with pytest.raises(ValueError, match="broken off"), lent([own], [other]) as kept:
        assert torch.equal(own, other.bfloat16())
        kept[0][0] = 7.0
        raise ValueError("broken off")
    assert own.tolist() == [7.0, *before[1:].tolist()] and torch.equal(other, shown)


def test_an_interrupt_while_values_are_lent_or_given_back_loses_nothing() -> None:
    class Interrupting(torch.Tensor):
        left = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is torch.Tensor.copy_:
                Interrupting.left -= 1
                if Interrupting.left == 0:
                    raise KeyboardInterrupt
            return super().__torch_function__(function, types, args, kwargs or {})

    for at in range(1, 5):  # two copies when they are lent, two when they are given back
        own = [torch.ones(2).as_subclass(Interrupting), torch.ones(2).as_subclass(Interrupting)]
        Interrupting.left = at
        with pytest.raises(KeyboardInterrupt), lent(own, [torch.zeros(2), torch.zeros(2)]):
            assert not any(bool(tensor.any()) for tensor in own)
        assert Interrupting.left <= 0
        assert all(bool((tensor == 1).all()) for tensor in own)


def test_an_interrupt_while_values_are_exchanged_loses_nothing() -> None:
    class Interrupting(torch.Tensor):
        left = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is torch.Tensor.copy_:
                Interrupting.left -= 1
                if Interrupting.left == 0:
                    raise KeyboardInterrupt
            return super().__torch_function__(function, types, args, kwargs or {})

    values = {name: Part.of(torch.zeros(2)) for name in "ab"}
    for at in range(1, 5):  # two copies when they are exchanged, two when they are given back
        own = {name: torch.ones(2).as_subclass(Interrupting) for name in "ab"}
        Interrupting.left = at
        with pytest.raises(KeyboardInterrupt), exchanged(own, values, Ranks()) as movement:
            assert not any(bool(tensor.any()) for tensor in own.values())
            assert (movement.elements, movement.distance, movement.norm) == (4, 2.0, 0.0)
        assert Interrupting.left <= 0
        assert all(bool((tensor == 1).all()) for tensor in own.values())


def test_exchanged_values_are_rounded_read_one_by_one_and_compared() -> None:
    tensors = {"a": nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.bfloat16)), "b": torch.tensor([[0.0], [2.0]])}
    read: list[str] = []

    class Values(dict[str, Part]):
        def __getitem__(self, name: str) -> Part:
            # the one before has been written already
            assert all(not bool(tensors[other].any()) for other in read)
            read.append(name)
            return super().__getitem__(name)

    values = Values(a=Part.of(torch.full((2,), 1e-45)), b=Part.of(torch.zeros(2, 1)))
    with exchanged(tensors, values, Ranks()) as movement:
        assert read == ["a", "b"] and not any(bool(tensor.any()) for tensor in tensors.values())
    assert movement.distance == pytest.approx(29**0.5) and movement.relative == float("inf")
    assert tensors["a"].tolist() == [3.0, 4.0] and tensors["b"].tolist() == [[0.0], [2.0]]
    with (
        pytest.raises(ValueError, match=r"b has the shape \[2, 1\], and \[2\] in the other"),
        exchanged(tensors, {"a": Part.of(torch.zeros(2)), "b": Part.of(torch.zeros(2))}, Ranks()),
    ):
        pass
    assert tensors["a"].tolist() == [3.0, 4.0]
    halved = {"a": Part.of(torch.tensor([1.5, 2.0]))}
    with exchanged({"a": tensors["a"]}, halved, Ranks()) as movement:
        assert movement.relative == 1.0
