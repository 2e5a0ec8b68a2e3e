"""Changes of frozen weights are rounded once from their sum, whatever lies between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_moeedit.sharding.fingerprint import Part, fingerprints
from lit_moeedit.sharding.history import EditSum, History, missing
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

NAME = "experts.down_proj"
# large enough that five changes take less memory than a dense one
EXPERTS, D_MODEL, D_HIDDEN = 4, 12, 20


def frozen(dtype: torch.dtype = torch.bfloat16, transposed: bool = False) -> nn.Parameter:
    shape = (EXPERTS, D_HIDDEN, D_MODEL) if transposed else (EXPERTS, D_MODEL, D_HIDDEN)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(drawn.to(dtype), requires_grad=False)


def some_deltas(seed: int = 0, scale: float = 1.0) -> ExpertDeltas:
    """Deltas of experts 1 and 3, or of 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    return ExpertDeltas(
        torch.tensor([3, 1 + seed % 2, 3]),
        torch.tensor([0, 0, 1]),
        scale * torch.randn(2, D_MODEL, generator=generator),
        torch.randn(3, D_HIDDEN, generator=generator),
        EXPERTS,
    )


def commit(
    parameter: nn.Parameter, histories: dict[str, History], *deltas: ExpertDeltas, transposed: bool = False
) -> None:
    for change in deltas:
        with Transaction(histories=histories) as transaction:
            transaction.commit(parameter, change, transposed, NAME)
            transaction.keep()


def rounded(base: Tensor, *deltas: ExpertDeltas, transposed: bool = False) -> Tensor:
    """The definition: all changes in float64, then one rounding."""
    total = torch.zeros(EXPERTS, *deltas[0].shape, dtype=torch.float64)
    for change in deltas:
        wide = ExpertDeltas(change.expert_index, change.row_index, change.left.double(), change.right.double(), EXPERTS)
        total += torch.stack([wide.dense(expert) for expert in range(EXPERTS)])
    changed = {expert for change in deltas for expert in change.experts}
    total = base.double() + (total.mT if transposed else total)
    return torch.stack([total[j].to(base.dtype) if j in changed else base[j] for j in range(EXPERTS)])


@settings(deadline=None, max_examples=25)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    transposed=st.booleans(),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=20),
)
def test_changes_are_rounded_from_their_sum(dtype: torch.dtype, transposed: bool, seeds: list[int]) -> None:
    parameter, histories = frozen(dtype, transposed), {}
    base, changes = parameter.clone(), [some_deltas(seed, scale=0.03) for seed in seeds]
    commit(parameter, histories, *changes, transposed=transposed)
    assert torch.equal(parameter, rounded(base, *changes, transposed=transposed))
    (own,) = histories[NAME]
    assert own.base == fingerprints({"": base}, Ranks())[""]
    assert own.after[-1] == fingerprints({"": parameter}, Ranks())[""]


def test_eight_changes_lose_less_than_if_each_were_rounded() -> None:
    once, one_by_one, histories = frozen(), frozen().requires_grad_(True), {}
    base, changes = once.double(), [some_deltas(seed, scale=0.01) for seed in range(8)]
    commit(once, histories, *changes)
    commit(one_by_one, {}, *changes)
    exact = rounded(base, *changes)
    errors = [float((found.double() - exact).norm() / (exact - base).norm()) for found in (once, one_by_one)]
    assert errors[0] < errors[1] / 2  # of eight roundings, independent ones would add up to sqrt(8) = 2.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_deltas_at_once_are_those_one_by_one(dtype: torch.dtype) -> None:
    one, other, changes = frozen(dtype), frozen(dtype), [some_deltas(seed) for seed in range(3)]
    histories: dict[str, History] = {}
    commit(one, histories, *changes)
    with Transaction() as transaction:
        transaction.commit(other, changes)
        transaction.keep()
    assert torch.equal(one, other)
    assert [len(own.deltas) for own in histories[NAME]] == [3]


def test_a_change_that_is_undone_leaves_no_trace() -> None:
    parameter, histories = frozen(), {}
    commit(parameter, histories, some_deltas(1))
    before, known = parameter.clone(), dict(histories)
    for error in (None, RuntimeError("no")):
        with pytest.raises(RuntimeError), Transaction(histories=histories) as transaction:
            transaction.commit(parameter, some_deltas(2), name=NAME)
            assert not torch.equal(parameter, before) and histories != known
            if error is None:
                transaction.rollback()
                assert torch.equal(parameter, before) and histories == known
                raise RuntimeError
            raise error
        assert torch.equal(parameter, before) and histories == known
    with pytest.raises(FloatingPointError):
        commit(parameter, histories, some_deltas(scale=3e38))
    assert torch.equal(parameter, before) and histories == known
    commit(parameter, histories, some_deltas(2))
    assert len(histories[NAME][0].deltas) == 2


