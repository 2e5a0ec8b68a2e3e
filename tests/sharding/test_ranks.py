"""Ranks share work in rounds, and fail together."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lit_moeedit.sharding.expert_reader import ExpertReader
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.sharding.transaction import Transaction
from tests.processes import run_each, run_ranks, start_ranks


def test_one_process_alone_does_everything() -> None:
    ranks = Ranks()
    assert list(ranks.shard([1, 2, 3])) == [(1, True), (2, True), (3, True)]
    tensor = torch.arange(3)
    ranks.all_reduce(tensor)
    ranks.broadcast(tensor)
    assert ranks.all_gather(tensor).tolist() == [0, 1, 2]
    assert ranks.any(True)
    assert not ranks.any(False)
    with pytest.raises(KeyError, match="a"), ranks.together():
        raise KeyError("a")


def sharing() -> dict[str, object]:
    ranks = Ranks()
    summed, equal = torch.tensor([1.0 + ranks.rank]), torch.tensor([ranks.rank, 7])
    ranks.all_reduce(summed)
    ranks.broadcast(equal)
    own = torch.full((2 * ranks.rank, 3), ranks.rank, dtype=torch.bfloat16)
    return {
        "dealt": list(ranks.shard(list("abcde"))),
        "few": list(ranks.shard(["a"])),
        "none": list(ranks.shard([])),
        "sum": summed.item(),
        "equal": equal.tolist(),
        "concatenated": ranks.all_gather(own),
        "empty": ranks.all_gather(torch.empty(0, 4)),
        "any": (ranks.any(ranks.rank == 1), ranks.any(False)),
    }


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_sharing(size: int) -> None:
    found = run_ranks(sharing, size)
    rounds = {len(result["dealt"]) for result in found}
    assert rounds == {-(-5 // size)}
    assert sorted(batch for result in found for batch, mine in result["dealt"] if mine) == list("abcde")
    assert [result["few"] for result in found] == [[("a", rank == 0)] for rank in range(size)]
    expected = torch.cat([torch.full((2 * rank, 3), rank, dtype=torch.bfloat16) for rank in range(size)])
    for result in found:
        assert result["none"] == []
        assert result["sum"] == sum(1 + rank for rank in range(size))
        assert result["equal"] == [0, 7]
        assert torch.equal(result["concatenated"], expected)
        assert result["empty"].shape == (0, 4)
        assert result["any"] == (True, False)


def default_arguments() -> tuple[int, int, bool]:
    none = dist.get_pg_count()
    first, groups = Ranks.current(), dist.get_pg_count()
    used = [ExpertReader(nn.Parameter(torch.zeros(2, 3, 4))).ranks, Transaction().ranks, Ranks.current()]
    unchanged = dist.get_pg_count()
    made = Ranks()
    assert dist.get_pg_count() - unchanged == groups - none
    dist.barrier()  # a rank that ends takes the store away from one that still makes its group
    return groups, unchanged, all(ranks is first for ranks in used) and Ranks.current() is made


def test_default_arguments_make_no_group_where_there_is_one() -> None:
    for before, after, same in run_ranks(default_arguments, 2):
        assert before == after
        assert same
    assert Ranks.current() is not Ranks.current()


def failing_in_a_round(at: int) -> str:
    ranks = Ranks()
    try:
        with ranks.together():  # and within another one: each failure is told once
            for number, _ in enumerate(ranks.shard(range(8))):
                with ranks.together():
                    if ranks.rank == 1 and number == at:
                        raise ValueError("no such text")
        ranks.check_same("texts", [])
    except (ValueError, RankError) as error:
        # they still understand each other
        return f"{type(error).__name__}: {error} {ranks.any(ranks.rank == 0)}"
    return "nothing failed"


def failing_between_rounds(at: int) -> str:
    ranks = Ranks()
    try:
        with ranks.together():
            for number, _ in enumerate(ranks.shard(range(8))):
                if ranks.rank == 1 and number == at:
                    raise ValueError("no such text")
    except (ValueError, RankError) as error:
        return f"{type(error).__name__}: {error} {ranks.any(ranks.rank == 0)}"
    return "nothing failed"


FAILING = [failing_in_a_round, failing_between_rounds]


@pytest.mark.parametrize("function", FAILING)
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_failure_on_one_rank_is_one_on_all(
    two: dict[str, list[str]], function: Callable[[int], str], at: int
) -> None:
    first, second = two[f"{function.__name__} {at}"]
    assert first == "RankError: rank 1 failed: ValueError: no such text True"
    assert second == "ValueError: no such text True"


def different() -> str:
    ranks = Ranks()
    ranks.check_same("the facts", ["a", "b"])
    try:
        ranks.check_same("the facts", ["a", str(ranks.rank)])
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_different_texts_are_told_so(two: dict[str, Any]) -> None:
    assert all("the facts must be the same on all ranks" in message for message in two["different"])


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    """What the functions of this file said on two ranks."""
    calls = {f"{function.__name__} {at}": (function, at) for function in FAILING for at in (0, 2, 3)}
    return run_each({**calls, "different": (different,)}, 2)


def absent() -> float:
    ranks = Ranks(timeout=timedelta(seconds=1))
    if ranks.rank == 1:
        time.sleep(5)  # as if stuck
    start = time.monotonic()
    try:
        ranks.check_errors()
    except RuntimeError:
        return time.monotonic() - start
    return 0.0


def test_waiting_is_bounded() -> None:
    first = start_ranks(absent, 2)[0]
    assert first.error is None
    assert 0.5 < first.value < 4.5
