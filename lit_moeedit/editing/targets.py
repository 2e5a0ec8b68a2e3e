"""Target vectors: hidden states with which the model outputs the new targets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, groupby
from typing import Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.editing.kv_prefix import prefix_for
from lit_moeedit.editing.recorded_step import Step, record
from lit_moeedit.editing.target_rows import Rows, TargetRow, UpperLayers, first_tokens, lay_out, vector_counts
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.padding import longest_padded
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.models.token_budget import Budget, TokenBudget, check_budget, target_cost
from lit_moeedit.precision import autocast
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import is_partitioned

log = logging.getLogger(__name__)

LossTokens = Literal["every", "first"]
"""Values of the setting ``loss_tokens`` of :class:`TargetOptimizer`."""


@dataclass(frozen=True)
class Targets:
    """The ``V`` target vectors of ``T`` edits.

    Attributes:
        deltas: ``δ``, ``[V, d_model]`` float32, to be added to the target layer's output at the edit tokens. Those of
            an edit are together, in the order of its edit tokens.
        nll: ``[T]``, mean negative log-likelihood of the target's tokens that count, with ``δ``, in nats.
        steps: ``[T]`` int64, number of optimiser steps of each edit.
        edit: ``[V]`` int64, index of each vector's edit, ascending; ``None`` if each edit has one vector.
    """

    deltas: Tensor
    nll: Tensor
    steps: Tensor
    edit: Tensor | None = None

    @property
    def are_finite(self) -> bool:
        """``True`` if all vectors and losses are."""
        return bool(torch.isfinite(self.deltas).all() and torch.isfinite(self.nll).all())

    @property
    def stuck(self) -> Tensor:
        """``[T]`` bool, edits that were optimised, but of which no gradient has reached any vector."""
        moved = (self.deltas != 0).any(-1)
        if self.edit is not None:
            moved = torch.zeros_like(self.steps).index_add(0, self.edit, moved.long()) > 0
        return (self.steps > 0) & ~moved


class TargetOptimizer:
    r"""Optimises the vectors of all edits in one batch (the target step of MEMIT 2210.07229 and MoEEdit).

    An edit has one vector for each of its edit tokens, ``V`` in number. All of them are optimised together:

    .. math:: \min_{\delta_1 \dots \delta_V} \; \frac 1 V \Big[ \sum_{i=1}^V \Big(
              \overline{-\log p(\text{target} \mid h_1 + \delta_1, \dots, h_V + \delta_V)}^{(i)}
              + w_d \, \|\delta_i\| / \|h_i\|^2 \Big) + w_{KL} \sum_q KL(p_0^q \,\|\, p_{\delta_1}^q) \Big], \qquad
              \|\delta_i\| \le c \, \|h_i\|

    The mean ``(i)`` is over the tokens of the target that vector ``i`` steers, and over several contexts. A single
    vector steers all of them, as in the papers; of several, each steers the token after its own edit token, and the
    last one those that are left. With ``loss_tokens="first"`` the mean is over the contexts only,

    .. math:: \overline{-\log p(\text{target} \mid h + \delta)} = \operatorname{mean}_c \,
              -\log p(y_1 \mid c, \text{prompt}, h + \delta),

    and the other tokens of the target are not even fed. A vector does not move while the loss of its tokens is low
    enough. The divergences are those of the next token after each neutral prompt ``q``, such as "{subject} is a", from
    the unedited model.

    The layers up to the target layer are run once, because ``δ`` is added after them. Tokens before the edit token do
    not depend on ``δ`` either, so their keys and values above the target layer are computed once, and a step runs only
    the edit token and the tokens after it. Models with linear attention or state-space layers run whole rows. An edit
    that has ended leaves the batch.

    Args:
        steps: maximum number of Adam steps.
        learning_rate: learning rate of Adam, in units of the hidden state.
        clamp: ``c``.
        weight_decay: ``w_d``.
        kl: ``w_KL``.
        stop: a vector rests while the negative log-likelihood per token that it steers (nats) is at most this. An edit
            ends when all of its vectors rest.
        token_budget: maximum number of tokens (with padding) in one batch of edits; ``auto`` chooses it from the free
            memory. If memory runs out, the remaining edits continue in batches of half the size.
        autocast: dtype of matrix products, for a model with float32 weights; ``None`` for the model's own. ``δ`` and
            the loss are always float32.
        cuda_graphs: whether to record a step on a GPU as a CUDA graph, and replay it. A step of a deep model launches
            some 10,000 kernels, and Python limits its speed: recorded, it takes half the time. The first replay is
            compared with the step itself. A step that cannot be recorded runs as usual. Off by default, because a
            recording that fails can leave the device in a state that ends the run.
        loss_tokens: the tokens of the target whose negative log-likelihood is the loss: ``every``, as in the papers, or
            the ``first`` one only, as in the code released with MoEEdit.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        steps: int = 25,
        learning_rate: float = 0.1,
        clamp: float = 0.75,
        weight_decay: float = 0.5,
        kl: float = 0.0625,
        stop: float = 0.05,
        token_budget: Budget = "auto",
        autocast: Literal["bfloat16"] | None = None,
        cuda_graphs: bool = False,
        loss_tokens: LossTokens = "every",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        check_budget(token_budget)
        for name, value in (("learning_rate", learning_rate), ("clamp", clamp)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name, value in (("weight_decay", weight_decay), ("kl", kl), ("stop", stop)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if autocast not in ("bfloat16", None):
            raise ValueError(f"autocast must be 'bfloat16' or None, got {autocast!r}")
        if loss_tokens not in get_args(LossTokens):
            raise ValueError(f"loss_tokens must be one of {', '.join(get_args(LossTokens))}, got {loss_tokens!r}")
        self.steps, self.learning_rate, self.clamp = steps, learning_rate, clamp
        self.weight_decay, self.kl, self.stop = weight_decay, kl, stop
        self.token_budget: Budget = token_budget
        self.autocast, self.cuda_graphs, self.loss_tokens = autocast, cuda_graphs, loss_tokens

    def with_stop(self, stop: float | None) -> Self:
        """Return the same settings with another ``stop``; ``None`` keeps it.

        Trials of settings call this. A class that hands the search on to another object has to override it.
        """
        if stop is None or stop == self.stop:
            return self
        other = copy(self)
        other.stop = stop
        return other

    def optimize(
        self,
        model: PreTrainedModel,
        layer: ExpertLayer,
        rows: Sequence[TargetRow],
        pad_token: int,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> Targets:
        """Find the vectors of every edit. The edits are sharded over the ranks, and the results all-gathered.

        Args:
            model: the model; none of its parameters gets a gradient.
            layer: the target layer.
            rows: texts of all edits, in ascending order of the edit. Each edit has at least one with a target.
            pad_token: id to pad with.
            progress: called with the number of edits done, and the number of all edits.
            ranks: the processes that share the work. Each calls this with the same rows.

        Raises:
            TooLittleMemoryError: if memory does not suffice for a single edit.
            ValueError: if the first token of a target alone counts, but its other tokens are edit tokens.
        """
        ranks = ranks or Ranks.current()
        if self.loss_tokens == "first":
            # in a causal model the first token does not depend on those after it
            rows = [row if row.is_neutral else row.with_first_token() for row in rows]
        by_edit = [list(own) for _, own in groupby(rows, key=lambda row: row.edit)]
        counts = vector_counts(by_edit)
        first = [0, *accumulate(counts)]
        parts: list[Targets] = []
        indices: list[Tensor] = []
        vectors: list[Tensor] = []
        left = list(range(len(by_edit)))

        def run(tokens: int) -> None:
            waiting = {edit: by_edit[edit] for edit in left}
            chunks = _chunks(waiting, tokens, -(-len(left) // ranks.size), longest_padded(model))
            with inference(model, gradients=True):
                for number, (chunk, mine) in enumerate(ranks.shard(chunks)):
                    part = _Batch(self, model, layer, [by_edit[e] for e in chunk], pad_token).run(ranks, mine)
                    own = chunk if mine else []
                    of_own = chain.from_iterable(range(first[edit], first[edit + 1]) for edit in own)
                    ranks.check_errors()  # all ranks keep the results of a round, or none does
                    parts.append(part)
                    indices.append(torch.tensor(own, dtype=torch.long, device=model.device))
                    vectors.append(torch.tensor([*of_own], dtype=torch.long, device=model.device))
                    done = set(chain(*chunks[number * ranks.size : (number + 1) * ranks.size]))
                    left[:] = [edit for edit in left if edit not in done]
                    if progress is not None:
                        progress(len(by_edit) - len(left), len(by_edit))
            ranks.check_errors()

        sizes = [_tokens(own) for own in by_edit]
        budget = TokenBudget(self.token_budget, batch_cost(model, layer, by_edit), model.device, ranks)
        budget.run("targets", run, least=max(sizes), most=sum(sizes))

        def gathered(name: str, of: Sequence[Tensor]) -> Tensor:
            order = torch.argsort(ranks.all_gather(torch.cat([*of])))
            return ranks.all_gather(torch.cat([getattr(part, name) for part in parts]))[order]

        several = torch.tensor(_repeated(counts), device=model.device) if max(counts) > 1 else None
        return Targets(gathered("deltas", vectors), gathered("nll", indices), gathered("steps", indices), several)


def _repeated(counts: Sequence[int]) -> list[int]:
    """Return each index as many times as is its count."""
    return [index for index, count in enumerate(counts) for _ in range(count)]


def _extent(rows: Sequence[TargetRow]) -> tuple[int, int]:
    """Return the maximum number of tokens from the edit token on, and before it, over some rows."""
    before, rest = zip(*(row.parts for row in rows), strict=True)
    return max(map(len, rest)), max(map(len, before))


def _tokens(rows: Sequence[TargetRow]) -> int:
    """Count the tokens of one edit's rows, with padding."""
    return len(rows) * sum(_extent(rows))


def batch_cost(model: PreTrainedModel, layer: ExpertLayer, by_edit: Sequence[Sequence[TargetRow]]) -> float:
    """Estimate bytes per token of a batch, see :func:`~lit_moeedit.models.token_budget.target_cost`."""
    rows = [row for own in by_edit for row in own]
    tokens = sum(map(_tokens, by_edit))
    cut = prefix_for(model, 0) is not None
    kept = sum(len(own) * _extent(own)[0] for own in by_edit) if cut else tokens
    predictions = sum(1 if row.is_neutral else len(row.encoding.ids) - row.encoding.target_start for row in rows)
    return target_cost(model, layer, kept / tokens, predictions / tokens)


def _chunks(
    by_edit: Mapping[int, Sequence[TargetRow]], token_budget: int, limit: int, longest: int | None = None
) -> list[list[int]]:
    """Group edits of similar lengths into chunks within the budget, each of 1 to ``limit`` edits.

    Edits with rows of more than ``longest`` tokens are together only if these rows have the same lengths, see
    :func:`~lit_moeedit.models.padding.longest_padded`. The rows of one edit stay together in any case.
    """
    extents = {edit: _extent(rows) for edit, rows in by_edit.items()}
    long = {edit: _long_rows(rows, longest) for edit, rows in by_edit.items()}
    chunks: list[list[int]] = []
    rows, width = 0, (0, 0)
    for edit in sorted(by_edit, key=extents.__getitem__):
        rest, before = extents[edit]
        rows, width = rows + len(by_edit[edit]), (max(width[0], rest), max(width[1], before))
        is_full = not chunks or len(chunks[-1]) == limit or rows * sum(width) > token_budget
        if is_full or long[edit] != long[chunks[-1][-1]]:
            chunks.append([])
            rows, width = len(by_edit[edit]), (rest, before)
        chunks[-1].append(edit)
    return chunks


def _long_rows(rows: Sequence[TargetRow], longest: int | None) -> set[int]:
    """Return the numbers of tokens of those rows that have more than ``longest``."""
    lengths = {sum(map(len, row.parts)) for row in rows}
    return set() if longest is None else {length for length in lengths if length > longest}


def can_record(model: PreTrainedModel, layer: ExpertLayer) -> bool:
    """Tell whether steps can be recorded as CUDA graphs. Gathering of sharded weights cannot."""
    return model.device.type == "cuda" and not is_partitioned(layer.down_proj)


class _Batch:
    """The optimisation of a batch of edits."""

    def __init__(
        self,
        settings: TargetOptimizer,
        model: PreTrainedModel,
        layer: ExpertLayer,
        by_edit: Sequence[Sequence[TargetRow]],
        pad_token: int,
    ) -> None:
        self.settings, self.upper, self.count = settings, UpperLayers(model, layer), len(by_edit)
        dtype = None if settings.autocast is None else torch.bfloat16
        self.precision = partial(autocast, model.device, dtype)
        with torch.no_grad(), self.precision():
            rows = lay_out(model, layer, by_edit, pad_token)
            prefix = None if rows.before is None else prefix_for(model, rows.before)
            output = self.upper.log_probabilities(rows, record=prefix)
        counts = vector_counts(by_edit)
        # of each vector
        self.of_edit = torch.tensor(_repeated(counts), device=rows.edit.device)
        self.share = torch.tensor([1 / count for count in counts], device=rows.edit.device)[self.of_edit]
        # h of a vector is that of its first row, which has no context before it
        first = torch.tensor(first_tokens(by_edit), device=rows.edit.device)
        self.norm = rows.output.hidden[rows.edited[first], rows.token[first]].float().norm(dim=-1)
        self.reference = output.index_select(0, rows.neutral)
        self.start = self._nll(rows, output)
        self.whole, self.rows = rows, rows if prefix is None else rows.after(prefix)
        self._can_record = settings.cuda_graphs and can_record(model, layer)
        self._recorded: Step | None = None

    def run(self, ranks: Ranks, mine: bool) -> Targets:
        """Optimise in step with the other ranks. The result is empty if the batch is not ``mine``."""
        settings, norm = self.settings, self.norm
        deltas = torch.zeros(len(norm), self.rows.output.hidden.shape[-1], device=norm.device)
        moment, square = torch.zeros_like(deltas), torch.zeros_like(deltas)
        nll = torch.full_like(norm, torch.inf)
        steps = torch.zeros(self.count, dtype=torch.long, device=norm.device)
        taken = torch.zeros_like(self.of_edit)
        active = torch.full((self.count,), mine, device=norm.device)
        for step in range(settings.steps + 1):
            now, gradient_of_loss = self._step(deltas, is_first=step == 0)
            if step == 0 and self.rows is not self.whole and ranks.any(not self._agrees(now)):
                log.warning(
                    "%s computes other log-probabilities from cached keys and values than from whole rows; "
                    "whole rows are run",
                    type(self.upper.model).__name__,
                )
                self.rows = self.whole
                now, gradient_of_loss = self._step(deltas, is_first=True)
            nll = torch.where(active[self.of_edit], now, nll)
            moving = active[self.of_edit] & (nll > settings.stop)
            active = torch.zeros_like(steps).index_add(0, self.of_edit, moving.long()) > 0
            if not ranks.any(step < settings.steps and bool(active.any())):
                break
            gradient = gradient_of_loss()
            # Adam by hand, because finished edits must not move, and each edit has its own step count
            chosen = moving[:, None]
            moment = torch.where(chosen, 0.9 * moment + 0.1 * gradient, moment)
            square = torch.where(chosen, 0.999 * square + 0.001 * gradient**2, square)
            steps, taken = steps + active, taken + moving
            correction = (1 - 0.9 ** taken.clamp_min(1))[:, None], (1 - 0.999 ** taken.clamp_min(1))[:, None]
            update = settings.learning_rate * (moment / correction[0]) / ((square / correction[1]).sqrt() + 1e-8)
            moved = deltas - update
            moved = moved * (settings.clamp * norm / moved.norm(dim=-1).clamp_min(1e-12)).clamp_max(1)[:, None]
            deltas = torch.where(chosen, moved, deltas)
            self._drop(active)
        nll = torch.zeros(self.count, device=nll.device).index_add(0, self.of_edit, self.share * nll)
        log.debug("targets: %d edits, nll %s after %s steps", self.count, nll.tolist(), steps.tolist())
        return Targets(deltas, nll, steps) if mine else Targets(deltas[:0], nll[:0], steps[:0])

    def _step(self, deltas: Tensor, is_first: bool) -> tuple[Tensor, Callable[[], Tensor]]:
        """Return negative log-likelihoods ``[V]``, and a function that returns the gradient of the loss."""
        if not is_first and self._can_record and self._recorded is None:
            self._recorded = record(self.whole_step, deltas)
            self._can_record = self._recorded is not None
        if not is_first and self._recorded is not None:
            now, gradient = self._recorded(deltas)
            return now, lambda: gradient
        variable = deltas.detach().requires_grad_(True)
        loss, now = self._loss(variable)
        return now, lambda: torch.autograd.grad(loss, variable)[0]

    def whole_step(self, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Return negative log-likelihoods and gradient, without waiting for a GPU."""
        now, gradient_of_loss = self._step(deltas, is_first=True)
        return now, gradient_of_loss()

    def _loss(self, deltas: Tensor) -> tuple[Tensor, Tensor]:
        with self.precision():
            output = self.upper.log_probabilities(self.rows, deltas)
        nll = self._nll(self.rows, output)
        neutral = output.index_select(0, self.rows.neutral)
        divergence = F.kl_div(neutral, self.reference, log_target=True, reduction="none")
        of_neutral = self.share[self.rows.steered[self.rows.neutral]][:, None]
        # the small constant keeps the gradient of the norm finite at zero
        decay = (self.share * (deltas.square().sum(-1) + 1e-12).sqrt() / self.norm**2).sum()
        loss = (self.share * nll).sum() + self.settings.kl * (of_neutral * divergence).sum()
        loss = loss + self.settings.weight_decay * decay
        return loss, nll.detach()

    def _nll(self, rows: Rows, output: Tensor) -> Tensor:
        """Compute the mean negative log-likelihood ``[V]`` of the tokens that each vector steers, in nats."""
        picked = output.gather(-1, rows.label.clamp_min(0)[:, None]).squeeze(-1)
        nll = torch.zeros(len(self.share), device=output.device)
        return nll.index_add(0, rows.steered, -picked * rows.weight) / self.share

    def _agrees(self, nll: Tensor) -> bool:
        """Tell if the loss from cached keys and values is that of whole rows before the first step."""
        # on average, because rounding may route single tokens to other experts
        exact = self.whole.output.hidden.dtype == torch.float32 and self.settings.autocast is None
        tolerance = 1e-3 if exact else 5e-2
        return bool((nll - self.start).abs().mean() <= tolerance * (1 + self.start.mean()))

    def _drop(self, active: Tensor) -> None:
        """Drop the rows of finished edits. A finished rank runs one row in step with the others."""
        kept = active[self.rows.edit]
        # another recording costs as much as some steps
        enough = 2 * int(kept.sum()) > len(kept) if self._recorded is not None else bool(kept.all())
        if enough or len(kept) == 1:
            return
        self._recorded = None
        if not bool(kept.any()):
            kept[0] = True
        neutral = self.rows.label < 0
        self.rows, predictions = self.rows.select(kept)
        self.reference = self.reference[predictions[neutral]]
