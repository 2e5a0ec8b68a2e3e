"""Target vectors as the published scripts find them: for one fact after another, a loop of full forwards.

The reference that other benchmarks measure against; it shares no code with the library's optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import pad
from lit_moeedit.editing.targets import TargetOptimizer, TargetRow, Targets
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import inference


def reference_targets(
    model: PreTrainedModel,
    layer: ExpertLayer,
    rows: Sequence[TargetRow],
    settings: TargetOptimizer,
    pad_token: int = 0,
    facts_at_once: int = 1,
) -> Targets:
    """Target vectors of all edits, found as MEMIT, AlphaEdit and MoEEdit do.

    A fact's contexts and its neutral prompt are one padded batch. Every step of torch's Adam is a forward through all
    layers with ``δ`` added by a hook, the log-softmax at all positions, and a backward pass. The parameters are frozen,
    as published. One thing differs from the scripts, so that both sides of a comparison stop at the same point: a fact
    is done when the negative log-likelihood of its target is below ``settings.stop``, not when the sum of all terms is.

    Args:
        model: the model.
        layer: the target layer.
        rows: texts of all edits, in ascending order of the edit.
        settings: hyperparameters; ``token_budget`` and ``autocast`` are not used.
        pad_token: id to pad with.
        facts_at_once: 1 as published; more for plain batching, where all facts run until the last one is done.
    """
    by_edit = [list(own) for _, own in groupby(rows, key=lambda row: row.edit)]
    results = []
    with inference(model, gradients=True):
        for start in range(0, len(by_edit), facts_at_once):
            results.append(_optimise(model, layer, by_edit[start : start + facts_at_once], settings, pad_token))
    return Targets(*(torch.cat(parts) for parts in zip(*results, strict=True)))


def _optimise(
    model: PreTrainedModel,
    layer: ExpertLayer,
    by_edit: Sequence[Sequence[TargetRow]],
    settings: TargetOptimizer,
    pad_token: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors, losses and steps of some facts."""
    device, count = model.device, len(by_edit)
    rows = [row for own in by_edit for row in own]
    edit = torch.tensor([number for number, own in enumerate(by_edit) for _ in own], device=device)
    ids, mask = (x.to(device) for x in pad([row.encoding.ids for row in rows], pad_token))
    token = torch.tensor([row.encoding.edit_token for row in rows], device=device)
    everywhere = torch.arange(len(rows), device=device)
    last = mask.sum(-1) - 1
    neutral = torch.tensor([row.is_neutral for row in rows], device=device)
    # position i predicts token i + 1
    place = torch.arange(ids.shape[1], device=device)
    start = torch.tensor([row.encoding.target_start for row in rows], device=device)
    end = torch.minimum(start, last) if settings.loss_tokens == "first" else last
    wanted = (place[1:] >= start[:, None]) & (place[1:] <= end[:, None])
    contexts = torch.zeros(count, device=device).index_add_(0, edit, (~neutral).float())
    deltas = torch.zeros(count, model.config.get_text_config().hidden_size, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([deltas], lr=settings.learning_rate)
    norm = torch.zeros(count, device=device)

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not norm.any():
            first = torch.searchsorted(edit, torch.arange(count, device=device))
            norm.copy_(hidden[first, token[first]].detach().float().norm(dim=-1))
        hidden = hidden.clone()
        hidden[everywhere, token] += deltas[edit].to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    reference: Tensor | None = None
    final, loss_at_end = torch.zeros_like(deltas), torch.zeros(count, device=device)
    steps, done = (
        torch.zeros(count, dtype=torch.long, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
    )
    handle = layer.layer.register_forward_hook(add)
    try:
        for step in range(settings.steps + 1):
            output = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
            picked = output[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) * wanted
            per_row = -picked.sum(-1) / wanted.sum(-1).clamp_min(1)
            nll = torch.zeros(count, device=device).index_add(0, edit, per_row) / contexts
            finished = ((nll <= settings.stop) | (step == settings.steps)) & ~done
            final[finished] = deltas.detach()[finished]
            loss_at_end[finished] = nll.detach()[finished]
            steps[finished] = step
            done |= finished
            if bool(done.all()):
                break
            calm = output[everywhere, last][neutral]
            if reference is None:
                reference = calm.detach()
            divergence = F.kl_div(calm, reference, log_target=True, reduction="none").sum()
            decay = ((deltas.square().sum(-1) + 1e-12).sqrt() / norm**2).sum()
            optimizer.zero_grad()
            (nll.sum() + settings.kl * divergence + settings.weight_decay * decay).backward()
            optimizer.step()
            with torch.no_grad():
                deltas *= (settings.clamp * norm / deltas.norm(dim=-1).clamp_min(1e-12)).clamp_max(1)[:, None]
    finally:
        handle.remove()
    return final.detach(), loss_at_end, steps
