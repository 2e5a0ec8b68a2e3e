"""The texts on which target vectors are optimised, as tensors, and their forward above the target layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken, Encoding, encode, join, pad, position_ids
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.kv_prefix import Prefix, logits_at, prefix_for
from lit_moeedit.interrupts import Undo, held
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
    """One text on which a target vector is optimised.

    Attributes:
        edit: index of the edit.
        encoding: prompt, target and edit token; or a neutral prompt without a target, for the divergence from the
            unedited model.
    """

    edit: int
    encoding: Encoding

    @property
    def is_neutral(self) -> bool:
        """``True`` for a neutral prompt, which has no target."""
        return self.encoding.target_start == len(self.encoding.ids)

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """The tokens before the edit token, and the input tokens from the edit token on."""
        ids, edit_token = self.encoding.ids, self.encoding.edit_token
        assert edit_token is not None
        # the last token of a target is no input, because nothing is predicted from it
        return ids[:edit_token], ids[edit_token:] if self.is_neutral else ids[edit_token:-1]


@dataclass(frozen=True)
class EncodedFacts:
    """Facts as token ids.

    Attributes:
        rows: the texts of the target vectors. Those of a fact are its prompt in every context, then its neutral prompt.
        prompts: every fact's prompt in every context, without a target, from which keys and residuals are measured.
        fact_index: index of the fact of each prompt.
    """

    rows: list[TargetRow]
    prompts: list[Encoding]
    fact_index: list[int]

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        contexts: Sequence[str],
        neutral: str,
        token: EditToken,
    ) -> Self:
        """Encode facts, with the settings of :class:`~lit_moeedit.editing.Editor`."""
        fact_index = [t for t in range(len(facts)) for _ in contexts]
        texts = [join(context, fact.prompt) if context else fact.prompt for fact in facts for context in contexts]
        subjects = [facts[t].subject for t in fact_index]
        encodings = encode(tokenizer, texts, [facts[t].target_new for t in fact_index], subjects, token)
        rows = [TargetRow(t, encoding) for t, encoding in zip(fact_index, encodings, strict=True)]
        if neutral:
            texts = [neutral.replace("{}", fact.subject) for fact in facts]
            neutrals = encode(tokenizer, texts, [""] * len(facts), [f.subject for f in facts], "subject_last")
            rows += [TargetRow(t, encoding) for t, encoding in enumerate(neutrals)]
            rows.sort(key=lambda row: row.edit)  # a stable sort, so contexts come before the neutral prompt
        prompts = [Encoding(e.ids[: e.target_start], e.target_start, e.edit_token) for e in encodings]
        return cls(rows, prompts, fact_index)


@dataclass(frozen=True)
class Rows:
    """``n`` rows of a batch of edits, whole or from the edit token on, and the ``m`` predictions that enter the loss.

    Rows are padded on the right. Where keys and values of the tokens before the edit tokens can be cached, these tokens
    are padded on the left, so that all edit tokens are in one column; attention with such a cache only masks padding.

    Attributes:
        edit: ``[n]``, index of the edit in the batch.
        ids: ``[n, length]``, token ids.
        positions: ``[n, length]``, position ids.
        mask: ``[n, length]``, or ``[n, prefix length + length]`` with a prefix.
        output: output of the target layer without ``δ``.
        token: ``[n]``, column of the edit token.
        before: number of columns before all edit tokens; ``None`` if edit tokens are in several columns.
        row: ``[m]``, row of each prediction.
        column: ``[m]``, column of the token from which each prediction is made.
        label: ``[m]``, the target's token; -1 in a neutral row.
        weight: ``[m]``, weight of the label's negative log-likelihood in the average over tokens and contexts.
        prefix: keys and values of the tokens before the edit token, for rows that start at it.
    """

    edit: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    output: LayerOutput
    token: Tensor
    before: int | None
    row: Tensor
    column: Tensor
    label: Tensor
    weight: Tensor
    prefix: Prefix | None = None

    # these indices are computed once for all steps, because the host waits for the GPU to learn their number

    @cached_property
    def real(self) -> Tensor:
        """Indices of the tokens that are no padding, among the flattened tokens of all rows."""
        return self.mask[:, -self.ids.shape[1] :].flatten().nonzero().squeeze(-1)

    @cached_property
    def predicting(self) -> Tensor:
        """Indices of the tokens from which a prediction is made, among the flattened tokens of all rows."""
        indices: Tensor = torch.unique(self.row * self.ids.shape[1] + self.column)
        return indices

    @cached_property
    def neutral(self) -> Tensor:
        """Indices of the predictions in neutral rows."""
        return (self.label < 0).nonzero().squeeze(-1)

    def after(self, prefix: Prefix) -> Rows:
        """Return the rows from the edit token on, after a recorded prefix."""
        prefix.fix()
        begin = self.before
        assert begin is not None
        cut = {name: getattr(self, name)[:, begin:] for name in ("ids", "positions")}
        output = self.output.at(slice(None), slice(begin, None))
        token, column = self.token - begin, self.column - begin
        return replace(self, **cut, output=output, token=token, before=0, column=column, prefix=prefix)

    def select(self, kept: Tensor) -> tuple[Rows, Tensor]:
        """Select rows by a mask ``[n]``; also return the mask ``[m]`` of their predictions."""
        predictions = kept[self.row]
        if self.prefix is not None:
            self.prefix.select(kept)
        of_rows = ("edit", "ids", "positions", "mask", "token")
        changes: dict[str, Any] = {name: getattr(self, name)[kept] for name in of_rows}
        changes["output"] = self.output.at(kept)
        changes |= {name: getattr(self, name)[predictions] for name in ("column", "label", "weight")}
        return replace(self, **changes, row=(kept.cumsum(0) - 1)[self.row[predictions]]), predictions


class UpperLayers:
    """The part of a model above the target layer.

    Args:
        model: the model.
        layer: the target layer.
    """

    def __init__(self, model: PreTrainedModel, layer: ExpertLayer) -> None:
        self.model, self.layer = model, layer.layer
        layers = decoder_layers(model, layer)
        index = next(i for i, other in enumerate(layers) if other is layer.layer)
        self.below, above = layers[:index], layers[index + 1 :]
        experts = expert_layers(model).values()
        self.between = [other for other in experts if any(other.layer is one for one in above[:-1])]
        self.last = [other for other in experts if any(other.layer is one for one in above[-1:])]

    def log_probabilities(self, rows: Rows, deltas: Tensor | None = None, record: Prefix | None = None) -> Tensor:
        """Compute the log-probabilities of the predictions, ``[m, vocabulary]`` float32.

        Args:
            rows: whole rows, or rows after a prefix.
            deltas: ``δ`` of each edit of the batch, ``[T, d_model]``.
            record: a prefix that records keys and values of the tokens before the edit tokens of whole rows.
        """
        hidden = rows.output.hidden
        if deltas is not None:
            row = torch.arange(len(hidden), device=hidden.device)
            hidden = hidden.index_put((row, rows.token), deltas[rows.edit].to(hidden.dtype), accumulate=True)
        output = rows.output._replace(hidden=hidden)
        with held(Undo()) as undo:
            undo.enter_context(skipped(self.below, lambda: output))
            undo.enter_context(output_replaced(self.layer, lambda: output))
            undo.enter_context(regathering(self.model))
            undo.enter_context(experts_run_at(self.between, rows.real, rows.ids.numel()))
            # from the last layer's experts on, no token reads another one; the recording forward does not rely on that,
            # because the first step is compared with it
            last = rows.predicting if record is None else rows.real
            undo.enter_context(experts_run_at(self.last, last, rows.ids.numel()))
            prefix = record if record is not None else rows.prefix
            scores = logits_at(self.model, rows.ids, rows.mask, rows.positions, rows.row, rows.column, prefix)
        return scores.float().log_softmax(-1)


def lay_out(model: PreTrainedModel, layer: ExpertLayer, by_edit: Sequence[Sequence[TargetRow]], pad_token: int) -> Rows:
    """Lay out whole rows as tensors, and run them up to the target layer.

    Args:
        model: the model.
        layer: the target layer.
        by_edit: the rows of each edit.
        pad_token: id to pad with.
    """
    device = model.device
    rows = [row for own in by_edit for row in own]
    before, rest = zip(*(row.parts for row in rows), strict=True)
    is_aligned = prefix_for(model, 0) is not None
    if is_aligned:
        left, right = pad(before, pad_token, side="left"), pad(rest, pad_token)
        ids, mask = (torch.cat(sides, 1).to(device) for sides in zip(left, right, strict=True))
        tokens = [left[0].shape[1]] * len(rows)
    else:
        ids, mask = (x.to(device) for x in pad([[*a, *b] for a, b in zip(before, rest, strict=True)], pad_token))
        tokens = [len(a) for a in before]
    predictions: list[tuple[int, int, int, float]] = []
    contexts = [sum(not row.is_neutral for row in own) for own in by_edit for _ in own]
    for r, (row, own) in enumerate(zip(rows, contexts, strict=True)):
        end, target = tokens[r] + len(rest[r]), row.encoding.ids[row.encoding.target_start :]
        if row.is_neutral:
            predictions.append((r, end - 1, -1, 0.0))
        predictions += [(r, end - len(target) + i, label, 1 / (len(target) * own)) for i, label in enumerate(target)]
    of_row, column, label, weight = (torch.tensor(values, device=device) for values in zip(*predictions, strict=True))
    positions = position_ids(mask)
    edit = torch.tensor([edit for edit, own in enumerate(by_edit) for _ in own], device=device)
    with experts_run_on([*expert_layers(model).values()], mask.bool()):
        output = layer_output(model, layer, ids, mask, positions)
    token, begin = torch.tensor(tokens, device=device), tokens[0] if is_aligned else None
    return Rows(edit, ids, positions, mask, output, token, begin, of_row, column, label, weight)
