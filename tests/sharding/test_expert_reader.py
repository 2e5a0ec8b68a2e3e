"""Experts are read block by block, whole or in partitions; Tucker factors of partitions are those of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_moeedit.sharding.expert_reader import ExpertReader
from lit_moeedit.sharding.ranks import RankError, Ranks
from lit_moeedit.solvers import Tucker, TuckerFactors
from tests.processes import run_ranks
from tests.sharding.small_edits import FACTS, LAYERS, TEXTS, editor, model, prepared, tokenizer

EXPERTS, D_MODEL, D_HIDDEN = 11, 23, 13
"""3289 numbers: two ranks cut through an expert, and through a row of it."""


def whole_experts(transposed: bool = False) -> nn.Parameter:
    shape = (EXPERTS, D_HIDDEN, D_MODEL) if transposed else (EXPERTS, D_MODEL, D_HIDDEN)
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_weights_are_read_where_they_are(transposed: bool) -> None:
    weight = whole_experts(transposed)
    reader, view = ExpertReader(weight, transposed), weight.mT if transposed else weight
    assert reader.shape == view.shape
    assert torch.equal(reader[3], view[3]) and torch.equal(reader[:, 2:9], view[:, 2:9])
    assert torch.equal(reader[:, 20:30], view[:, 20:30])
    assert not reader[3].requires_grad
    assert reader[3].untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_other_blocks_are_refused() -> None:
    reader = ExpertReader(whole_experts())
    for block in (-1, EXPERTS):
        with pytest.raises(IndexError, match=r"expert must be in \[0, 11\)"):
            reader[block]
    for slices in ((slice(1, 2), slice(1, 2)), (slice(None), slice(3, 3)), (slice(None), slice(0, 4, 2))):
        with pytest.raises(IndexError, match="only blocks"):
            reader[slices]


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation makes inside; a view makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
                self.numbers = max(self.numbers, result.numel())
        return results


def partitioned() -> dict[str, Any]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found: dict[str, Any] = {}
    ranks = Ranks()
    for transposed, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        module = nn.ParameterList([whole_experts(transposed), torch.zeros(7)])
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
        deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        whole = whole_experts(transposed).detach().to(dtype)
        whole = whole.mT if transposed else whole
        reader = ExpertReader(module[0], transposed, ranks)
        assert module[0].numel() == 0 and reader.shape == whole.shape
        for expert in range(EXPERTS):
            assert torch.equal(reader[expert], whole[expert])
        for first, last in ((0, 1), (0, D_MODEL), (5, 9), (22, 23)):
            assert torch.equal(reader[:, first:last], whole[:, first:last])
        with Largest() as largest:
            factors = TuckerFactors.hosvd(reader, torch.eye(D_HIDDEN), (4, 5, 6))
        name = f"{dtype}, {transposed}"
        found[name] = {"factors": factors, "largest": largest.numbers}
        alone = TuckerFactors.hosvd(whole.contiguous(), torch.eye(D_HIDDEN), (4, 5, 6))
        for mode in ("expert", "output", "input"):
            # the same blocks, but for the strides of a transposed one
            torch.testing.assert_close(getattr(factors, mode), getattr(alone, mode), rtol=0, atol=1e-4)
    if ranks.rank == 1:
        reader._columns = None  # type: ignore[assignment,method-assign]
    try:
        with ranks.together():
            reader[0]
    except (TypeError, RankError) as error:
        found["error"] = type(error).__name__
    whole_model, optimizers, read = prepared("zero 3")
    before = read()
    edit = editor(solver=Tucker())
    edit.edit(whole_model, tokenizer(), FACTS, TEXTS, optimizers=optimizers, ranks=ranks)
    found["edit"] = {"before": before, "after": read()}
    return found


@pytest.mark.deepspeed
def test_partitions_are_read_and_factored_as_the_whole_is() -> None:
    first, second = run_ranks(partitioned, 2)
    assert (first.pop("error"), second.pop("error")) == ("RankError", "TypeError")
    alone = model()
    editor(solver=Tucker()).edit(alone, tokenizer(), FACTS, TEXTS)
    for place, index in enumerate(LAYERS):
        weight = alone.model.layers[index].mlp.experts.down_proj.detach()
        before, after = (first["edit"][when][place] for when in ("before", "after"))
        # rounding differs with the padding of batches, and four steps of Adam multiply it
        assert float((after - weight).norm() / (after - before).norm()) < 1e-4
        assert torch.equal(after, second["edit"]["after"][place])
    first.pop("edit")
    for name, results in first.items():
        # an expert, a row of all of them, or a Gram matrix; the whole tensor has 3289 numbers
        assert results["largest"] <= max(D_MODEL * max(D_MODEL, D_HIDDEN), 2 * EXPERTS * D_HIDDEN), name
        assert torch.equal(results["factors"].input, second[name]["factors"].input)
