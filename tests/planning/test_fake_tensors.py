"""Tensors without numbers, and counting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_moeedit.planning import CostCounter, FakeFloatMode
from lit_moeedit.planning.fake_tensors import LARGEST

HUGE = 1 << 40


def test_numbers_are_missing_where_they_are_floats_only() -> None:
    with FakeFloatMode():
        hidden = torch.rand(HUGE, 8)[:100]
        layer = nn.Linear(8, 4)
        assert layer(hidden).shape == (100, 4)
        index = torch.tensor([3, 1, 2]).sort().values
        assert index.tolist() == [1, 2, 3] and hidden[index].shape == (3, 8)
        mask = torch.arange(100) % 3 == 0
        assert hidden[mask].shape == (34, 8) and int(mask.sum()) == 34
        padded = torch.zeros(HUGE, dtype=torch.long)  # too many to be real
        assert padded.shape == (HUGE,)


def test_questions_get_answers_that_lead_on() -> None:
    with FakeFloatMode():
        values = torch.rand(50, 7)
        assert bool(values.isfinite().all()) and not bool(values.isnan().any()) and not bool(values.isinf().any())
        assert float(values.sum()) == 1.0 and bool((values > 3).all()) and torch.equal(values, values)
        factor, failed = torch.linalg.cholesky_ex(values.T @ values)
        assert factor.shape == (7, 7) and not int(failed)
        assert torch.where(values > 0, values, 0.0).shape == (50, 7)


@pytest.mark.parametrize("size", [8, LARGEST + 1])
def test_all_elements_of_a_comparison_are_equal_also_where_it_is_fake(size: int) -> None:
    with FakeFloatMode():
        values = torch.rand(2, size)
        assert (values == values.clone()).view(torch.uint8).amin(1).tolist() == [1, 1]


def test_choices_are_distinct_and_spread() -> None:
    with FakeFloatMode():
        chosen = torch.rand(4000, 8).topk(3).indices
        assert chosen.shape == (4000, 3) and torch.rand(5, 8).argmax(-1).shape == (5,)
        # every other token, as with prompts of two tokens
        counts = torch.bincount(chosen[::2].flatten(), minlength=8)
    assert all(len(set(row)) == 3 for row in chosen.tolist())
    assert counts.min() > 0.8 * counts.max()


def test_gradients_have_shapes() -> None:
    with FakeFloatMode():
        weight = nn.Parameter(torch.zeros(6, 5))
        (torch.rand(3, 5) @ weight.T).softmax(-1).sum().backward()
        assert weight.grad is not None and weight.grad.shape == (6, 5)


@pytest.mark.parametrize("numbers", [True, False])
def test_a_counter_counts_what_is_alive_and_its_products(numbers: bool) -> None:
    def run() -> None:
        weight = torch.ones(8, 8)
        with CostCounter([weight], held=1000) as counter:
            assert weight.T.shape == (8, 8) and counter.alive == 1000  # a view has the storage of what it is of
            with counter.phase("product"):
                product = weight @ weight
                assert (counter.alive, counter.flops) == (1256, 2 * 8**3)
                sums = product.sum(0)
                del product
                assert counter.alive == 1032
                torch.empty(3, device="meta")
        del sums
        assert counter.alive == 1000
        cost = counter.phases["product"]
        assert (cost.held, cost.peak, cost.flops, cost.sent) == (1000, 1288, 1024, 0)

    if numbers:
        run()
    else:
        with FakeFloatMode():
            run()


def test_parts_of_a_phase_are_added_up() -> None:
    kept: list[Tensor] = []
    with CostCounter() as counter:
        for size in (2, 8, 4):
            with counter.phase("sums"), counter.repeated(3):
                counter.send(size)
                kept.append(torch.ones(size, size) @ torch.ones(size, size))
        with counter.phase("sums"), counter.repeated(0):  # counts for nothing
            counter.send(100)
            torch.ones(64, 64) @ torch.ones(64, 64)
    cost = counter.phases["sums"]
    assert cost.sent == 3 * 14 and cost.flops == 3 * 2 * (8 + 512 + 64)
    # memory is that of the part with the highest peak: two factors and the product, beside the first
    assert (cost.held, cost.peak) == (16, 16 + 3 * 256)


def test_copies_for_the_cpu_are_in_main_memory() -> None:
    weight = torch.ones(10)
    for on_cpu, expected in ((True, (40, 0)), (False, (0, 40))):
        with CostCounter([weight], on_cpu=on_cpu) as counter:
            saved = weight.to("cpu", copy=True)
            assert (counter.alive, counter.host) == expected
            del saved
    with CostCounter(on_cpu=False) as counter, counter.phase("sums"):
        sums = torch.zeros(10)
        counter.offload(sums.nbytes)
    assert (counter.phases["sums"].peak, counter.phases["sums"].host) == (0, 40)
