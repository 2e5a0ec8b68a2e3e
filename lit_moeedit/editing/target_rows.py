"""The texts through which target vectors are optimised, as tensors, and their forward above the target layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.editing.kv_prefix import Prefix, logits_at
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.partial_forward import (
    LayerOutput,
    decoder_layers,
    experts_run_at,
    experts_run_on,
    layer_output,
    output_replaced,
    skipped,
)
from lit_moeedit.sharding.zero3_passes import regathering


@dataclass(frozen=True)
class TargetRow:
    """One text through which a target vector is optimised.

    Attributes:
        edit: number of the edit.
        encoding: prompt, target and edit token. For the divergence from the unedited model: a neutral prompt without a
            target.
    """

    edit: int
    encoding: Encoding

    @property
    def is_neutral(self) -> bool:
        """Whether the row asks for the unedited model's answer instead of a target."""
        return self.encoding.target_start == len(self.encoding.ids)

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """What stands before the edit token; the edit token and what follows it, as far as the model reads it."""
        ids, edit_token = self.encoding.ids, self.encoding.edit_token
        assert edit_token is not None
        # the last token of a target is never an input: nothing is predicted from it
        return ids[:edit_token], ids[edit_token:] if self.is_neutral else ids[edit_token:-1]


@dataclass(frozen=True)
class Rows:
    """``n`` rows of a batch of edits, whole or from the edit token on, and the ``m`` predictions that count in them.

    All edit tokens stand in one column: rows are padded on the left and on the right.

    Attributes:
        edit: ``[n]``, number of the edit in the batch.
        ids: ``[n, length]``.
        positions: ``[n, length]``, position ids.
        mask: ``[n, length]``, with the columns of ``prefix`` before them.
        output: of the target layer without ``δ``.
        token: column of the edit tokens.
        row: ``[m]``, row of each prediction.
        column: ``[m]``, column from which it is made.
        label: ``[m]``, the target's token; -1 in a neutral row.
        weight: ``[m]``, of the label's negative log-likelihood: its mean is over a target's tokens and over contexts.
        prefix: keys and values of what stands before rows that start at the edit token.
    """

    edit: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    output: LayerOutput
    token: int
    row: Tensor
    column: Tensor
    label: Tensor
    weight: Tensor
    prefix: Prefix | None = None

    # places are found once for all steps: a GPU has to be waited for to know how many there are

    @cached_property
    def real(self) -> Tensor:
        """Places of the tokens that are no padding, among all of the rows'."""
        return self.mask[:, -self.ids.shape[1] :].flatten().nonzero().squeeze(-1)

    @cached_property
    def predicting(self) -> Tensor:
        """Places of the tokens from which a prediction is made."""
        return torch.unique(self.row * self.ids.shape[1] + self.column)

    @cached_property
    def neutral(self) -> Tensor:
        """Numbers of the predictions that belong to neutral rows."""
        return (self.label < 0).nonzero().squeeze(-1)

    def behind(self, prefix: Prefix) -> Rows:
        """The same rows from the edit token on."""
        prefix.fix()
        cut = {name: getattr(self, name)[:, self.token :] for name in ("ids", "positions")}
        output = self.output.at(slice(None), slice(self.token, None))
        return replace(self, **cut, output=output, token=0, column=self.column - self.token, prefix=prefix)

    def select(self, kept: Tensor) -> tuple[Rows, Tensor]:
        """Some of the rows, given as a mask ``[n]``; also the predictions that are left, as a mask ``[m]``."""
        predictions = kept[self.row]
        if self.prefix is not None:
            self.prefix.select(kept)
        changes: dict[str, Any] = {name: getattr(self, name)[kept] for name in ("edit", "ids", "positions", "mask")}
        changes["output"] = self.output.at(kept)
        changes |= {name: getattr(self, name)[predictions] for name in ("column", "label", "weight")}
        return replace(self, **changes, row=(kept.cumsum(0) - 1)[self.row[predictions]]), predictions


