"""Proofs on a card: the same edit as on the CPU, nothing left of an edit that is broken off, exact second moments."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import gpu_models
from lit_moeedit.data import Fact
from lit_moeedit.data.encoding import join, pad, pad_id, position_ids, token_batches, token_ids
from lit_moeedit.editing import Editor, TargetOptimizer, second_moments
from lit_moeedit.editing.routing_trace import trace_routing
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.keys import RoutedKeys, watch_keys
from lit_moeedit.models.partial_forward import inference, layer_output
from lit_moeedit.preservation import NullSpace
from lit_moeedit.solvers import BlockCoordinateDescent, PerExpertRidge, Tucker, Woodbury

EDIT_BOUND = 1e-3
"""Largest difference of two edits in float32, relative to the largest change of a weight: rounding of sums in another
order, through all steps of the targets and the solution of a system whose condition is up to 1e3 or so."""
MOMENTS_BOUND = 1e-4
"""Relative Frobenius error of second moments: float32 sums stay far below, products of 10 or 7 bits do not."""
EDITED = (1, 2)
BUDGET = 4096
"""Tokens of a batch of text where two passes have to run the same batches."""
NUDGE, NUDGES = 1e-5, 3
"""Relative change of all weights, at random, that must not send a token to another expert: 150 roundings of float32."""
_COMMON: dict[str, Any] = {
    "vocab_size": gpu_models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 16, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True,
    },
    "gpt_oss": {
        "head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
        "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}  # fmt: skip


def editors() -> dict[str, Editor]:
    """Five pairs of solver and preservation."""
    common: dict[str, Any] = {
        "layers": EDITED,
        "targets": TargetOptimizer(steps=4, learning_rate=0.1, stop=0.0),
    }
    return {
        "Woodbury, output": Editor(solver=Woodbury(), preserve="output", **common),
        "BlockCoordinateDescent, covariance": Editor(solver=BlockCoordinateDescent(), preserve="covariance", **common),
        # most of so few dimensions are in use; with the ridge of the papers, and not the default, what is left of a key
        # beside them is not blown up with its rounding
        "PerExpertRidge, nullspace": Editor(solver=PerExpertRidge(), preserve=NullSpace(0.5), ridge=1.0, **common),
        "Woodbury, none": Editor(solver=Woodbury(), preserve="none", **common),
        "Tucker, output": Editor(solver=Tucker(energy=0.9), preserve="output", **common),
    }


def check(name: str, value: float, bound: float | None = None, passed: bool = True) -> dict[str, Any]:
    """The outcome of a claim, which does not hold if the value is above its bound, or not a number."""
    return {"name": name, "value": value, "bound": bound, "passed": passed and (bound is None or value <= bound)}


def family_model(family: str) -> PreTrainedModel:
    """A small random float32 model on the CPU."""
    config = {"model_type": family, **_COMMON, **FAMILIES[family]}
    # large enough for experts, gates, biases and attention to matter, small enough for sane activations
    return gpu_models.random_model(config, torch.device("cpu"), torch.float32, deviation=0.3)


def decided(model: PreTrainedModel, words: PreTrainedTokenizerFast, texts: list[str]) -> list[bool]:
    """Tell which texts have no token that is undecided between two experts.

    Where two experts are equally good to a few roundings, the CPU may take one of them and a card the other, and both
    are right. So the routing of a text has to stay when every weight moves by much more than a rounding.
    """
    lengths = [len(ids) for ids in token_ids(words, texts)]
    first, stays = _routes(model, words, texts, lengths), [True] * len(texts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUDGES):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for weight in moved.parameters():
                weight *= 1 + NUDGE * torch.randn(weight.shape, generator=generator)
        pairs = zip(first, _routes(moved, words, texts, lengths), strict=True)
        stays = [torch.equal(one, other) and stay for (one, other), stay in zip(pairs, stays, strict=True)]
    return stays


def _routes(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, texts: list[str], lengths: list[int]
) -> tuple[Tensor, ...]:
    """The experts of each text's tokens, in all layers, in ascending order."""
    experts = trace_routing(model, words, texts).experts.values()
    return torch.cat([layer.sort(-1).values for layer in experts], dim=-1).split(lengths)


def down_projections(model: PreTrainedModel) -> Tensor:
    """Those of the edited layers, on the CPU, one behind the other."""
    layers = expert_layers(model)
    return torch.cat([layers[index].down_proj.detach().cpu().flatten() for index in EDITED])


def recording_editor() -> dict[str, Editor]:
    """An editor whose steps of the targets are recorded as CUDA graphs on a card, and run as ever on a CPU."""
    targets = TargetOptimizer(steps=4, learning_rate=0.1, stop=0.0, cuda_graphs=True)
    return {"Woodbury, output, CUDA graphs": Editor(EDITED, targets=targets)}


