"""The texts on which target vectors are optimised, as tensors, and their forward above the target layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
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
    """One text on which target vectors are optimised, one for each of its edit tokens.

    Attributes:
        edit: index of the edit.
        encoding: prompt, target and edit tokens; or a neutral prompt without a target, for the divergence from the
            unedited model, whose edit token has the first vector of the edit.
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

    def with_first_token(self) -> TargetRow:
        """Return the same text with the first token of its target only.

        Raises:
            ValueError: if tokens of the target are edit tokens.
        """
        encoding = self.encoding
        if encoding.further:
            raise ValueError("tokens of the target are edit tokens, so loss_tokens must be 'every', got 'first'")
        return replace(self, encoding=replace(encoding, ids=encoding.ids[: encoding.target_start + 1]))


@dataclass(frozen=True)
class EncodedFacts:
    """Facts as token ids.

    Attributes:
        rows: the texts of the target vectors. Those of a fact are its prompt in every context, then its neutral
            prompts.
        prompts: every fact's prompt in every context, up to its last edit token, from which keys and residuals are
            measured. Each edit token is a row of the problem.
        fact_index: index of the fact of each row.
        token_index: number of each row's edit token among those of its prompt.
        further: number of rows of further prompts, see :meth:`with_prompts`. They are the last ones.
    """

    rows: list[TargetRow]
    prompts: list[Encoding]
    fact_index: list[int]
    token_index: list[int]
    further: int = 0

    @cached_property
    def vector_fact(self) -> list[int]:
        """Index of the fact of each target vector. A fact has as many vectors as its longest row has edit tokens."""
        return [fact for fact, _ in self._vectors]

    @cached_property
    def vector_index(self) -> list[int]:
        """Index of the target vector of each row."""
        number = {vector: n for n, vector in enumerate(self._vectors)}
        return [number[vector] for vector in zip(self.fact_index, self.token_index, strict=True)]

    @cached_property
    def row_weight(self) -> list[float]:
        """Weight of each row's squared error. Further prompts share with a fact's own what the latter have alone."""
        own = len(self.fact_index) - self.further
        alone, all_rows = Counter(self.vector_index[:own]), Counter(self.vector_index)
        return [alone[vector] / all_rows[vector] for vector in self.vector_index]

    @cached_property
    def _vectors(self) -> list[tuple[int, int]]:
        return sorted(set(zip(self.fact_index, self.token_index, strict=True)))

    def with_prompts(self, further: Sequence[tuple[int, Encoding]]) -> Self:
        """Append further prompts of facts, up to their last edit tokens, to those from which keys are measured.

        The target vectors stay those of :attr:`rows`. A prompt with more edit tokens than its fact has vectors, whose
        target is another number of tokens there, is left out.

        Args:
            further: indices of facts, and their prompts with their targets.
        """
        counts = Counter(fact for fact, _ in self._vectors)
        fitting = [(fact, encoding) for fact, encoding in further if len(encoding.edit_tokens) <= counts[fact]]
        tokens = [(fact, i) for fact, encoding in fitting for i in range(len(encoding.edit_tokens))]
        return replace(
            self,
            prompts=[*self.prompts, *(encoding.up_to_edits() for _, encoding in fitting)],
            fact_index=[*self.fact_index, *(fact for fact, _ in tokens)],
            token_index=[*self.token_index, *(i for _, i in tokens)],
            further=self.further + len(tokens),
        )

    def with_neutral(self, rows: Sequence[TargetRow]) -> Self:
        """Append neutral prompts of facts to those of the search for target vectors."""
        return replace(self, rows=sorted([*self.rows, *rows], key=lambda row: row.edit))  # a stable sort

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        contexts: Sequence[str],
        neutral: str,
        token: EditToken,
        every: bool = False,
    ) -> Self:
        """Encode facts, with the settings of :class:`~lit_moeedit.editing.Editor`.

        Args:
            tokenizer: the tokenizer.
            facts: the facts.
            contexts: texts put before the prompts.
            neutral: a prompt with ``{}`` for the subject; empty for none.
            token: the edit token.
            every: true to make every token of a target, but for the last one, an edit token, too.
        """
        of_text = [t for t in range(len(facts)) for _ in contexts]
        texts = [join(context, fact.prompt) if context else fact.prompt for fact in facts for context in contexts]
        subjects = [facts[t].subject for t in of_text]
        encodings = encode(tokenizer, texts, [facts[t].target_new for t in of_text], subjects, token)
        if every:
            encodings = [encoding.with_every_token() for encoding in encodings]
        rows = [TargetRow(t, encoding) for t, encoding in zip(of_text, encodings, strict=True)]
        if neutral:
            texts = [neutral.replace("{}", fact.subject) for fact in facts]
            neutrals = encode(tokenizer, texts, [""] * len(facts), [f.subject for f in facts], "subject_last")
            rows += [TargetRow(t, encoding) for t, encoding in enumerate(neutrals)]
            rows.sort(key=lambda row: row.edit)  # a stable sort, so contexts come before the neutral prompt
        tokens = [(t, i) for t, e in zip(of_text, encodings, strict=True) for i in range(len(e.edit_tokens))]
        prompts = [encoding.up_to_edits() for encoding in encodings]
        return cls(rows, prompts, [t for t, _ in tokens], [i for _, i in tokens])


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
        edited: ``[p]``, row of each edit token.
        token: ``[p]``, its column.
        vector: ``[p]``, index of its vector in the batch.
        before: number of columns before all edit tokens; ``None`` if the first ones are in several columns.
        row: ``[m]``, row of each prediction.
        column: ``[m]``, column of the token from which each prediction is made.
        label: ``[m]``, the target's token; -1 in a neutral row.
        weight: ``[m]``, weight of the label's negative log-likelihood in the average over tokens and contexts.
        steered: ``[m]``, index of the vector by whose loss it counts: that of the last edit token before the label.
        prefix: keys and values of the tokens before the edit token, for rows that start at it.
    """

    edit: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    output: LayerOutput
    edited: Tensor
    token: Tensor
    vector: Tensor
    before: int | None
    row: Tensor
    column: Tensor
    label: Tensor
    weight: Tensor
    steered: Tensor
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
        tokens, number = kept[self.edited], kept.cumsum(0) - 1
        changes: dict[str, Any] = {name: getattr(self, name)[kept] for name in ("edit", "ids", "positions", "mask")}
        changes["output"] = self.output.at(kept)
        changes |= {name: getattr(self, name)[tokens] for name in ("token", "vector")}
        changes |= {name: getattr(self, name)[predictions] for name in ("column", "label", "weight", "steered")}
        changes |= {"edited": number[self.edited[tokens]], "row": number[self.row[predictions]]}
        return replace(self, **changes), predictions


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
            deltas: all ``δ`` of the batch, ``[V, d_model]``.
            record: a prefix that records keys and values of the tokens before the edit tokens of whole rows.
        """
        hidden = rows.output.hidden
        if deltas is not None:
            added = deltas[rows.vector].to(hidden.dtype)
            hidden = hidden.index_put((rows.edited, rows.token), added, accumulate=True)
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