class UpperLayers:
    """A model from the output of the target layer on.

    Args:
        model: the model.
        layer: the target layer.
    """

    def __init__(self, model: PreTrainedModel, layer: ExpertLayer) -> None:
        self.model, self.layer = model, layer.layer
        layers = decoder_layers(model, layer)
        number = next(i for i, other in enumerate(layers) if other is layer.layer)
        self.below, above = layers[:number], layers[number + 1 :]
        experts = expert_layers(model).values()
        self.between = [other for other in experts if any(other.layer is one for one in above[:-1])]
        self.last = [other for other in experts if any(other.layer is one for one in above[-1:])]

    def log_probabilities(self, rows: Rows, deltas: Tensor | None = None, record: Prefix | None = None) -> Tensor:
        """What the model says at the predictions, ``[m, vocabulary]`` float32.

        Args:
            rows: whole rows, or rows behind a prefix.
            deltas: ``δ`` of each edit of the batch, ``[T, d_model]``.
            record: gets the keys and values of what stands before the edit tokens of whole rows.
        """
        hidden = rows.output.hidden
        if deltas is not None:
            number = torch.arange(len(hidden), device=hidden.device)
            where = (number, torch.full_like(number, rows.token))
            hidden = hidden.index_put(where, deltas[rows.edit].to(hidden.dtype), accumulate=True)
        output = rows.output._replace(hidden=hidden)
        with ExitStack() as stack:
            stack.enter_context(skipped(self.below, lambda: output))
            stack.enter_context(output_replaced(self.layer, lambda: output))
            stack.enter_context(regathering(self.model))
            stack.enter_context(experts_run_at(self.between, rows.real, rows.ids.numel()))
            # from the last layer's experts on, no token reads another one; the forward that records does not rely on
            # that, since the first step is checked against it
            last = rows.predicting if record is None else rows.real
            stack.enter_context(experts_run_at(self.last, last, rows.ids.numel()))
            prefix = record if record is not None else rows.prefix
            scores = logits_at(self.model, rows.ids, rows.mask, rows.positions, rows.row, rows.column, prefix)
        return scores.float().log_softmax(-1)


def lay_out(model: PreTrainedModel, layer: ExpertLayer, by_edit: Sequence[Sequence[TargetRow]], pad_token: int) -> Rows:
    """Whole rows, run up to the target layer.

    Args:
        model: the model.
        layer: the target layer.
        by_edit: the rows of each edit.
        pad_token: id to pad with.
    """
    device = model.device
    rows = [row for own in by_edit for row in own]
    before, rest = zip(*(row.parts for row in rows), strict=True)
    left, right = pad(before, pad_token, side="left"), pad(rest, pad_token)
    ids, mask = (torch.cat(sides, 1).to(device) for sides in zip(left, right, strict=True))
    token = left[0].shape[1]
    places: list[tuple[int, int, int, float]] = []
    contexts = [sum(not row.is_neutral for row in own) for own in by_edit for _ in own]
    for number, (row, own) in enumerate(zip(rows, contexts, strict=True)):
        end, target = token + len(rest[number]), row.encoding.ids[row.encoding.target_start :]
        if row.is_neutral:
            places.append((number, end - 1, -1, 0.0))
        places += [(number, end - len(target) + i, label, 1 / (len(target) * own)) for i, label in enumerate(target)]
    of_row, column, label, weight = (torch.tensor(values, device=device) for values in zip(*places, strict=True))
    positions = position_ids(mask)
    edit = torch.tensor([edit for edit, own in enumerate(by_edit) for _ in own], device=device)
    with experts_run_on([*expert_layers(model).values()], mask.bool()):
        output = layer_output(model, layer, ids, mask, positions)
    return Rows(edit, ids, positions, mask, output, token, of_row, column, label, weight)
