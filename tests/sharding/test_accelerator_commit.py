"""Commits as they are made on GPUs, here on a CPU: several experts at once, and one look at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_moeedit.sharding import commit as module
from lit_moeedit.sharding import rollback
from lit_moeedit.sharding.backends import Backend, extra_backend
from lit_moeedit.sharding.shards import Copy, Shard
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas
from tests.interrupting import Interrupts, spread
from tests.sharding.looking import Operations, counted, peak_memory

D_MODEL, D_HIDDEN = 6, 4
SIZE = D_MODEL * D_HIDDEN
HALVES = [torch.float16, torch.bfloat16]


class Carried(Backend):
    """Finds the shards that parameters carry themselves."""

    def shard(self, weight: Any, optimizers: Any) -> Shard | None:
        return getattr(weight, "shard", None)


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is no device that is known, three experts fill a block, and a backend knows what :class:`Held` holds."""
    monkeypatch.setattr(module, "BLOCK", {})
    monkeypatch.setattr(module, "LARGE_BLOCK", 3 * SIZE)
    with extra_backend(Carried()):
        yield


def some_deltas(experts: int = 8, scale: float = 0.1, seed: int = 0, d_model: int = D_MODEL) -> ExpertDeltas:
    """Deltas of all experts but the second, with one term or up to 12."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor([j for j in range(experts) for _ in range(1 + 11 * (j == 4)) if j != 1])
    index = index[torch.randperm(len(index), generator=generator)]
    return ExpertDeltas(
        index,
        torch.arange(len(index)) % 3,
        scale * torch.randn(3, d_model, generator=generator),
        torch.randn(len(index), D_HIDDEN, generator=generator),
        experts,
    )


class Held:
    """A parameter as one rank holds it: whole or a part, with a master copy and moments or without."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        start: int = 0,
        stop: int | None = None,
        master: bool = False,
        transposed: bool = False,
        experts: int = 8,
        d_model: int = D_MODEL,
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = (experts, D_HIDDEN, d_model) if transposed else (experts, d_model, D_HIDDEN)
        self.start, self.shape, self.master = start, shape, None
        numbers = torch.randn(shape, generator=generator).view(-1)[start:stop].contiguous()
        numbers[0] = -0.0
        self.weight: Any = nn.Parameter(torch.empty(0))
        self.model = numbers.to(dtype)
        self.moments = [torch.randn(len(numbers), generator=generator) for _ in range(2)] if master else []
        model = Copy(start, lambda: self.model)
        parts: dict[str, Any] = {"master": model}
        if master:
            self.master = master_weights = numbers.clone()
            parts = {"master": Copy(start, lambda: master_weights), "model": model}
            parts["moments"] = [Copy(start, lambda m=m: m) for m in self.moments]
        size = torch.Size(shape)
        self.weight.shard = Shard(size, dtype, start, start + len(numbers), **parts)

    def tensors(self) -> list[Tensor]:
        return [self.model, *([] if self.master is None else [self.master]), *self.moments]

    def bits(self) -> list[bytes]:
        return [tensor.view(torch.uint8).numpy().tobytes() for tensor in self.tensors()]

    def expected(self, deltas: ExpertDeltas, transposed: bool = False) -> tuple[Tensor, Tensor]:
        """What this rank's part is to become, and its change, in float64."""
        change = torch.stack([deltas.dense(j).double() for j in range(self.shape[0])])
        change = (change.mT if transposed else change).reshape(-1)[self.start :][: len(self.model)]
        return (self.model if self.master is None else self.master).double() + change, change


