"""Edits under DDP and ZeRO on two ranks: the bits of one process, in model and master weights, and refused together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_moeedit.edits import EditConflictError, apply, undo, verify
from lit_moeedit.models.experts import check_editable
from lit_moeedit.sharding.ranks import Ranks
from tests.edits.making import chain, weights
from tests.processes import run_ranks
from tests.sharding.small_edits import LAYERS, model, prepared

pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


def chosen(whole: Any) -> list[Tensor]:
    return [value for name, value in weights(whole).items() if int(name.split(".")[2]) in LAYERS]


def all_equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def check(kind: str, dtype: torch.dtype, frozen: bool) -> dict[str, bool]:
    from deepspeed.utils import safe_get_full_fp32_param

    base = model(dtype)
    edits, models = chain(base)
    at = [chosen(base), *map(chosen, models)]
    found = {}
    sharded, optimizers, read = prepared(kind, dtype, frozen)
    ranks = Ranks.current()
    given: dict[str, Any] = {"ranks": ranks, "optimizers": optimizers}
    apply(sharded, edits[:2], **given)
    found["applied"] = all_equal(read(), at[2])
    status = [presence.status for presence in verify(sharded, edits, ranks=ranks)]
    found["verified"] = status == ["applied", "applied", "missing"] * 2
    # every rank has the whole base
    apply(sharded, edits, base=copy.deepcopy(base), **given)
    found["the third"] = all_equal(read(), at[3])
    undo(sharded, edits, ["edit-2", "edit-3"], base=copy.deepcopy(base), **given)
    found["undone"] = all_equal(read(), at[1])
    # shards of the same kind
    undo(sharded, edits[:1], ["edit-1"], base=prepared(kind, dtype, frozen)[0], **given)
    found["at the base"] = all_equal(read(), at[0])
    for wrong in (edits[1:], [edits[0], edits[2]]):
        try:
            apply(sharded, wrong, **given)
        except EditConflictError:
            found["refused"] = all_equal(read(), at[0])
    apply(sharded, edits, **given)
    found["at the end"] = all_equal(read(), at[3])
    # the next step of the optimizer would write what these are rounded to
    masters = [safe_get_full_fp32_param(layer.down_proj) for layer in check_editable(sharded, LAYERS)]
    if kind != "replicated" and not frozen:
        found["masters"] = all_equal([master.view(6, 32, 20).to(dtype) for master in masters], at[3])
    return found


def check_all(cases: list[tuple[str, torch.dtype, bool]]) -> dict[str, dict[str, bool]]:
    return {f"{kind} {dtype} frozen {frozen}": check(kind, dtype, frozen) for kind, dtype, frozen in cases}


def test_every_sharding() -> None:
    cases = [
        ("replicated", torch.float32, False),
        ("zero 1", torch.bfloat16, False),
        ("zero 3", torch.float32, False),
        ("zero 3", torch.bfloat16, False),
        ("zero 3", torch.bfloat16, True),
    ]
    for found in run_ranks(check_all, 2, cases):
        for case, results in found.items():
            assert len(results) >= 7
            assert all(results.values()), (case, results)
