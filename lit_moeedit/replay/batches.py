"""Rows added to batches of the form that models of transformers take, padded on the side that the batch is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, pad, position_ids

PADDED = ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids")
"""Entries of a batch with a row per text and a column per token, for which the values of a new row are known."""
_EXPECTED = "a dict of input_ids, attention_mask and labels, each [rows, tokens]"


class BatchFormError(ValueError):
    """A batch to which rows cannot be added."""


def find_parts(batch: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the dicts with ``input_ids`` in a batch, which may be nested.

    Example:
        >>> list(find_parts({"web": {"input_ids": 1}, "code": [{"input_ids": 2}, None]}))
        [{'input_ids': 1}, {'input_ids': 2}]
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from find_parts(part)


def with_parts(batch: Any, parts: Iterator[Mapping[str, Any]]) -> Any:
    """Return a batch with other dicts in the places of those that :func:`find_parts` yields, in their order.

    The batch itself is not changed.

    Example:
        >>> with_parts([None, {"input_ids": 2}], iter([{"input_ids": 3}]))
        [None, {'input_ids': 3}]
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return next(parts)
    if isinstance(batch, Mapping):
        changed = copy.copy(batch)
        for key, part in batch.items():
            changed[key] = with_parts(part, parts)  # type: ignore[index]
        return changed
    if not isinstance(batch, list | tuple):
        return batch
    found = [with_parts(part, parts) for part in batch]
    if isinstance(batch, list):
        return found
    return type(batch)(*found) if hasattr(batch, "_fields") else tuple(found)


def with_labels(part: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with the labels of another one, if that has any; the batch itself is not changed."""
    if "labels" not in other:
        return part
    changed = copy.copy(part)
    changed["labels"] = other["labels"]  # type: ignore[index]
    return changed


def check_form(batch: Any) -> None:
    """Check that rows can be added to a batch: to the first of the dicts that :func:`find_parts` yields.

    Raises:
        BatchFormError: saying what is there, and what was expected.
    """
    part = next(find_parts(batch), None)
    if part is None:
        raise BatchFormError(f"the batch has no input_ids; expected {_EXPECTED}")
    ids = part["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise BatchFormError(f"input_ids of the batch is {shape}; expected {_EXPECTED}")
    if not isinstance(part.get("labels"), Tensor):
        raise BatchFormError(f"the batch has no labels; expected {_EXPECTED}")
    for name, value in part.items():
        if name in PADDED and (not isinstance(value, Tensor) or value.shape != ids.shape):
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BatchFormError(f"{name} of the batch is {shape}, but input_ids is {list(ids.shape)}")
        if name not in PADDED and _belongs_to_rows(value, len(ids)):
            raise BatchFormError(f"nothing is known of the values of new rows in the entry {name!r} of the batch")
    _check_labels(part)
    _check_positions(part)


def append_rows(part: Mapping[str, Any], rows: Sequence[Encoding], pad_token: int) -> Mapping[str, Any]:
    """Return a batch with further rows at its end; its loss counts the tokens of their targets.

    Args:
        part: ``input_ids`` and ``labels``, each ``[rows, tokens]``; other entries are those that :func:`check_form`
            allows. Without an ``attention_mask`` it gets one if there is padding.
        rows: the rows.
        pad_token: id of the padding.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
        >>> append_rows(batch, [Encoding([8, 9], target_start=1)], pad_token=0)["labels"].tolist()
        [[5, 6, 7], [-100, 9, -100]]
    """
    ids, mask = part["input_ids"], part.get("attention_mask")
    side = "left" if mask is not None and not bool(mask[:, 0].all()) else "right"
    own, length = as_batch(rows, pad_token, side), max(ids.shape[1], *(len(row.ids) for row in rows))
    is_padded = len({ids.shape[1], *(len(row.ids) for row in rows)}) > 1
    if mask is None and is_padded:
        part = {**part, "attention_mask": torch.ones_like(ids)}
    fill = {"input_ids": pad_token, "labels": IGNORED_LABEL}
    changed = copy.copy(part) if hasattr(part, "__setitem__") else dict(part)
    for name in PADDED:
        if name not in part:
            continue
        old = part[name]
        new = own[name].to(old.device, old.dtype) if name in own else old.new_zeros(own["input_ids"].shape)
        parts = [_widened(tensor, length, side, fill.get(name, 0)) for tensor in (old, new)]
        changed[name] = torch.cat(parts)
    return changed


def as_batch(rows: Sequence[Encoding], pad_token: int, side: str = "right") -> dict[str, Tensor]:
    """Return rows as a batch of their own, of which the tokens of the targets count.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` and ``position_ids``, each int64 ``[rows, tokens]``.
    """
    ids, mask = pad([row.ids for row in rows], pad_token, "left" if side == "left" else "right")
    starts = torch.tensor([row.target_start for row in rows])[:, None]
    counted = (position_ids(mask) >= starts) & (mask > 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(~counted, IGNORED_LABEL),
        "position_ids": position_ids(mask),
    }


def _widened(tensor: Tensor, length: int, side: str, value: int) -> Tensor:
    missing = length - tensor.shape[1]
    return F.pad(tensor, (missing, 0) if side == "left" else (0, missing), value=value) if missing else tensor


def _belongs_to_rows(value: Any, rows: int) -> bool:
    """Tell if an entry of a batch has a value per row, or is made of tensors of which nothing is known."""
    if isinstance(value, Tensor):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == rows


def _check_labels(part: Mapping[str, Any]) -> None:
    ids, labels = part["input_ids"], part["labels"]
    counted = labels != IGNORED_LABEL
    if bool((labels == ids)[counted].all()) or ids.shape[1] < 2:
        return
    ahead = counted[:, :-1]
    if bool(ahead.any()) and bool((labels[:, :-1] == ids[:, 1:])[ahead].all()):
        raise BatchFormError(
            "labels of the batch are shifted by one against input_ids; models of transformers shift them themselves"
        )


def _check_positions(part: Mapping[str, Any]) -> None:
    positions = part.get("position_ids")
    if positions is None or positions.shape[1] < 2:
        return
    mask = part.get("attention_mask")
    real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask > 0
    restarts = (positions[:, 1:] <= positions[:, :-1]) & real[:, 1:] & real[:, :-1]
    if bool(restarts.any()):
        raise BatchFormError("the rows of the batch are packed: position_ids begin again within a row")
