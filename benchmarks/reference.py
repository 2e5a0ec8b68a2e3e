"""The edit as the published research code of this field does it: one fact at a time, one expert at a time.

What :mod:`benchmarks.editing` is compared with. A transcription of MoEEdit (arXiv 2602.10965) in the manner of the
code of ROME, MEMIT and AlphaEdit: hooks on every expert, second moments with a loop over experts, one Adam loop per
fact through the whole model, one forward per prompt for the features, projectors of all experts, and block coordinate
descent that sums over all experts again for each block. Nothing is batched over facts, skipped or cached. It edits a
Qwen3-MoE in one process.

With the settings of the papers it is kinder than the code that MoEEdit's authors released: targets are the mean over
all of their tokens, the residual is that of the target layer, and layers take one over the layers left of it. An editor
with ``residual_of``, ``residual_share`` and ``loss_tokens`` as released is followed in these, too. Padding has no part
in second moments in either case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.one_at_a_time import reference_targets
from lit_moeedit.data.encoding import encode, join, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import PHASES, Editor
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation import NullSpace
from lit_moeedit.solvers import BlockCoordinateDescent


@dataclass
class Outcome:
    """Seconds by phase and in all."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def timed(self, phase: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        self.seconds[phase] += time.perf_counter() - start
        return result


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    texts: Sequence[str],
    editor: Editor,
) -> Outcome:
    """Edit the facts into the model's weights, with the settings of an editor of null spaces and its BCD."""
    assert isinstance(editor.solver, BlockCoordinateDescent) and isinstance(editor.preserve, NullSpace)
    model.eval().requires_grad_(False)
    outcome, start = Outcome(), time.perf_counter()
    blocks = model.model.layers
    projectors = {}
    for layer in editor.layers:
        moments = outcome.timed("statistics", second_moments, model, tokenizer, blocks[layer].mlp.experts, texts)
        projectors[layer] = outcome.timed("statistics", null_spaces, moments, editor.preserve)
    top = blocks[editor.layers[-1]]
    goals = []
    for fact in facts:
        delta = outcome.timed("targets", target_vector, model, tokenizer, fact, editor)
        for context in editor.contexts:
            goals.append(outcome.timed("targets", hidden_state, model, tokenizer, top, fact, context, editor) + delta)
    for number, layer in enumerate(editor.layers):
        experts, left = blocks[layer].mlp.experts, len(editor.layers) - number
        measured = blocks[layer] if editor.residual_of == "each_layer" else top
        features, residuals = [], []
        prompts = [(fact, context) for fact in facts for context in editor.contexts]
        for goal, (fact, context) in zip(goals, prompts, strict=True):
            now = outcome.timed("features", hidden_state, model, tokenizer, measured, fact, context, editor)
            residuals.append((goal - now) / (left**0.5 if editor.residual_share == "root_of_layers_left" else left))
            keys = outcome.timed("features", gated_keys, model, tokenizer, experts, fact, context, editor)
            features.append({j: projectors[layer][j] @ key for j, key in keys.items()})
        rows = torch.stack(residuals)
        deltas = outcome.timed("solve", descend, features, rows, experts, editor.ridge, editor.solver.passes)
        outcome.timed("commit", add, experts, deltas, projectors[layer])
    outcome.seconds["edit"] = time.perf_counter() - start
    return outcome


def target_vector(model: PreTrainedModel, tokenizer: Any, fact: Fact, editor: Editor) -> Tensor:
    """``δ`` of one fact, optimised through the whole model."""
    rows = editor.encode(tokenizer, [fact]).rows
    layer = expert_layers(model)[editor.layers[-1]]
    return reference_targets(model, layer, rows, editor.targets, pad_id(tokenizer)).deltas[0]


def prompt_ids(tokenizer: Any, fact: Fact, context: str, target: str, editor: Editor) -> tuple[Tensor, int, int]:
    """Token ids ``[1, length]``, where the target starts, and the edit token."""
    prompt = join(context, fact.prompt) if context else fact.prompt
    encoding = encode(tokenizer, [prompt], [target], [fact.subject], editor.token)[0]  # type: ignore[arg-type]
    assert encoding.edit_token is not None
    return torch.tensor([encoding.ids]), encoding.target_start, encoding.edit_token


