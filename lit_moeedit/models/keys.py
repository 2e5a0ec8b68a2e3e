"""Watching experts at work: where tokens are sent, and the keys that experts compute of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lit_moeedit.models.experts import ExpertLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCK = {"cpu": 512}
"""Largest number of rows of one expert that are computed at a time, by kind of device: a CPU can cache these."""
LARGE_BLOCK = 4096
"""The same on any other device."""
ALIGNMENT = 16
"""Bytes at multiples of which grouped products want matrices and their rows to begin."""

# where torch 2.9 has it
_grouped_mm: Callable[..., Tensor] = getattr(nn.functional, "grouped_mm", None) or torch._grouped_mm


@dataclass(frozen=True)
class Routing:
    """Where one layer sent its tokens: ``experts [tokens, k]`` int64 and ``gates [tokens, k]``."""

    experts: Tensor
    gates: Tensor


@dataclass(frozen=True)
class RoutedKeys:
    """What the experts of one layer saw of the watched tokens, one row per (token, expert) pair.

    Attributes:
        token: ``[N]`` int64, index into the flattened ``[batch · length]`` tokens.
        expert: ``[N]`` int64, ascending.
        gate: ``[N]``, the routing weight that the experts module received.
        key: ``[N, d_hidden]``, the expert's activation before its down-projection.
    """

    token: Tensor
    expert: Tensor
    gate: Tensor
    key: Tensor


@contextmanager
def watch_routing(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], observe: Callable[[ExpertLayer, Routing], None]
) -> Iterator[None]:
    """While open, call ``observe`` with the routing of every forward of the given layers."""

    def look(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> None:
        observe(layer, Routing(experts.detach(), gates.detach()))

    with _intercepted(model, layers, look):
        yield


@contextmanager
def watch_keys(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    select: Callable[[], Tensor | None],
    observe: Callable[[ExpertLayer, RoutedKeys], None],
) -> Iterator[None]:
    """While open, call ``observe`` with keys and gates of the selected tokens in every forward of the given layers.

    The keys are computed here from the experts' own up-projections, for the selected tokens only; the forward itself
    runs as configured. So a handful of edit tokens costs next to nothing, and nothing depends on which
    implementation of the experts is in use.

    Args:
        model: the model whose forward is run inside.
        layers: layers to watch.
        select: called once per layer and forward; the flattened token positions ``[n]`` to watch, ``None`` for all.
        observe: called with the layer and its keys.
    """

    def look(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> None:
        positions = select()
        with torch.no_grad():
            observe(layer, routed_keys(layer, hidden, experts, gates, positions))

    with _intercepted(model, layers, look):
        yield


def routed_keys(
    layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor, positions: Tensor | None = None
) -> RoutedKeys:
    """Keys of one layer for given inputs.

    Args:
        layer: the layer.
        hidden: ``[tokens, d_model]``, input of the experts module.
        experts: ``[tokens, k]`` int64, chosen experts.
        gates: ``[tokens, k]``, their weights.
        positions: ``[n]`` int64, the tokens wanted; ``None`` for all.
    """
    pairs = _pairs(layer, experts, positions)
    if can_group(layer):
        keys = _grouped_keys(layer, hidden[pairs.token], pairs)
    else:
        rows = [_key(layer, j, hidden[token]) for j, token, _ in pairs.blocks()]
        keys = torch.cat(rows) if rows else hidden.new_zeros(0, layer.shape[2], dtype=layer.down_proj.dtype)
    return RoutedKeys(pairs.token, pairs.expert, gates.reshape(-1)[pairs.slot], keys)


@dataclass(frozen=True)
class KeyRows:
    """Keys of some experts, in a forward.

    Attributes:
        counts: rows of each expert that has any, by expert, ascending.
        key: ``[n, d_hidden]``, rows of the first expert, then of the second, and so on.
        gate: ``[n]``.
    """

    counts: Mapping[int, int]
    key: Tensor
    gate: Tensor


@contextmanager
def stream_keys(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    select: Callable[[], Tensor | None],
    observe: Callable[[ExpertLayer, KeyRows], None],
    last: ExpertLayer | None = None,
    grouped: bool | None = None,
) -> Iterator[None]:
    """While open, run the experts of the given layers here and hand out the keys of the selected tokens on their way.

    Where all tokens are of interest, this costs nothing besides what ``observe`` does: no projection is computed twice.
    The configured implementation of the experts, and whatever watches from outside of this context, is not called for
    these layers. Without gradients.

    Args:
        model: the model whose forward is run inside.
        layers: layers to watch, of those that :func:`check_editable` lets pass.
        select: called once per layer and forward; the flattened token positions ``[n]`` to run, ``None`` for all. The
            experts' output is 0 for the others, so those must be tokens that nobody attends to.
        observe: called with the layer and keys: of all experts at once, or of one expert, a block at most.
        last: a layer whose output nobody wants: it is 0, and its down-projections are not computed.
        grouped: whether all experts of a layer are run at once, in grouped products: a few kernels in place of a dozen
            for each expert, and the keys of all pairs in memory. Otherwise one block of one expert is run at a time,
            which stays in a CPU's cache. ``None`` for what :func:`can_group` says.
    """

    def run(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        with torch.no_grad():
            pairs = _pairs(layer, experts, select())
            gates = gates.reshape(-1)
            if can_group(layer) if grouped is None else grouped:
                return _run_grouped(layer, hidden, pairs, gates, observe, is_last=layer is last)
            # several experts' outputs are added up: in float32, as in the implementations of transformers
            output = torch.zeros(hidden.shape, device=hidden.device)
            for j, token, slot in pairs.blocks():
                key, gate = _key(layer, j, hidden[token]), gates[slot]
                observe(layer, KeyRows({j: len(key)}, key, gate))
                if layer is not last:
                    output.index_add_(0, token, _project(layer, "down_proj", j, key) * gate[:, None].float())
            return output.to(hidden.dtype)

    with _intercepted(model, layers, run):
        yield


def can_group(layer: ExpertLayer) -> bool:
    """Tell whether all experts of a layer are run at once: on a GPU, if its grouped products take such matrices."""
    weight = layer.down_proj
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    weights = [getattr(layer.experts, name) for name in (_up_name(layer), "down_proj")]
    sizes = (size for weight in weights for size in getattr(weight, "ds_shape", weight.shape)[1:])
    # a weight within a flat buffer, of DeepSpeed say, can begin anywhere
    begins = all(weight.data_ptr() % ALIGNMENT == 0 for weight in weights)
    return begins and all(size * weight.element_size() % ALIGNMENT == 0 for size in sizes)


def _run_grouped(
    layer: ExpertLayer,
    hidden: Tensor,
    pairs: _Pairs,
    gates: Tensor,
    observe: Callable[[ExpertLayer, KeyRows], None],
    is_last: bool,
) -> Tensor:
    """Output of the experts, ``[tokens, d_model]``, computed for all of them at once."""
    key, gate = _grouped_keys(layer, hidden[pairs.token], pairs), gates[pairs.slot]
    observe(layer, KeyRows({j: count for j, count in enumerate(pairs.counts) if count}, key, gate))
    if is_last:
        return torch.zeros_like(hidden)
    output = _grouped_project(layer, "down_proj", key, pairs)
    # each pair back to its place and then a sum: unlike adding by index, this is the same in every run
    weighted = output * gate[:, None]  # of the wider dtype: some routers hand over float32
    k = len(gates) // max(1, len(hidden))
    placed = weighted.new_zeros(len(gates), output.shape[-1]).index_copy_(0, pairs.slot, weighted)
    return placed.view(len(hidden), k, -1).sum(1, dtype=torch.float32).to(hidden.dtype)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of token and expert, sorted by expert, their places in ``[tokens · k]``, and how many each expert has."""

    token: Tensor
    expert: Tensor
    slot: Tensor
    counts: list[int]

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Expert, tokens and slots of at most :data:`BLOCK` pairs each, all pairs in order."""
        size = BLOCK.get(self.token.device.type, LARGE_BLOCK)
        parts = zip(self.token.split(self.counts), self.slot.split(self.counts), strict=True)
        for expert, (token, slot) in enumerate(parts):
            if len(token):
                for rows in zip(token.split(size), slot.split(size), strict=True):
                    yield expert, *rows


def _pairs(layer: ExpertLayer, experts: Tensor, positions: Tensor | None) -> _Pairs:
    k = experts.shape[-1]
    slot = torch.arange(experts.numel(), device=experts.device).view(-1, k)
    slot = (slot if positions is None else slot[positions.to(slot.device)]).reshape(-1)
    expert, order = torch.sort(experts.reshape(-1)[slot], stable=True)
    # expert parallelism marks experts of other ranks with larger numbers
    counts = torch.bincount(expert, minlength=layer.num_experts)[: layer.num_experts].tolist()
    slot = slot[order][: sum(counts)]
    return _Pairs(slot // k, expert[: len(slot)], slot, counts)


def _key(layer: ExpertLayer, expert: int, inputs: Tensor) -> Tensor:
    return _activated(layer, _project(layer, _up_name(layer), expert, inputs))


def _grouped_keys(layer: ExpertLayer, inputs: Tensor, pairs: _Pairs) -> Tensor:
    """Keys of all pairs, ``[N, d_hidden]``, from the experts' inputs ``[N, d_model]``."""
    return _activated(layer, _grouped_project(layer, _up_name(layer), inputs, pairs))


