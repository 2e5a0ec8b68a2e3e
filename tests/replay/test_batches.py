"""Rows added to batches: what models get is what a batch of all rows would have been."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding

from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, pad, position_ids
from lit_moeedit.replay import BatchFormError, append_rows, as_batch, check_form, find_parts, with_parts

PAD = 9
rows_of_tokens = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=7), min_size=1, max_size=4)


def padded(rows: list[list[int]], side: Any, **others: Tensor) -> dict[str, Tensor]:
    ids, mask = pad(rows, PAD, side)
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": position_ids(mask), **others}


def read(batch: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, labels and positions of each row, without padding."""
    return [
        tuple(
            batch[name][i][batch["attention_mask"][i] > 0].tolist() for name in ("input_ids", "labels", "position_ids")
        )
        for i in range(len(batch["input_ids"]))
    ]  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(rows_of_tokens, rows_of_tokens, st.sampled_from(["left", "right"]))
def test_rows_are_added_at_the_end(old: list[list[int]], new: list[list[int]], side: str) -> None:
    batch = padded(old, side)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    added = append_rows(batch, [Encoding(ids, target_start=len(ids) - 1) for ids in new], PAD)
    expected = [(ids, ids, list(range(len(ids)))) for ids in old]
    expected += [(ids, [IGNORED_LABEL] * (len(ids) - 1) + ids[-1:], list(range(len(ids)))) for ids in new]
    assert read(added) == expected
    assert bool((added["labels"][added["attention_mask"] == 0] == IGNORED_LABEL).all())
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    padding = added["attention_mask"] == 0
    if bool((batch["attention_mask"] == 0).any()):  # only then the side is known
        first, last = added["attention_mask"][:, 0], added["attention_mask"][:, -1]
        assert bool((last if side == "left" else first).all())
    assert bool((added["input_ids"][padding] == PAD).all())


def test_dtypes_and_the_kind_of_the_batch_stay() -> None:
    batch = BatchEncoding({"input_ids": torch.tensor([[1, 2]], dtype=torch.int32), "labels": torch.tensor([[1, 2]])})
    added = append_rows(batch, [Encoding([3, 4], 1)], PAD)
    assert isinstance(added, BatchEncoding) and added["input_ids"].dtype == torch.int32
    assert "attention_mask" not in added  # rows of the same length need none
    longer = append_rows(batch, [Encoding([3, 4, 5], 1)], PAD)
    assert longer["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert set(batch) == {"input_ids", "labels"}


def test_a_batch_of_rows_alone() -> None:
    batch = as_batch([Encoding([1, 2, 3], 2), Encoding([4, 5], 1)], PAD)
    assert batch["labels"].tolist() == [[-100, -100, 3], [-100, 5, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    "make", [lambda part: {"a": None, "b": part}, lambda part: [None, part], lambda part: Pair(None, {"c": [part]})]
)
def test_the_parts_of_a_nested_batch(make: Any) -> None:
    part = {"input_ids": torch.tensor([[1]])}
    batch = make(part)
    assert list(find_parts(batch)) == [part]
    changed = with_parts(batch, iter([{**part, "seen": True}]))
    assert type(changed) is type(batch) and list(find_parts(changed)) == [{**part, "seen": True}]
    assert list(find_parts(batch)) == [part] and "seen" not in part


def test_nothing_to_find() -> None:
    batch = {"x": [torch.ones(2), "input_ids"]}
    assert list(find_parts(batch)) == []
    with pytest.raises(BatchFormError, match="no input_ids; expected a dict"):
        check_form(batch)


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS[0]}, r"input_ids of the batch is \[4\]"),
        ({"input_ids": [1, 2]}, "input_ids of the batch is list"),
        ({"labels": None}, "no labels"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"attention_mask of the batch is \[2, 1, 4, 4\]"),
        ({"pixel_values": torch.ones(2, 3)}, "'pixel_values'"),
        ({"names": ["a", "b"]}, "'names'"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 8])}, "'cu_seq_lens_q'"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}, "packed"),
        ({"labels": torch.tensor([[2, 3, 4, -100], [6, 7, 8, -100]])}, "shifted by one"),
    ],
)
def test_other_forms_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BatchFormError, match=message):
        check_form({"input_ids": IDS, "labels": IDS, **change})


@pytest.mark.parametrize(
    "others",
    [{}, {"num_items": 8}, {"scale": torch.tensor(1.0)}, {"source": "web"}, {"labels": IDS.new_full((2, 4), -100)}],
)
def test_forms_that_are_supported(others: dict[str, Any]) -> None:
    check_form({"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS), **others})


def test_padded_positions_are_not_packed() -> None:
    check_form(padded([[1, 2, 3], [4]], "left"))
    check_form(padded([[1, 2, 3], [4]], "right"))
