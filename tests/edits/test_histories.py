"""The state of frozen experts in a checkpoint, which is untrusted: checked before memory or time are spent on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.edits.histories import histories_of, state_of
from lit_moeedit.sharding.history import EditSum
from tests.edits.making import some_deltas


def state() -> dict[str, Any]:
    return state_of({"down_proj": (EditSum("base", (some_deltas((4, 6, 3), 0),), ("after",)),)}, {"other": "same"})


def test_a_state_is_read_as_it_was_written() -> None:
    histories, unedited = histories_of(state())
    ((own,),) = histories.values()
    assert unedited == {"other": "same"}
    assert (own.base, own.after) == ("base", ("after",))
    assert torch.equal(own.deltas[0].left, some_deltas((4, 6, 3), 0).left)


MANY = 10**12
HOSTILE: dict[str, dict[str, Any]] = {
    "repeated terms": {
        "expert_index": torch.zeros(1, dtype=torch.long).expand(MANY),
        "row_index": torch.zeros(1, dtype=torch.long).expand(MANY),
        "right": torch.zeros(1, 1).expand(MANY, 3),
    },
    "repeated rows": {"left": torch.zeros(1, 1).expand(MANY, 6)},
    "no elements": {"left": torch.empty(MANY, 6, device="meta")},
    "sparse": {"left": torch.zeros(3, 6).to_sparse()},
    "another dtype": {"left": torch.zeros(3, 6, dtype=torch.float8_e4m3fn)},
    "an expert too many": {"num_experts": 1},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_hostile_factors_are_refused(changes: dict[str, Any]) -> None:
    hostile = state()
    hostile["layers"]["down_proj"][0]["deltas"][0].update(changes)
    with pytest.raises(CheckpointError, match=r"layers\['down_proj'\]\[0\], deltas\[0\]: expected the low-rank"):
        histories_of(hostile)


@pytest.mark.parametrize("is_whole", [False, True], ids=["an edit", "a layer"])
def test_a_state_that_lacks_an_edit_is_refused(is_whole: bool) -> None:
    lacking = state()
    if is_whole:
        # as if it had not been edited, which the base will not bear out
        del lacking["layers"]["down_proj"]
        assert histories_of(lacking) == ({}, {"other": "same", "down_proj": "after"})
        return
    lacking["layers"]["down_proj"][0]["after"] = ["before it"]
    with pytest.raises(CheckpointError, match="an edit of down_proj is missing"):
        histories_of(lacking)