def vector_counts(by_edit: Sequence[Sequence[TargetRow]]) -> list[int]:
    """Return the number of target vectors of each edit, that of the edit tokens of its longest row."""
    return [max(len(row.encoding.edit_tokens) for row in own) for own in by_edit]


def first_tokens(by_edit: Sequence[Sequence[TargetRow]]) -> list[int]:
    """Return the first edit token of each vector, as an index into those of all rows in their order."""
    rows = ((t, row) for t, own in enumerate(by_edit) for row in own)
    vectors = [(t, i) for t, row in rows for i in range(len(row.encoding.edit_tokens))]
    found = {vector: number for number, vector in reversed([*enumerate(vectors)])}
    return [found[vector] for vector in sorted(found)]


def lay_out(model: PreTrainedModel, layer: ExpertLayer, by_edit: Sequence[Sequence[TargetRow]], pad_token: int) -> Rows:
    """Lay out whole rows as tensors, and run them up to the target layer.

    Args:
        model: the model.
        layer: the target layer.
        by_edit: the rows of each edit.
        pad_token: id to pad with.
    """
    device = model.device
    rows, edit = [row for own in by_edit for row in own], [t for t, own in enumerate(by_edit) for _ in own]
    before, rest = zip(*(row.parts for row in rows), strict=True)
    is_aligned = prefix_for(model, 0) is not None
    if is_aligned:
        left, right = pad(before, pad_token, side="left"), pad(rest, pad_token)
        ids, mask = (torch.cat(sides, 1).to(device) for sides in zip(left, right, strict=True))
        tokens = [left[0].shape[1]] * len(rows)
    else:
        ids, mask = (x.to(device) for x in pad([[*a, *b] for a, b in zip(before, rest, strict=True)], pad_token))
        tokens = [len(a) for a in before]
    predictions: list[tuple[int, int, int, float, int]] = []
    places: list[tuple[int, int, int]] = []
    first = [0, *accumulate(vector_counts(by_edit))]
    contexts = [sum(not row.is_neutral for row in own) for own in by_edit for _ in own]
    for r, (row, own) in enumerate(zip(rows, contexts, strict=True)):
        end, target = tokens[r] + len(rest[r]), row.encoding.ids[row.encoding.target_start :]
        edit_tokens, vector = row.encoding.edit_tokens, first[edit[r]]
        places += [(r, tokens[r] + place - edit_tokens[0], vector + i) for i, place in enumerate(edit_tokens)]
        if row.is_neutral:
            predictions.append((r, end - 1, -1, 0.0, vector))
        for i, label in enumerate(target):
            steering = vector + min(i, len(edit_tokens) - 1)
            predictions.append((r, end - len(target) + i, label, 1 / (len(target) * own), steering))
    columns = zip(*predictions, strict=True)
    of_row, column, labels, weight, steered = (torch.tensor(values, device=device) for values in columns)
    positions = position_ids(mask)
    with experts_run_on([*expert_layers(model).values()], mask.bool()):
        output = layer_output(model, layer, ids, mask, positions)
    edited, token, added = torch.tensor(places, device=device).unbind(-1)
    of_edit, begin = torch.tensor(edit, device=device), tokens[0] if is_aligned else None
    predicted = of_row, column, labels, weight, steered
    return Rows(of_edit, ids, positions, mask, output, edited, token, added, begin, *predicted)
