"""Target vectors: the hidden state that makes the model say the new target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import Encoding, pad, position_ids
from lit_moeedit.editing.running import (
    decoder_layers,
    hidden_states,
    inference,
    logits,
    output_replaced,
    skipped,
)
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.sharding.backward import beside_training
from lit_moeedit.sharding.graph import regathering
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Targets:
    """Result of the optimisation for ``T`` edits.

    Attributes:
        deltas: ``δ_t``, ``[T, d_model]`` float32, to be added to the target layer's output at the edit token.
        nll: ``[T]``, mean negative log-likelihood of the target's tokens with ``δ_t``, in nats.
        steps: ``[T]`` int64, optimiser steps that each edit took.
    """

    deltas: Tensor
    nll: Tensor
    steps: Tensor


class TargetOptimizer:
    r"""Optimises one vector per edit, all edits in one batch (the target step of MEMIT 2210.07229 and MoEEdit).

    .. math:: \min_{\delta_t} \; \overline{-\log p(\text{target}_t \mid h_t + \delta_t)}
              + w_{KL} \, KL(p_0 \,\|\, p_{\delta_t}) + w_d \, \|\delta_t\| / \|h_t\|^2, \qquad
              \|\delta_t\| \le c \, \|h_t\|

    The mean is over all tokens of the target and over several contexts; the divergence is from the unedited model's
    next token after a neutral prompt such as "{subject} is a". The layers up to the target layer are run once, because
    ``δ`` is added behind them; edits whose loss is low enough leave the batch.

    Args:
        steps: largest number of Adam steps.
        learning_rate: of Adam, in units of the hidden state.
        clamp: ``c``.
        weight_decay: ``w_d``.
        kl: ``w_KL``.
        stop: an edit is done when its negative log-likelihood per token (nats) is below this.
        token_budget: largest number of tokens (with padding) in one batch of edits.

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
        token_budget: int = 16384,
    ) -> None:
        for name, value in (("steps", steps), ("token_budget", token_budget)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, number in (("learning_rate", learning_rate), ("clamp", clamp)):
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        for name, number in (("weight_decay", weight_decay), ("kl", kl), ("stop", stop)):
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
        self.steps, self.learning_rate, self.clamp = steps, learning_rate, clamp
        self.weight_decay, self.kl, self.stop, self.token_budget = weight_decay, kl, stop, token_budget

    def optimize(
        self,
        model: PreTrainedModel,
        layer: ExpertLayer,
        rows: Sequence[TargetRow],
        pad_token: int,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks | None = None,
    ) -> Targets:
        """Find ``δ_t`` for every edit. The edits are dealt to the ranks; each gets the result for all of them.

        Args:
            model: the model; none of its parameters gets a gradient.
            layer: the target layer.
            rows: texts of all edits, in ascending order of the edit; each edit has at least one with a target.
            pad_token: id to pad with.
            progress: called with the edits done and all.
            ranks: the processes that share the work; each calls this with the same rows.
        """
        ranks = ranks if ranks is not None else Ranks()
        count = rows[-1].edit + 1
        longest = max(len(row.encoding.ids) for row in rows)
        per_edit = -(-len(rows) // count)
        size = max(1, min(self.token_budget // (longest * per_edit), -(-count // ranks.size)))
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        parts, numbers = [], []
        with inference(model, gradients=True), beside_training(model):
            for number, (chunk, mine) in enumerate(ranks.deal(chunks)):
                own = [TargetRow(r.edit - chunk.start, r.encoding) for r in rows if r.edit in chunk]
                parts.append(_Batch(self, model, layer, own, len(chunk), pad_token).run(ranks, mine))
                numbers.append(torch.tensor(chunk if mine else [], dtype=torch.long, device=model.device))
                if progress is not None:
                    progress(min((number + 1) * ranks.size * size, count), count)
        ranks.agree()
        order = torch.argsort(ranks.concatenate(torch.cat(numbers)))
        results = (torch.cat([getattr(part, name) for part in parts]) for name in ("deltas", "nll", "steps"))
        return Targets(*(ranks.concatenate(result)[order] for result in results))


class _Batch:
    """The optimisation of some edits at once. Rows are padded on the left, so that targets end in one column."""

    def __init__(
        self,
        settings: TargetOptimizer,
        model: PreTrainedModel,
        layer: ExpertLayer,
        rows: Sequence[TargetRow],
        count: int,
        pad_token: int,
    ) -> None:
        self.settings, self.model, self.layer, self.count = settings, model, layer, count
        device = model.device
        # the last token of a target is never an input: nothing is predicted from it
        inputs = [r.encoding.ids if r.is_neutral else r.encoding.ids[:-1] for r in rows]
        self.ids, self.mask = (x.to(device) for x in pad(inputs, pad_token, side="left"))
        length = self.ids.shape[1]
        shift = length - torch.tensor([len(i) for i in inputs])
        self.edit = torch.tensor([row.edit for row in rows], device=device)
        self.token = (shift + torch.tensor([row.encoding.edit_token for row in rows])).to(device)
        self.neutral = torch.tensor([row.is_neutral for row in rows], device=device)
        lengths = [len(row.encoding.ids) - row.encoding.target_start for row in rows]
        self.keep = max(1, *lengths)
        labels = [[-1] * (self.keep - n) + row.encoding.ids[-n:] if n else [-1] * self.keep
                  for row, n in zip(rows, lengths, strict=True)]  # fmt: skip
        self.labels = torch.tensor(labels, device=device)
        contexts = torch.zeros(count, device=device).index_add_(0, self.edit, (~self.neutral).float())
        tokens = (self.labels >= 0).sum(-1).clamp_min(1)
        self.weight = torch.where(self.neutral, 0.0, 1.0 / (tokens * contexts[self.edit]))
        layers = decoder_layers(model, layer)
        self.below = layers[: next(i for i, other in enumerate(layers) if other is layer.layer)]

    def run(self, ranks: Ranks, mine: bool) -> Targets:
        """Optimise, step by step with the other ranks; the result of a batch that is not ``mine`` is empty."""
        settings = self.settings
        with torch.no_grad():
            hidden = hidden_states(self.model, self.layer, self.ids, self.mask, position_ids(self.mask))
            everything = torch.arange(len(self.edit), device=hidden.device)
            reference = self._forward(hidden, everything, None)[:, -1].log_softmax(-1)
        # the edit's own h is that of its first row, which has no context before it
        first = torch.searchsorted(self.edit, torch.arange(self.count, device=hidden.device))
        norm = hidden[first, self.token[first]].float().norm(dim=-1)
        deltas = torch.zeros(self.count, hidden.shape[-1], device=hidden.device)
        moment, square = torch.zeros_like(deltas), torch.zeros_like(deltas)
        nll = torch.full((self.count,), torch.inf, device=hidden.device)
        steps = torch.zeros(self.count, dtype=torch.long, device=hidden.device)
        active = torch.full((self.count,), mine, device=hidden.device)
        for step in range(settings.steps + 1):
            # a rank that is done runs all its rows along with the others, and nothing moves
            rows = active[self.edit].nonzero().squeeze(-1) if bool(active.any()) else everything
            variable = deltas.detach().requires_grad_(True)
            loss, now = self._loss(hidden, rows, variable, reference, norm)
            nll = torch.where(active, now, nll)
            active = active & (nll > settings.stop)
            if not ranks.any(step < settings.steps and bool(active.any())):
                break
            (gradient,) = torch.autograd.grad(loss, variable)
            # Adam by hand: edits that are done must not move, and each edit has its own step count
            chosen = active[:, None]
            moment = torch.where(chosen, 0.9 * moment + 0.1 * gradient, moment)
            square = torch.where(chosen, 0.999 * square + 0.001 * gradient**2, square)
            steps += active
            correction = (1 - 0.9 ** steps.clamp_min(1))[:, None], (1 - 0.999 ** steps.clamp_min(1))[:, None]
            update = settings.learning_rate * (moment / correction[0]) / ((square / correction[1]).sqrt() + 1e-8)
            moved = deltas - update
            moved = moved * (settings.clamp * norm / moved.norm(dim=-1).clamp_min(1e-12)).clamp_max(1)[:, None]
            deltas = torch.where(chosen, moved, deltas)
        log.debug("targets: %d edits, nll %s after %s steps", self.count, nll.tolist(), steps.tolist())
        done = self.count if mine else 0
        return Targets(deltas[:done], nll[:done], steps[:done])

    def _loss(
        self, hidden: Tensor, rows: Tensor, deltas: Tensor, reference: Tensor, norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = self._forward(hidden, rows, deltas).log_softmax(-1)
        labels, edit = self.labels[rows], self.edit[rows]
        picked = output.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
        per_row = -(picked * (labels >= 0)).sum(-1) * self.weight[rows]
        nll = torch.zeros(self.count, device=hidden.device).index_add_(0, edit, per_row)
        neutral = self.neutral[rows]
        divergence = F.kl_div(output[neutral, -1], reference[rows][neutral], log_target=True, reduction="none").sum()
        touched = torch.zeros(self.count, device=hidden.device).index_fill_(0, edit, 1.0)
        # the small constant keeps the gradient of the norm finite at zero
        decay = (touched * (deltas.square().sum(-1) + 1e-12).sqrt() / norm**2).sum()
        loss = nll.sum() + self.settings.kl * divergence + self.settings.weight_decay * decay
        return loss, nll.detach()

    def _forward(self, hidden: Tensor, rows: Tensor, deltas: Tensor | None) -> Tensor:
        """Logits ``[rows, keep, vocabulary]`` float32, from the target layer's output on."""
        start = hidden[rows]
        if deltas is not None:
            where = (torch.arange(len(rows), device=rows.device), self.token[rows])
            start = start.index_put(where, deltas[self.edit[rows]].to(start.dtype), accumulate=True)
        mask = self.mask[rows]
        with ExitStack() as stack:
            stack.enter_context(skipped(self.below))
            stack.enter_context(output_replaced(self.layer.layer, lambda: start))
            stack.enter_context(regathering(self.model))
            return logits(self.model, self.ids[rows], mask, position_ids(mask), self.keep).float()