def _up_name(layer: ExpertLayer) -> str:
    return "gate_up_proj" if layer.experts.has_gate else "up_proj"


def _activated(layer: ExpertLayer, projected: Tensor) -> Tensor:
    module: Any = layer.experts
    return module._apply_gate(projected) if module.has_gate else module.act_fn(projected)


def _grouped_project(layer: ExpertLayer, name: str, rows: Tensor, pairs: _Pairs) -> Tensor:
    """:func:`_project` of all pairs at once, each with its expert's weights."""
    weight = getattr(layer.experts, name)
    ends = torch.tensor(pairs.counts, device=rows.device).cumsum(0, dtype=torch.int32)
    projected = _grouped_mm(rows.to(weight.dtype), weight if layer.is_transposed else weight.mT, offs=ends)
    return projected + getattr(layer.experts, f"{name}_bias")[pairs.expert] if layer.experts.has_bias else projected


def _project(layer: ExpertLayer, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(layer.experts, name)[expert]
    bias = getattr(layer.experts, f"{name}_bias")[expert] if layer.experts.has_bias else None
    return nn.functional.linear(rows.to(weight.dtype), weight.T if layer.is_transposed else weight, bias)


@contextmanager
def _intercepted(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    look: Callable[[ExpertLayer, Tensor, Tensor, Tensor], Tensor | None],
) -> Iterator[None]:
    """Register an experts function that shows ``look`` the inputs of the watched layers.

    If that returns no output of its own, the configured implementation is run.
    """
    watched = {id(layer.experts): layer for layer in layers}
    configs: dict[int, tuple[PretrainedConfig, str | None]] = {}
    for layer in layers:
        config: Any = layer.experts.config
        configs[id(config)] = (config, config._experts_implementation)
    name = f"lit_moeedit_{id(watched):x}"
    configured = {key: implementation for key, (_, implementation) in configs.items()}

    def forward(
        module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        layer = watched.get(id(module))
        output = None if layer is None else look(layer, hidden_states, top_k_index, top_k_weights)
        if output is not None:
            return output
        # the decorator of transformers keeps the module's own forward under __wrapped__
        eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        chosen = ALL_EXPERTS_FUNCTIONS.get_interface(configured.get(id(module.config)) or "eager", eager)
        return chosen(module, hidden_states, top_k_index, top_k_weights, *args, **kwargs)

    ALL_EXPERTS_FUNCTIONS[name] = forward
    try:
        for config, _ in configs.values():
            config._experts_implementation_internal = name
        yield
    finally:
        for config, implementation in configs.values():
            config._experts_implementation_internal = implementation
        del ALL_EXPERTS_FUNCTIONS[name]
