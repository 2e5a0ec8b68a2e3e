"""Layouts that cannot be written are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lit_moeedit.sharding.backends import locate
from lit_moeedit.sharding.shards import UnsupportedShardingError
from tests.processes import run_ranks


def test_a_whole_parameter() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    shard = locate(weight, [optimizer])
    assert (shard.shape, shard.start, shard.stop, shard.group) == (weight.shape, 0, 24, None)
    assert shard.model is None
    assert shard.master.read().data_ptr() == weight.data_ptr()
    moments = {moment.read().data_ptr() for moment in shard.moments}
    assert moments == {optimizer.state[weight][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")}


def distributed_tensor() -> list[str]:
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    from lit_moeedit.editing import Editor
    from tests.conftest import _build

    model, said = _build("qwen3_moe"), []
    experts = model.model.layers[1].mlp.experts
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    experts.down_proj = nn.Parameter(distribute_tensor(experts.down_proj.detach(), mesh, [Replicate()]))
    model.model.register_forward_pre_hook(lambda *args: said.append("a forward"))
    for refuse in (lambda: locate(experts.down_proj), lambda: Editor([1]).check(model)):
        try:
            refuse()
        except UnsupportedShardingError as error:
            said.append(str(error))
    return said


def test_dtensors_are_refused_before_any_forward() -> None:
    (said,) = run_ranks(distributed_tensor, 1)
    assert "a parameter is sharded as (Replicate(),)" in said[0]
    assert len(said) == 2 and "sharded parameters (DTensor)" in said[1]


def test_an_optimizer_that_keeps_master_copies_in_an_unknown_way_is_refused() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4))

    class Unknown:
        bit16_groups = ((weight,),)

    with pytest.raises(UnsupportedShardingError, match="Unknown keeps its master weights in a way that is not known"):
        locate(weight, [Unknown()])


# -- ZeRO stage 3 -----------------------------------------------------------------------------------------------------


@pytest.mark.deepspeed
@pytest.mark.parametrize("layout", ["NVMe", "quantised", "secondary", "in flight"])
def test_partitions_that_are_not_in_memory_as_they_are(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

    part: Any = torch.zeros(6)
    part.status = PartitionedParamStatus.AVAILABLE
    weight: Any = nn.Parameter(torch.empty(0))
    weight.ds_id, weight.ds_tensor, weight.ds_status = 0, part, ZeroParamStatus.NOT_AVAILABLE
    message = "partition is on NVMe or quantised; offload parameters to the CPU, or not at all"
    if layout == "NVMe":
        part.status = PartitionedParamStatus.NOT_AVAILABLE
    elif layout == "quantised":
        part.ds_quant_scale = torch.ones(1)
    elif layout == "secondary":
        weight.ds_secondary_tensor, message = torch.zeros(3), r"secondary partitions \(zero_hpz_partition_size\)"
    else:
        weight.ds_status, message = ZeroParamStatus.INFLIGHT, "is being gathered; edit between steps"
    with pytest.raises(UnsupportedShardingError, match=message):
        locate(weight)