def routed(experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys ``[n, d_hidden]`` and gates ``[n]`` of each expert, from the inputs of the experts module."""
    hidden, index, weights = inputs
    found = {}
    for expert in range(len(experts.down_proj)):
        tokens, places = (index == expert).nonzero(as_tuple=True)
        if len(tokens):
            key = experts._apply_gate(hidden[tokens] @ experts.gate_up_proj[expert].T)
            found[expert] = key, weights[tokens, places]
    return found


@torch.no_grad()
def second_moments(model: PreTrainedModel, tokenizer: Any, experts: Any, texts: Sequence[str]) -> Tensor:
    """``C_j`` of every expert of one layer ``[E, d_hidden, d_hidden]``, in batches of 32 texts."""
    count, _, size = experts.down_proj.shape
    total, seen = torch.zeros(count, size, size), torch.zeros(count)
    batch: dict[str, Tensor] = {}

    def hook(module: Any, inputs: Any) -> None:
        real = batch["attention_mask"].flatten().bool()
        for expert, (keys, _) in routed(module, tuple(x[real] for x in inputs)).items():
            total[expert] += keys.T @ keys
            seen[expert] += len(keys)

    handle = experts.register_forward_pre_hook(hook)
    for start in range(0, len(texts), 32):
        batch.update(tokenizer(texts[start : start + 32], return_tensors="pt", padding=True))
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    handle.remove()
    return total / seen.clamp_min(1)[:, None, None]


def null_spaces(moments: Tensor, preserve: NullSpace) -> list[Tensor]:
    """The projector of every expert; of one without text, what the settings say."""
    projectors = []
    for moment in moments:
        values, vectors = torch.linalg.eigh(moment)
        is_free = preserve.unused or bool(moment.any())
        kept = vectors[:, (values <= preserve.threshold) & is_free]
        projectors.append(kept @ kept.T)
    return projectors


@torch.no_grad()
def hidden_state(
    model: PreTrainedModel, tokenizer: Any, layer: Any, fact: Fact, context: str, editor: Editor
) -> Tensor:
    """Output ``[d_model]`` of a layer at the edit token."""
    ids, start, token = prompt_ids(tokenizer, fact, context, fact.target_new, editor)
    found: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: found.append(output[0, token]))
    model(input_ids=ids[:, :start], use_cache=False)
    handle.remove()
    return found[0]


@torch.no_grad()
def gated_keys(
    model: PreTrainedModel, tokenizer: Any, experts: Any, fact: Fact, context: str, editor: Editor
) -> dict[int, Tensor]:
    """``g_tj k_tj`` of each expert that the edit token visits."""
    ids, start, token = prompt_ids(tokenizer, fact, context, fact.target_new, editor)
    found: list[dict[int, tuple[Tensor, Tensor]]] = []

    def hook(module: Any, inputs: Any) -> None:
        found.append(routed(module, tuple(x[token : token + 1] for x in inputs)))

    handle = experts.register_forward_pre_hook(hook)
    model(input_ids=ids[:, :start], use_cache=False)
    handle.remove()
    return {expert: gate * key[0] for expert, (key, gate) in found[0].items()}


def descend(features: list[dict[int, Tensor]], residuals: Tensor, experts: Any, ridge: float, passes: int) -> Tensor:
    """Block coordinate descent as published: what the other experts do is summed anew for each block."""
    count, d_model, d_hidden = experts.down_proj.shape
    deltas = torch.zeros(count, d_model, d_hidden)
    stacked = torch.zeros(count, len(features), d_hidden)
    for edit, by_expert in enumerate(features):
        for expert, feature in by_expert.items():
            stacked[expert, edit] = feature
    visited = [expert for expert in range(count) if bool(stacked[expert].any())]
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        for block in torch.randperm(len(visited), generator=generator).tolist():
            chosen = visited[block]
            wanted = residuals.clone()
            for other in visited:
                if other != chosen:
                    wanted -= stacked[other] @ deltas[other].T
            rows = stacked[chosen]
            system = rows.T @ rows + ridge * torch.eye(d_hidden)
            deltas[chosen] = torch.linalg.solve(system, rows.T @ wanted).T
    return deltas


@torch.no_grad()
def add(experts: Any, deltas: Tensor, projectors: list[Tensor]) -> None:
    """Add the projected deltas to the weights."""
    for expert, delta in enumerate(deltas):
        experts.down_proj[expert] += delta @ projectors[expert]