def test_other_weights_begin_another_history() -> None:
    parameter, histories = frozen(), {}
    commit(parameter, histories, some_deltas(1))
    with torch.no_grad():
        parameter[0, 0, 0] += 1  # an expert that no change touches
    now = fingerprints({"": parameter}, Ranks())[""]
    commit(parameter, histories, some_deltas(2))
    assert [(own.base, len(own.deltas)) for own in histories[NAME]] == [(now, 1)]
    commit(parameter.requires_grad_(True), histories, some_deltas(3))
    assert histories[NAME] == ()


def test_a_sum_whose_base_is_not_known_is_followed_by_another() -> None:
    parameter, histories = frozen(), {}
    commit(parameter, histories, some_deltas(1))
    (own,) = histories[NAME]
    histories[NAME] = (EditSum(own.base, own.deltas, own.after),)
    between = parameter.clone()
    commit(parameter, histories, some_deltas(2))
    assert torch.equal(parameter, rounded(between, some_deltas(2)))
    first, second = histories[NAME]
    assert second.base == first.after[-1] == own.after[-1]
    assert missing(histories[NAME], first.base) == [first, second]
    assert missing(histories[NAME], second.base) == [second]
    assert missing(histories[NAME], second.after[-1]) == []
    assert missing(histories[NAME], "another") is None


def test_a_copy_that_is_equal_stays_equal() -> None:
    parameter, histories = frozen(), {}
    equal, other = (nn.Parameter(parameter.detach() + shift, requires_grad=False) for shift in (0, 1))
    for seed in range(3):
        with Transaction(copies={parameter: [equal, other]}, histories=histories) as transaction:
            transaction.commit(parameter, some_deltas(seed, 0.01), name=NAME)
            transaction.keep()
        assert torch.equal(equal, parameter)
    assert not torch.equal(other, parameter)


def test_a_change_in_float32_is_a_sum_by_itself() -> None:
    parameter, histories, all_deltas = frozen(torch.float32), {}, [some_deltas(seed) for seed in range(3)]
    start = parameter.detach().clone()
    with Transaction(histories=histories) as transaction:
        transaction.commit(parameter, all_deltas[0], name=NAME, exact=False)
        transaction.keep()
    first = parameter.detach().clone()
    commit(parameter, histories, *all_deltas[1:])
    assert torch.equal(parameter, rounded(first, *all_deltas[1:]))
    torch.testing.assert_close(parameter.detach(), rounded(start, *all_deltas), rtol=1e-5, atol=1e-5)
    assert [(len(own.deltas), own.is_exact) for own in histories[NAME]] == [(1, False), (2, True)]


def test_a_part_has_the_fingerprint_and_the_experts_of_its_parameter() -> None:
    parameter = frozen()
    part = Part.of(parameter).to("cpu")
    assert fingerprints({"": part}, Ranks()) == fingerprints({"": parameter}, Ranks())
    assert torch.equal(part.rows(2), parameter[2].reshape(-1))
    own = Part(parameter.shape, False, 5, parameter.reshape(-1)[5 : parameter[0].numel() + 3])
    assert torch.equal(own.rows(0), parameter[0].reshape(-1)[5:])
    assert torch.equal(own.rows(1), parameter[1].reshape(-1)[:3])
    assert not own.rows(2).numel()
    with torch.no_grad():
        parameter.zero_()
    assert float(part.elements.float().abs().sum()) > 0


def test_a_sum_has_one_state_for_each_change() -> None:
    with pytest.raises(ValueError, match="one entry per change, at least one, got 1 and 0"):
        EditSum("", (some_deltas(),), ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_changes_take_no_more_memory_than_a_dense_one(dtype: torch.dtype) -> None:
    parameter, histories = frozen(dtype), {}
    base, changes = parameter.clone(), [some_deltas(seed, scale=0.01) for seed in range(40)]
    commit(parameter, histories, *changes)
    (own,) = histories[NAME]
    sizes = [sum(factor.nbytes for factor in (change.left, change.right)) for change in own.deltas]
    per_change = sum(factor.nbytes for factor in (changes[0].left, changes[0].right))
    identity = 8 * (D_MODEL**2 + len(own.experts) * D_MODEL)
    assert sum(sizes) <= 8 * len(own.experts) * D_MODEL * D_HIDDEN + identity + per_change < 40 * per_change
    assert torch.equal(parameter, rounded(base, *changes))
    again = nn.Parameter(base, requires_grad=False)
    with Transaction() as transaction:
        transaction.commit(again, own.deltas)
        transaction.keep()
    assert torch.equal(again, parameter)


def test_a_sum_can_be_ended() -> None:
    parameter, histories = frozen(), {}
    commit(parameter, histories, some_deltas(1))
    between = parameter.clone()
    with Transaction(histories=histories) as transaction:
        transaction.commit(parameter, some_deltas(2), name=NAME, begins=True)
        transaction.keep()
    assert torch.equal(parameter, rounded(between, some_deltas(2)))
    assert [len(own.deltas) for own in histories[NAME]] == [1, 1]
