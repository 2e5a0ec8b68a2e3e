"""Copies for a rollback: where they go, and that they are copies wherever they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_moeedit.sharding import rollback
from lit_moeedit.sharding.rollback import RESERVE, Saved, Store, free_memory, pinned_like
from lit_moeedit.sharding.shards import Copy

CPU = torch.device("cpu")


class Places:
    """What a store asks for."""

    def __init__(self, patch: pytest.MonkeyPatch, free: int, can_pin: bool = True) -> None:
        self.free, self.near, self.pinned = free, 0, 0
        select = rollback.select

        def near(numbers: Tensor, rows: Tensor | None) -> Tensor:
            self.near += 1
            return select(numbers, rows)

        def pin(numbers: Tensor) -> Tensor | None:
            self.pinned += can_pin
            return torch.empty_like(numbers) if can_pin else None

        patch.setattr(rollback, "free_memory", lambda device: self.free)
        patch.setattr(rollback, "select", near)
        patch.setattr(rollback, "pinned_like", pin)


def test_main_memory_is_no_accelerator() -> None:
    assert free_memory(CPU) == 0
    assert pinned_like(torch.ones(3)) is None


def test_without_pinned_memory_copies_are_pageable() -> None:
    # this device has no numbers, and no memory can be pinned for it here
    assert torch.cuda.is_available() or pinned_like(torch.ones(3, device="meta")) is None


@pytest.mark.parametrize(("spare", "near"), [(0, 1), (-1, 0)])
def test_what_fits_beside_the_reserve_stays_on_the_device(
    monkeypatch: pytest.MonkeyPatch, spare: int, near: int
) -> None:
    places, store = Places(monkeypatch, RESERVE + 1000 + spare), Store()
    store.begin(CPU, 1000, 0)
    store.copy(torch.ones(250))
    assert (places.near, places.pinned) == (near, 1 - near)


def test_copies_of_all_commits_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the allocator takes them from what it held before, so that as much as before is free."""
    places, store = Places(monkeypatch, RESERVE + 1000), Store()
    for held, near in ((0, 1), (400, 2), (800, 2), (600, 3)):
        store.begin(CPU, 400, held)
        store.copy(torch.ones(100))
        assert places.near == near
    places.free = RESERVE + 399  # somebody else took the rest
    store.begin(CPU, 400, 0)
    store.copy(torch.ones(100))
    assert places.near == 3


def test_a_device_that_is_full_all_the_same_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    places, store, asked = Places(monkeypatch, 2**60), Store(), []

    def full(numbers: Tensor, rows: Tensor | None) -> Tensor:
        asked.append(1)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(rollback, "select", full)
    numbers = torch.randn(10)
    for _ in range(2):
        store.begin(CPU, 40, 0)
        assert torch.equal(store.copy(numbers), numbers)
    assert (len(asked), places.pinned) == (1, 2)


def test_not_everything_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    places, store = Places(monkeypatch, 0), Store()
    monkeypatch.setattr(rollback, "PINNED", 100)
    store.begin(CPU, 1, 0)
    for _ in range(3):
        store.copy(torch.ones(10))
    assert places.pinned == 2


@pytest.mark.parametrize("rows", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize(("free", "can_pin"), [(2**60, True), (0, True), (0, False)])
def test_a_copy_is_one(monkeypatch: pytest.MonkeyPatch, free: int, can_pin: bool, rows: Tensor | None) -> None:
    Places(monkeypatch, free, can_pin)
    store, numbers = Store(), torch.randn(3, 4)
    wanted = numbers.clone() if rows is None else numbers[rows]
    store.begin(CPU, 48, 0)
    copy = store.copy(numbers) if rows is None else store.copy_rows(numbers, rows, rows.tolist())
    numbers.zero_()
    for one, other in zip(copy, wanted, strict=True):
        assert torch.equal(one, other)


def test_saved_numbers_go_back_where_they_were() -> None:
    whole = torch.arange(10.0)
    parts: list[Tensor] = []

    def read() -> Tensor:  # as of an offloaded master: a copy, which has to be written
        return whole[2:].clone()

    saved = Saved(nn.Parameter(torch.zeros(0)))
    saved.add(Copy(2, read, lambda numbers: parts.append(numbers)), 5, torch.tensor([-0.0, 7.5]))
    assert saved.held(CPU) == 8 and saved.held(torch.device("meta")) == 0
    saved.restore()
    assert parts[0].tolist() == [2.0, 3.0, 4.0, -0.0, 7.5, 7.0, 8.0, 9.0]
    assert torch.signbit(parts[0][3])
