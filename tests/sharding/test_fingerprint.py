"""Fingerprints: no change of a number gets lost, and it does not matter who holds which part of a tensor."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_moeedit.editing import second_moments
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation.moments_cache import MomentsCache
from lit_moeedit.sharding import fingerprint
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks
from tests.processes import run_ranks
from tests.sharding.looking import counted
from tests.sharding.small_edits import TEXTS, model, prepared, tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def of(tensor: torch.Tensor) -> str:
    return fingerprints({"x": tensor}, Ranks())["x"]


@settings(derandomize=True, max_examples=40)
@given(size=st.integers(1, 70), places=st.tuples(st.integers(0, 69), st.integers(0, 69)), dtype=st.sampled_from(DTYPES))
def test_every_number_and_its_place_count(size: int, places: tuple[int, int], dtype: torch.dtype) -> None:
    numbers = (torch.arange(size) % 2 if dtype is torch.bool else torch.arange(size)).to(dtype)
    one, two = (place % size for place in places)
    changed, swapped = numbers.clone(), numbers.clone()
    changed[one] = ~changed[one] if dtype is torch.bool else -1
    swapped[[one, two]] = numbers[[two, one]]
    assert of(numbers.clone()) == of(numbers)
    assert of(changed) != of(numbers)
    assert (of(swapped) == of(numbers)) == bool(numbers[one] == numbers[two])


@settings(derandomize=True, max_examples=40)
@given(size=st.integers(0, 50), cuts=st.lists(st.integers(0, 50), max_size=3))
def test_sums_of_parts_are_that_of_the_whole(size: int, cuts: list[int]) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "BLOCK", 16)
        weights = fingerprint._weights(16, numbers.device)
        parts = sum(fingerprint._sum(numbers[a:b], a, weights) for a, b in itertools.pairwise(edges))
        assert int(parts) == int(fingerprint._sum(numbers, 0, weights))


@settings(derandomize=True, max_examples=40)
@given(start=st.integers(0, 40), size=st.integers(0, 200), dtype=st.sampled_from(DTYPES), many=st.integers(2, 5))
def test_many_blocks_at_once_are_summed_as_one_by_one(start: int, size: int, dtype: torch.dtype, many: int) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size)).mul(100).to(dtype)
    sums = []
    for blocks in ({"cpu": 1}, {"cpu": many}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fingerprint, "BLOCK", 16)
            patch.setattr(fingerprint, "BLOCKS", blocks)
            sums.append(int(fingerprint._sum(numbers, start, fingerprint._weights(16, numbers.device))))
    assert sums[0] == sums[1]
    # the definition, in whole numbers
    signed = numbers.view(fingerprint._BITS[numbers.element_size()]).tolist()
    weights = fingerprint._weights(16, numbers.device).tolist()
    places = range(start, start + size)
    factors = [(p // 16 * 0x5851F42D4C957F2D % 2**63) | 1 for p in places]
    wanted = sum(n * weights[p % 16] * factor for n, p, factor in zip(signed, places, factors, strict=True))
    assert (sums[0] - wanted) % 2**64 == 0


@pytest.mark.parametrize("blocks", [1, 128])
def test_fingerprints_stay_what_they_were(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """They are kept in files, so they must be those of the first version."""
    monkeypatch.setattr(fingerprint, "BLOCKS", {"cpu": blocks})
    assert of(torch.arange(10.0)) == "[10] torch.float32 4de1c4e69a300000"
    assert of((torch.arange(3 * 2**18 + 5) * 37).to(torch.int32)) == "[786437] torch.int32 -3ee77f2470dd689e"
    assert of(torch.arange(2**18 + 9).bfloat16()) == "[262153] torch.bfloat16 52dfd341a4662c9c"


def test_the_device_is_waited_for_once() -> None:
    tensors = {f"{i}": torch.randn(3 + i) for i in range(20)}
    with counted() as operations:
        fingerprints(tensors, Ranks())
    assert operations.waited == {"tolist": 1}
    assert operations.started["aten.copy_"] == 0  # of a single sum to main memory


def test_shape_and_dtype_count() -> None:
    zeros = torch.zeros(2, 3)
    assert len({of(zeros), of(zeros.T), of(zeros.bfloat16()), of(torch.zeros(6)), of(torch.zeros(7))}) == 5
    assert of(zeros.T) == of(torch.zeros(3, 2))


class BrokenOffError(Exception):
    pass


def moments(whole: Any, folder: str, ranks: Ranks, stop_after: int = 1000) -> tuple[dict[str, torch.Tensor], int]:
    """Sums of layers 0 and 1, and the number of rounds that it took; broken off on the last rank after some."""
    rounds: list[int] = []

    def look(done: int, total: int) -> None:
        rounds.append(done)
        if len(rounds) > stop_after and ranks.rank == ranks.size - 1:
            raise BrokenOffError

    layers = [expert_layers(whole)[i] for i in (0, 1)]
    cache = MomentsCache(folder, save_every=0.0)
    found = second_moments(whole, tokenizer(), layers, TEXTS * 2, 12, progress=look, ranks=ranks, cache=cache)
    return {f"{i}.{name}": x for i, part in found.items() for name, x in part.tensors().items()}, len(rounds)


def sharded(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ranks = Ranks()
    for kind in ("replicated", "zero 3"):
        whole, _, _ = prepared(kind)
        found[f"fingerprints, {kind}"] = fingerprints(dict(whole.named_parameters()), ranks)
        try:
            with ranks.together():
                moments(whole, f"{folder}/{kind}", ranks, stop_after=1)
        except Exception as error:
            found[f"broken off, {kind}"] = f"{type(error).__name__}: {error}"
        found[f"resumed, {kind}"] = moments(whole, f"{folder}/{kind}", ranks)
        found[f"found again, {kind}"] = moments(whole, f"{folder}/{kind}", ranks)
    return found


@pytest.mark.deepspeed
def test_ranks_share_a_cache_that_one_of_them_writes(tmp_path: Path) -> None:
    first, second = run_ranks(sharded, 2, str(tmp_path))
    alone, rounds = moments(model(), str(tmp_path / "alone"), Ranks())
    expected = fingerprints(dict(model().named_parameters()), Ranks())
    for kind in ("replicated", "zero 3"):
        assert first[f"fingerprints, {kind}"] == second[f"fingerprints, {kind}"] == expected
        assert "BrokenOffError" in second[f"broken off, {kind}"]
        assert "rank 1 failed: BrokenOffError" in first[f"broken off, {kind}"]
        for name in ("resumed", "found again"):
            for tensor, value in alone.items():
                assert torch.equal(first[f"{name}, {kind}"][0][tensor], second[f"{name}, {kind}"][0][tensor])
                # float32, batches added up in another order
                torch.testing.assert_close(first[f"{name}, {kind}"][0][tensor], value, rtol=1e-4, atol=1e-4)
        assert first[f"resumed, {kind}"][1] == -(-rounds // 2) - 1  # one round was saved
        assert first[f"found again, {kind}"][1] == 0
        assert len(list((tmp_path / kind).iterdir())) == 2
        # one process finds what two have written
        again, rounds_again = moments(model(), str(tmp_path / kind), Ranks())
        assert rounds_again == 0
        assert all(torch.equal(again[name], first[f"resumed, {kind}"][0][name]) for name in again)


def test_copies_in_two_dtypes_agree_after_rounding() -> None:
    single = torch.randn(300, generator=torch.Generator().manual_seed(0))
    half = single.bfloat16()
    rounded = [fingerprints({"x": x}, Ranks(), rounded_to=torch.bfloat16)["x"] for x in (single, half, half.float())]
    assert len(set(rounded)) == 1 and rounded[0] == of(half)
    assert len({of(single), of(half), of(half.float())}) == 3