def compare_devices(
    device: torch.device,
    words: PreTrainedTokenizerFast,
    count: int,
    make_editors: Callable[[], dict[str, Editor]] = editors,
) -> dict[str, Any]:
    """Some editors in every family, on the card and on the CPU; and an edit of each family that is broken off."""
    candidates, statements = gpu_models.facts(3 * count), gpu_models.statements(100)
    found = []
    for family in FAMILIES:
        original = family_model(family)
        clear = decided(original, words, [join(fact.prompt, fact.target_new) for fact in candidates])
        facts = list(itertools.compress(candidates, clear))[:count]
        texts = list(itertools.compress(statements, decided(original, words, statements)))
        for name, editor in make_editors().items():
            after = []
            for where in (torch.device("cpu"), device):
                model = copy.deepcopy(original).to(where)
                editor.edit(model, words, facts, texts)
                after.append(down_projections(model))
            scale = float((after[0] - down_projections(original)).abs().max())
            # an edit that changes nothing would be the same everywhere
            difference = float((after[1] - after[0]).abs().max()) / scale if scale else float("nan")
            found.append(check(f"{family}: {name}", difference, EDIT_BOUND))
        found.append(broken_off(family, original.to(device), words, facts, texts))
    return {"checks": found}


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(module)}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the weights and buffers of which a bit is not as it was."""

    def raw(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1).view(torch.uint8)

    return [name for name, tensor in _tensors(module) if not torch.equal(raw(tensor), raw(before[name]))]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


class BrokenOffError(Exception):
    """Raised by a guard, in the place of anything that may happen to a run."""


def broken_off(
    family: str, model: PreTrainedModel, words: PreTrainedTokenizerFast, facts: list[Fact], texts: list[str]
) -> dict[str, Any]:
    """Break an edit off when all its layers are committed: number of tensors that are not bit for bit as before."""
    before = bits(model)
    seen: list[str] = []

    def guard() -> bool:
        seen.extend(changed(model, before))
        raise BrokenOffError

    with contextlib.suppress(BrokenOffError):
        Editor(EDITED, targets=TargetOptimizer(steps=2)).edit(model, words, facts, texts, guard=guard)
    left = len(changed(model, before))
    return check(f"{family}: tensors changed by an edit that was broken off", left, 0, passed=bool(seen))


def compare_moments(
    device: torch.device, words: PreTrainedTokenizerFast, case: gpu_models.Case, tokens: int
) -> dict[str, Any]:
    """Second moments of the first layer against float64 sums over the same keys.

    What reaches the first layer does not depend on how experts are run, so that nothing but the sums is compared.
    """
    # nothing is asked of the head
    config = {**case.config, "num_hidden_layers": 1, "vocab_size": gpu_models.VOCABULARY}
    texts = gpu_models.texts(words, tokens)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = gpu_models.random_model(config, device, dtype)
        layer = expert_layers(model)[0]
        for gated in (False, True):
            measured = second_moments(model, words, [layer], texts, BUDGET, gated=gated)[0].total.double()
            exact = exact_moments(model, words, layer, texts, gated)
            error = float((measured - exact).norm() / exact.norm())
            kind = "gated keys" if gated else "keys"
            found.append(check(f"second moments of {kind} in {str(dtype)[6:]}", error, MOMENTS_BOUND))
        del model, layer, measured, exact
    return {"checks": found}


def exact_moments(
    model: PreTrainedModel, words: PreTrainedTokenizerFast, layer: ExpertLayer, texts: list[str], gated: bool
) -> Tensor:
    """``Σ k kᵀ`` or ``Σ g² k kᵀ`` of every expert in float64, ``[E, d_hidden, d_hidden]``."""
    experts, _, d_hidden = layer.shape
    total = torch.zeros(experts, d_hidden, d_hidden, dtype=torch.float64, device=layer.down_proj.device)

    rows = [ids[:512] for ids in token_ids(words, texts)]
    chosen = torch.empty(0)

    def observe(_: ExpertLayer, seen: RoutedKeys) -> None:
        keys = seen.key.double() * (seen.gate.double()[:, None] if gated else 1)
        for expert, rows in enumerate(keys.split(torch.bincount(seen.expert, minlength=experts).tolist())):
            total[expert].addmm_(rows.T, rows)

    with inference(model), watch_keys([layer], lambda: chosen, observe):
        for batch in token_batches([len(ids) for ids in rows], BUDGET):
            ids, mask = (x.to(total.device) for x in pad([rows[i] for i in batch], pad_id(words)))
            chosen = mask.flatten().nonzero().squeeze(-1)
            layer_output(model, layer, ids, mask, position_ids(mask))
    return total
