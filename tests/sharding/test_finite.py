"""A weight that is no number is found in every dtype, wherever it stands, and nothing else is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lit_moeedit.sharding.finite import check_finite
from lit_moeedit.sharding.ranks import RankError, Ranks
from tests.processes import run_ranks
from tests.sharding.looking import counted

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def module(**tensors: torch.Tensor) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 23])
def test_one_number_is_enough(dtype: torch.dtype, value: float, place: int) -> None:
    wrong = torch.ones(2, 3, 4, dtype=dtype)
    wrong.view(-1)[place] = value
    model = module(sound=torch.ones(3, dtype=dtype), wrong=wrong)
    with pytest.raises(FloatingPointError, match=r"not finite \(NaN or infinity\): wrong$"):
        check_finite(model, Ranks())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_numbers(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    check_finite(
        module(a=torch.tensor([largest, -largest] * 50, dtype=dtype), empty=torch.ones(0, dtype=dtype)), Ranks()
    )


def test_what_is_no_float_is_left_alone() -> None:
    check_finite(
        module(packed=torch.zeros(3, dtype=torch.uint8), eight=torch.zeros(3).to(torch.float8_e4m3fn)), Ranks()
    )


def test_a_few_of_many_are_named() -> None:
    model = module(**{f"w{i}": torch.tensor([torch.nan]) for i in range(8)})
    with pytest.raises(FloatingPointError, match="w0, w1, w2, w3, w4 and 3 more"):
        check_finite(model, Ranks())


def test_the_device_is_waited_for_once_for_each_dtype() -> None:
    model = module(**{f"w{i}": torch.ones(2, dtype=DTYPES[i % 4]) for i in range(40)})
    with counted() as operations:
        check_finite(model, Ranks())
    assert operations.waited == {"tolist": 4}


def test_names_come_in_the_order_of_the_model() -> None:
    wrong = {f"w{i}": torch.tensor([torch.nan], dtype=DTYPES[i % 3]) for i in range(5)}
    with pytest.raises(FloatingPointError, match=r"w0, w1, w2, w3, w4$"):
        check_finite(module(**wrong), Ranks())


def test_buffers_that_are_saved_are_checked() -> None:
    model = nn.Module()
    model.inner = module(weight=torch.ones(2))
    model.inner.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
    model.inner.register_buffer("bias", torch.zeros(3))
    model.inner.register_buffer("none", None)
    model.register_buffer("own", torch.zeros(3))
    check_finite(model, Ranks())
    model.inner.bias[1] = torch.nan
    model.own[2] = torch.inf
    with pytest.raises(FloatingPointError, match=r"weights or buffers that are not finite .*: own, inner\.bias$"):
        check_finite(model, Ranks())


def _shards() -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), []
    for value in (1.0, float("nan")):
        layer = nn.Linear(2, 4)
        whole = torch.ones(4, 2)
        whole[3] = value  # on the second rank
        layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        try:
            check_finite(layer, Ranks())
            said.append("finite")
        except (FloatingPointError, RankError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_each_rank_looks_at_its_shard() -> None:
    first, second = run_ranks(_shards, 2)
    assert first[0] == second[0] == "finite"
    assert first[1].startswith("RankError: rank 1 failed: FloatingPointError") and "weight" in second[1]
