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


def answer(model: nn.Module) -> str:
    try:
        check_finite(model, Ranks())
        return "finite"
    except (FloatingPointError, RankError) as error:
        return f"{type(error).__name__}: {error}"


VALUES = {"finite": 1.0, "nan": float("nan"), "inf": -float("inf")}


def _shards(rows: int, inference: bool) -> dict[str, str]:
    """A layer whose rows are sharded, with each value in its first row and in its last."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, said = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for name, value in VALUES.items():
        for place in (0, -1):
            whole = torch.ones(rows, 2, dtype=torch.bfloat16)
            whole[place, 1] = value
            layer = nn.Linear(2, rows)
            layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            with torch.inference_mode(inference):
                said[f"{name} {place}"] = answer(layer)
    return said


def _fully_sharded() -> dict[str, str]:
    """A module of FSDP2, as it is and with a group that stays gathered."""
    from torch.distributed.fsdp import fully_shard

    said = {}
    for name, value in VALUES.items():
        for is_gathered in (False, True):
            torch.manual_seed(0)
            layer = nn.Linear(3, 5)
            with torch.no_grad():
                layer.weight[4, 2] = value
            fully_shard(layer, reshard_after_forward=False)
            if is_gathered:
                layer(torch.ones(1, 3))
            said[f"{name} {is_gathered}"] = answer(layer)
    return said


def _replicas() -> dict[str, str]:
    """A model that every rank holds, with a wrong number on the second one only."""
    said = {}
    for name, value in VALUES.items():
        layer = nn.Linear(2, 2)
        with torch.no_grad():
            layer.bias[1] = value if dist.get_rank() == 1 else 1.0
        said[name] = answer(layer)
    return said


def _partitions() -> dict[str, str]:
    """Partitions of ZeRO stage 3: padded ones, and of a single element, of which the second rank has none."""
    from tests.sharding.engines import import_deepspeed

    deepspeed, said = import_deepspeed(), {}
    for name, value in VALUES.items():
        for size in (1, 2, 5):
            layer = module(w=torch.ones(size))
            with torch.no_grad():
                layer.w[-1] = value
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            }
            with torch.inference_mode(False):
                engine, *_ = deepspeed.initialize(model=layer, config=config)
            weight = engine.module.w
            weight.ds_tensor.data[weight.ds_numel - dist.get_rank() * weight.ds_tensor.numel() :] = torch.nan  # padding
            said[f"{name} {size}"] = answer(engine.module)
    return said


def assert_all_found(said: list[dict[str, str]]) -> None:
    """A wrong number on any rank fails all of them, one with its name."""
    for case in said[0]:
        messages = [rank[case] for rank in said]
        if case.startswith("finite"):
            assert messages == ["finite"] * len(said), case
        else:
            assert all(message.startswith(("FloatingPointError", "RankFloatingPointError")) for message in messages), (
                case
            )
            assert any(message.startswith("FloatingPointError") for message in messages), case


def _all_layouts() -> dict[str, dict[str, str]]:
    # one row on two ranks leaves the second one without any
    said = {f"{rows} rows, {mode}": _shards(rows, mode) for rows in (1, 2, 3, 5) for mode in (False, True)}
    return {**said, "fully sharded": _fully_sharded(), "replicas": _replicas()}


def test_a_number_on_any_rank_is_found_on_all_of_them() -> None:
    found = run_ranks(_all_layouts, 2)
    for layout in found[0]:
        assert_all_found([rank[layout] for rank in found])
    first, second = (rank["5 rows, False"] for rank in found)
    assert "weight" in second["nan -1"] and first["nan -1"].startswith(
        "RankFloatingPointError: rank 1 failed: FloatingPointError"
    )


@pytest.mark.deepspeed
def test_a_number_in_any_partition_is_found_on_all_ranks() -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    assert_all_found(run_ranks(_partitions, 2))