CASES = [
    {"dtype": torch.float32},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "master": True},
    {"dtype": torch.float32, "start": 17, "stop": 150},
    {"dtype": torch.bfloat16, "start": 17, "stop": 150, "master": True},
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_become_those_of_float64(case: dict[str, Any], transposed: bool) -> None:
    held, deltas = Held(**case, transposed=transposed), some_deltas()
    before = held.model.clone()
    wanted, change = held.expected(deltas, transposed)
    old = wanted - change
    with Transaction() as transaction:
        ratio = transaction.commit(held.weight, deltas, transposed)
    # a sum of 12 products, in float32
    exact = {"rtol": 1e-5, "atol": 1e-6}
    if held.master is not None:
        torch.testing.assert_close(held.master.double(), wanted, **exact)
        assert torch.equal(held.model, held.master.to(held.model.dtype))
    # two bfloat16 next to each other differ by at most 2⁻⁷
    close = exact if held.model.dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.0}
    torch.testing.assert_close(held.model.double(), wanted.to(held.model.dtype).double(), **close)
    unchanged = slice(max(0, SIZE - held.start), 2 * SIZE - held.start)
    assert torch.equal(held.model[unchanged], before[unchanged])
    edited = torch.ones(len(old), dtype=torch.bool)
    edited[unchanged] = False
    assert ratio == pytest.approx(float(change.norm() / old[edited].norm()), rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_second_way_gives_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    """As on CPUs: an expert after the other, in small blocks."""
    fast, slow = Held(**case), Held(**case)
    with Transaction() as transaction:
        transaction.commit(fast.weight, some_deltas())
        monkeypatch.setattr(module, "BLOCK", {"cpu": 7})
        transaction.commit(slow.weight, some_deltas())
    close = {"rtol": 2**-7, "atol": 0.0} if fast.model.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(fast.model, slow.model, **close)


# -- all or nothing ---------------------------------------------------------------------------------------------------


def stores() -> Iterator[Any]:
    for kind in ("device", "pinned", "pageable", "device that fills up"):
        yield pytest.param(kind, id=kind)


@pytest.fixture(params=stores())
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where copies are kept."""
    kind: str = request.param
    select, selected = rollback.select, []
    if kind.startswith("device"):
        monkeypatch.setattr(rollback, "free_memory", lambda device: 2**60)
    if kind != "pageable":
        monkeypatch.setattr(rollback, "pinned_like", torch.empty_like)

    def full(numbers: Tensor, rows: Tensor | None) -> Tensor:
        selected.append(1)
        if len(selected) == 3:
            raise torch.OutOfMemoryError("no room")
        return select(numbers, rows)

    if kind == "device that fills up":
        monkeypatch.setattr(rollback, "select", full)
    return kind


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rollback_is_bit_identical(store: str, case: dict[str, Any]) -> None:
    one, other = Held(**case), Held(**case, transposed=True)
    before = one.bits(), other.bits()
    with Transaction(reset_moments=True) as transaction:
        for seed in range(3):
            transaction.commit(one.weight, some_deltas(seed=seed, scale=10.0**seed))
            transaction.commit(other.weight, some_deltas(seed=seed), transposed=True)
        assert one.bits()[0] != before[0][0] and other.bits()[0] != before[1][0]
        assert all(not moment[2 * SIZE : 3 * SIZE].any() for moment in one.moments)
        transaction.rollback()
        assert (one.bits(), other.bits()) == before
        assert transaction.touched == 0


@pytest.mark.parametrize("case", [case for case in CASES if case["dtype"] == torch.bfloat16], ids=str)
def test_an_overflow_in_the_last_expert_leaves_all_bits(store: str, case: dict[str, Any]) -> None:
    for dtype, scale in ((torch.float16, 1e6), (torch.bfloat16, 1e38)):
        held, deltas = Held(**{**case, "dtype": dtype}), some_deltas()
        last = (held.start + len(held.model) - 1) // SIZE
        right = deltas.right.clone()
        right[deltas.expert_index == last] *= scale
        right[deltas.expert_index == last] += scale
        left = deltas.left.sign() * 30  # so that only the last expert's numbers are too large
        large = ExpertDeltas(deltas.expert_index, deltas.row_index, left, right, 8)
        assert large.is_finite()
        before = held.bits()
        with Transaction() as transaction:
            transaction.commit(held.weight, some_deltas(seed=1))
            middle = held.bits()
            with pytest.raises(FloatingPointError, match=rf"weights of expert {last} are not finite in {dtype}"):
                transaction.commit(held.weight, large)
            assert held.bits() == middle
            transaction.rollback()
        assert held.bits() == before


def test_a_delta_that_is_no_number_leaves_all_bits(store: str) -> None:
    held, deltas = Held(torch.bfloat16, master=True), some_deltas()
    right, before = deltas.right.clone(), held.bits()
    right[deltas.expert_index.argmax(), -1] = torch.nan
    with Transaction() as transaction, pytest.raises(FloatingPointError, match="a delta has values that are not"):
        transaction.commit(held.weight, deltas.with_right(right))
    assert held.bits() == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_that_are_no_numbers_are_refused(store: str, case: dict[str, Any]) -> None:
    held = Held(**case)
    for tensor in held.tensors()[:2]:
        tensor[-1] = torch.nan
    last, before = (held.start + len(held.model) - 1) // SIZE, held.bits()
    with Transaction() as transaction, pytest.raises(FloatingPointError, match=f"weights of expert {last} are"):
        transaction.commit(held.weight, some_deltas())
    assert held.bits() == before


@pytest.mark.parametrize("case", [case for case in CASES if "master" in case], ids=str)
def test_a_master_copy_of_other_weights_is_refused(store: str, case: dict[str, Any]) -> None:
    held = Held(**case)
    held.model[-1] += 1
    last, before = (held.start + len(held.model) - 1) // SIZE, held.bits()
    with (
        Transaction() as transaction,
        pytest.raises(RuntimeError, match=f"master weights of expert {last} are not those"),
    ):
        transaction.commit(held.weight, some_deltas())
    assert held.bits() == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_memory_anywhere_leaves_all_bits(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> None:
    held, copy, copied = Held(**case), rollback.Store._copy_to_host, []
    before = held.bits()

    def full(self: rollback.Store, *args: Any) -> Tensor:
        copied.append(1)
        if len(copied) == (8 if "master" in case else 4):
            raise torch.OutOfMemoryError("no room")
        return copy(self, *args)

    monkeypatch.setattr(rollback.Store, "_copy_to_host", full)
    experts = []
    change = module.Checks.change
    monkeypatch.setattr(module.Checks, "change", lambda self, *args: (experts.append(args[0]), change(self, *args)))
    with Transaction(reset_moments=True) as transaction, pytest.raises(torch.OutOfMemoryError, match="no room"):
        transaction.commit(held.weight, some_deltas(experts=16 if "stop" not in case else 8))
    assert experts  # there was something to undo
    assert held.bits() == before


# -- how much is asked of the device ----------------------------------------------------------------------------------


def operations(monkeypatch: pytest.MonkeyPatch, held: Held, experts: int) -> Operations:
    monkeypatch.setattr(module, "LARGE_BLOCK", 21 * SIZE)
    deltas = some_deltas(experts)
    with Transaction() as transaction, counted() as found:
        transaction.commit(held.weight, deltas)
    return found


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("master", [False, True])
def test_a_layer_of_128_experts_takes_few_operations(monkeypatch: pytest.MonkeyPatch, master: bool, near: bool) -> None:
    monkeypatch.setattr(rollback, "free_memory", lambda device: 2**60 if near else 0)
    found = operations(monkeypatch, Held(torch.bfloat16, master=master, experts=128), 128)
    assert found.started["aten.bmm"] == 7  # one for each block of 21 experts
    # and for copies beside the device one for each expert and kind of weight
    assert found.started.total() <= 250 + (0 if near else 128 * (1 + master))


@pytest.mark.parametrize("case", [{}, {"master": True}, {"start": 5}, {"start": 5, "master": True}], ids=str)
def test_the_device_is_waited_for_a_few_times_whatever_there_is_to_do(
    monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    few, many = (operations(monkeypatch, Held(torch.bfloat16, **case, experts=n), n) for n in (8, 128))
    assert few.started.total() < many.started.total()
    assert few.waited == many.waited
    # one look at the factors, one or two at the weights, one at the norms; two to group the terms by experts, where
    # nobody has asked for that before, and two to sort them into batches
    assert many.waited.total() <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_besides_the_copies_does_not_grow_with_the_layer(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    d_model, most = 1000, 2**16
    monkeypatch.setattr(module, "LARGE_BLOCK", most)
    for experts in (64, 256):
        held = Held(dtype, experts=experts, d_model=d_model)
        deltas = some_deltas(experts, d_model=d_model)
        with Transaction() as transaction, torch.profiler.profile(profile_memory=True) as profile:
            transaction.commit(held.weight, deltas)
        copies = (experts - 1) * d_model * D_HIDDEN * dtype.itemsize
        factors = deltas.left.nbytes + 2 * deltas.right.nbytes
        # 16 bytes for each number of a block, and the indices of the terms
        assert copies < peak_memory(profile) <= copies + 16 * most + factors + 1000 * experts


# -- interrupts -------------------------------------------------------------------------------------------------------

TRACED = ("lit_moeedit/sharding/", "lit_moeedit/interrupts.py")


def interrupted(held: Held, lines: tuple[int, ...], fails: bool) -> Interrupts:
    """Commit twice, the second time maybe more than bfloat16 holds, and undo it by a guard; interrupted on the way."""

    def commits() -> None:
        with Transaction(reset_moments=True) as transaction:
            transaction.commit(held.weight, some_deltas(seed=1))
            transaction.commit(held.weight, some_deltas(seed=2, scale=3e38 if fails else 0.1))
            transaction.rollback()

    interrupts = Interrupts(TRACED, *lines)
    with suppress(FloatingPointError):
        interrupts.run(commits)
    return interrupts


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_at_any_line_leaves_all_bits(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setattr(rollback, "free_memory", lambda device: 2**60)
    case: dict[str, Any] = {"dtype": torch.bfloat16, "master": True}
    total = len(interrupted(Held(**case), (), fails).places)
    assert total > 200
    for line in spread(total, 40):
        held = Held(**case)
        before = held.bits()
        # a second one comes while the first is dealt with
        found = interrupted(held, (line, line + 9), fails)
        assert held.bits() == before, found.raised
