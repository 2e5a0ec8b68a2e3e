"""Observation of experts during a forward: the routing of tokens, and the keys that experts compute from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import forward_replaced
from lit_moeedit.sharding.backends import refuse_parallelism
from lit_moeedit.sharding.owners import Exchange, Owners, is_expert_parallel, own_experts, refuse_shared_batch
from lit_moeedit.sharding.shards import whole_shape

BLOCK = {"cpu": 512}
"""Maximum number of rows of one expert in a product, by device type: these stay in the cache of a CPU."""
LARGE_BLOCK = 4096
"""Maximum number of rows of one expert in a product, on any other type of device."""
ALIGNMENT = 16
"""Alignment in bytes that grouped products require of matrices and of their rows."""


@dataclass(frozen=True)
class Routing:
    """The routing of one layer.

    Attributes:
        experts: chosen experts, int64 ``[tokens, k]``.
        gates: their routing weights, ``[tokens, k]``.
    """

    experts: Tensor
    gates: Tensor


@dataclass(frozen=True)
class RoutedKeys:
    """Keys of the selected tokens in one layer, one row per (token, expert) pair.

    Attributes:
        token: index into the flattened ``[batch · length]`` tokens, int64 ``[N]``.
        expert: index of the expert, int64 ``[N]``, ascending.
        gate: routing weight that the experts module received, ``[N]``.
        key: the expert's activation before its down-projection, ``[N, d_hidden]``.
    """

    token: Tensor
    expert: Tensor
    gate: Tensor
    key: Tensor


def watch_routing(
    layers: Sequence[ExpertLayer], observe: Callable[[ExpertLayer, Routing], None]
) -> AbstractContextManager[None]:
    """Call ``observe`` with the routing of each forward of the given layers inside the context."""

    def report(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> None:
        observe(layer, Routing(experts.detach(), gates.detach()))

    return _intercepted(layers, report)


def watch_keys(
    layers: Sequence[ExpertLayer],
    select: Callable[[], Tensor | None],
    observe: Callable[[ExpertLayer, RoutedKeys], None],
) -> AbstractContextManager[None]:
    """Call ``observe`` with the keys of selected tokens in each forward of the given layers inside the context.

    The keys are computed separately, from the experts' up-projections and for the selected tokens only. The forward
    itself runs as configured. A few edit tokens therefore cost little, and any implementation of the experts will do.

    Args:
        layers: layers to observe.
        select: returns the selected positions ``[n]`` among the flattened tokens, or ``None`` for all; called once per
            layer and forward.
        observe: receives the layer and its keys.
    """

    def report(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> None:
        positions = select()
        with torch.no_grad():
            observe(layer, routed_keys(layer, hidden, experts, gates, positions))

    return _intercepted(layers, report, needs_keys=True)


def routed_keys(
    layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor, positions: Tensor | None = None
) -> RoutedKeys:
    """Compute the keys of one layer for given inputs.

    Under expert parallelism the owners of the experts compute them; all ranks call this together, within the forward
    of the layer's experts.

    Args:
        layer: the layer.
        hidden: input of the experts module, ``[tokens, d_model]``.
        experts: chosen experts, int64 ``[tokens, k]``.
        gates: their routing weights, ``[tokens, k]``.
        positions: the selected tokens, int64 ``[n]``; ``None`` for all.
    """
    pairs = _pairs(experts, positions, layer.num_experts)
    if is_expert_parallel(layer.experts):
        exchange = Owners.of(layer.experts).begin(pairs.counts, hidden.device)
        received = _received(exchange)
        keys = _keys(layer, exchange.send(hidden[pairs.token]), received)
        # the owner's keys are sorted by expert, and go back in the order in which their rows came
        keys = exchange.back(torch.empty_like(keys).index_copy_(0, received.slot, keys))
    else:
        keys = _keys(layer, hidden, pairs)
    return RoutedKeys(pairs.token, pairs.expert, gates.reshape(-1)[pairs.slot], keys)


def _keys(layer: ExpertLayer, hidden: Tensor, pairs: _Pairs) -> Tensor:
    """Compute the keys of all pairs, ``[N, d_hidden]``."""
    if can_group(layer):
        return _grouped_keys(layer, hidden[pairs.token], pairs)
    rows = [_key(layer, j, hidden[token]) for j, token, _ in pairs.blocks()]
    return torch.cat(rows) if rows else hidden.new_zeros(0, layer.shape[2], dtype=layer.down_proj.dtype)


@dataclass(frozen=True)
class KeyRows:
    """Keys of one expert or of several, from one forward.

    Attributes:
        counts: number of rows of each expert that has any, by expert, ascending.
        key: keys ``[n, d_hidden]``, the rows of the first expert first.
        gate: their routing weights, ``[n]``.
    """

    counts: Mapping[int, int]
    key: Tensor
    gate: Tensor


def stream_keys(
    layers: Sequence[ExpertLayer],
    select: Callable[[], Tensor | None],
    observe: Callable[[ExpertLayer, KeyRows], None],
    last: ExpertLayer | None = None,
    grouped: bool | None = None,
) -> AbstractContextManager[None]:
    """Compute the experts of the given layers inside the context, and pass their keys to ``observe``.

    No projection is computed twice, so that observing all tokens adds only the cost of ``observe``. The configured
    implementation of the experts is not called for these layers, nor is an observer outside of this context. There are
    no gradients. Under expert parallelism each rank observes the keys of its own experts, for the tokens of all ranks.

    Args:
        layers: layers to observe, all accepted by :func:`check_editable`.
        select: returns the positions ``[n]`` to compute among the flattened tokens, or ``None`` for all; called once
            per layer and forward. The experts' output for other tokens is 0, so no selected token may attend to them.
        observe: receives the layer and keys: of all experts at once, or of at most one block of one expert.
        last: a layer whose output is not used: its experts return 0, without computing their down-projections.
        grouped: true to compute all experts of a layer at once in grouped products, with the keys of all pairs in
            memory; false to compute one block of one expert at a time, which stays in the cache of a CPU. ``None``
            takes the result of :func:`can_group`.
    """

    def run(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        with torch.no_grad():
            pairs = _pairs(experts, select(), layer.num_experts)
            gates = gates.reshape(-1)
            if not is_expert_parallel(layer.experts):
                return compute(layer, hidden, pairs, gates, observe)
            owners = Owners.of(layer.experts)
            exchange = owners.begin(pairs.counts, hidden.device)
            rows, sent = exchange.send(hidden[pairs.token]), exchange.send(gates[pairs.slot])

            def observe_own(layer: ExpertLayer, keys: KeyRows) -> None:
                counts = {owners.first + j: count for j, count in keys.counts.items()}
                observe(layer, KeyRows(counts, keys.key, keys.gate))

            output = compute(layer, rows, _received(exchange), sent, observe_own)
            return torch.zeros_like(hidden) if layer is last else _summed(exchange.back(output), pairs, hidden)

    def compute(
        layer: ExpertLayer,
        hidden: Tensor,
        pairs: _Pairs,
        gates: Tensor,
        observe: Callable[[ExpertLayer, KeyRows], None],
    ) -> Tensor:
        if can_group(layer) if grouped is None else grouped:
            return _run_grouped(layer, hidden, pairs, gates, observe, is_last=layer is last)
        # the sum over experts is in float32, as in the implementations of transformers
        output = torch.zeros(hidden.shape, device=hidden.device)
        for j, token, slot in pairs.blocks():
            key, gate = _key(layer, j, hidden[token]), gates[slot]
            observe(layer, KeyRows({j: len(key)}, key, gate))
            if layer is not last:
                output.index_add_(0, token, _project(layer, "down_proj", j, key) * gate[:, None].float())
        return output.to(hidden.dtype)

    return _intercepted(layers, run, needs_keys=True)


def can_group(layer: ExpertLayer) -> bool:
    """Return true if a GPU can compute all experts of a layer at once: its grouped products must take the weights."""
    weight = layer.down_proj
    if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    weights = [_weight(layer, name) for name in (_up_name(layer), "down_proj")]
    sizes = (size for weight in weights for size in whole_shape(weight)[1:])
    # a weight within a flat buffer, such as DeepSpeed's, can begin anywhere
    is_aligned = all(weight.data_ptr() % ALIGNMENT == 0 for weight in weights)
    return is_aligned and all(size * weight.element_size() % ALIGNMENT == 0 for size in sizes)


def _run_grouped(
    layer: ExpertLayer,
    hidden: Tensor,
    pairs: _Pairs,
    gates: Tensor,
    observe: Callable[[ExpertLayer, KeyRows], None],
    is_last: bool,
) -> Tensor:
    """Compute the output of all experts at once, ``[tokens, d_model]``."""
    key, gate = _grouped_keys(layer, hidden[pairs.token], pairs), gates[pairs.slot]
    observe(layer, KeyRows({j: count for j, count in enumerate(pairs.counts) if count}, key, gate))
    if is_last:
        return torch.zeros_like(hidden)
    output = _grouped_project(layer, "down_proj", key, pairs)
    # in the wider dtype, because some routers return float32
    return _summed(output * gate[:, None], pairs, hidden)


def _summed(weighted: Tensor, pairs: _Pairs, hidden: Tensor) -> Tensor:
    """Sum the weighted outputs of all pairs, ``[N, d_model]``, over the experts of each token."""
    # each pair goes back to its slot before the sum over k: unlike index_add_, this is deterministic
    placed = weighted.new_zeros(len(hidden) * pairs.k, hidden.shape[-1]).index_copy_(0, pairs.slot, weighted)
    return placed.view(len(hidden), pairs.k, -1).sum(1, dtype=torch.float32).to(hidden.dtype)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of token and expert, sorted by expert.

    Attributes:
        token: index of the token, int64 ``[N]``.
        expert: index of the expert, int64 ``[N]``.
        slot: index of the pair in the flattened routing ``[tokens · k]``, int64 ``[N]``.
        counts: number of pairs of each expert.
        k: number of experts of a token.
    """

    token: Tensor
    expert: Tensor
    slot: Tensor
    counts: list[int]
    k: int

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield expert, tokens and slots of all pairs in order, at most :data:`BLOCK` pairs at a time."""
        size = BLOCK.get(self.token.device.type, LARGE_BLOCK)
        parts = zip(torch.split(self.token, self.counts), torch.split(self.slot, self.counts), strict=True)
        for expert, (token, slot) in enumerate(parts):
            if len(token):
                for rows in zip(torch.split(token, size), torch.split(slot, size), strict=True):
                    yield expert, *rows


def _pairs(experts: Tensor, positions: Tensor | None, num_experts: int) -> _Pairs:
    k = experts.shape[-1]
    slot = torch.arange(experts.numel(), device=experts.device).view(-1, k)
    slot = (slot if positions is None else slot[positions.to(slot.device)]).reshape(-1)
    expert, order = torch.sort(experts.reshape(-1)[slot], stable=True)
    # experts of larger indices have no weights here
    counts = torch.bincount(expert, minlength=num_experts)[:num_experts].tolist()
    slot = slot[order][: sum(counts)]
    return _Pairs(slot // k, expert[: len(slot)], slot, counts, k)


def _received(exchange: Exchange) -> _Pairs:
    """Return the pairs of the rows that this rank's experts get: each row is a token with one expert."""
    return _pairs(exchange.expert[:, None], None, exchange.owners.count)


def _weight(layer: ExpertLayer, name: str) -> Tensor:
    weight: Tensor = getattr(layer.experts, name)
    return own_experts(weight)


def _key(layer: ExpertLayer, expert: int, inputs: Tensor) -> Tensor:
    return _activated(layer, _project(layer, _up_name(layer), expert, inputs))


def _grouped_keys(layer: ExpertLayer, inputs: Tensor, pairs: _Pairs) -> Tensor:
    """Compute the keys of all pairs, ``[N, d_hidden]``, from the experts' inputs ``[N, d_model]``."""
    return _activated(layer, _grouped_project(layer, _up_name(layer), inputs, pairs))


def _up_name(layer: ExpertLayer) -> str:
    return "gate_up_proj" if layer.experts.has_gate else "up_proj"


def _activated(layer: ExpertLayer, projected: Tensor) -> Tensor:
    module: Any = layer.experts
    activated: Tensor = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    return activated


def _grouped_project(layer: ExpertLayer, name: str, rows: Tensor, pairs: _Pairs) -> Tensor:
    """Apply :func:`_project` to all pairs at once, each with the weights of its expert."""
    weight = _weight(layer, name)
    ends = torch.tensor(pairs.counts, device=rows.device).cumsum(0, dtype=torch.int32)
    projected = nn.functional.grouped_mm(rows.to(weight.dtype), weight if layer.is_transposed else weight.mT, offs=ends)
    return projected + _weight(layer, f"{name}_bias")[pairs.expert] if layer.experts.has_bias else projected


def _project(layer: ExpertLayer, name: str, expert: int, rows: Tensor) -> Tensor:
    weight = _weight(layer, name)[expert]
    bias = _weight(layer, f"{name}_bias")[expert] if layer.experts.has_bias else None
    return nn.functional.linear(rows.to(weight.dtype), weight.T if layer.is_transposed else weight, bias)


@contextmanager
def _intercepted(
    layers: Sequence[ExpertLayer],
    run: Callable[[ExpertLayer, Tensor, Tensor, Tensor], Tensor | None],
    needs_keys: bool = False,
) -> Iterator[None]:
    """Register an experts function that calls ``run`` with the inputs of the given layers.

    If ``run`` returns no output, the configured implementation computes it. Expert parallelism of transformers calls
    the function with other tokens, gates and indices of experts than the router's, so ``run`` is called in front of it.

    Raises:
        UnsupportedShardingError: if a rank holds or computes only a part of a layer, in a way that is unsupported.
    """
    for layer in layers:
        refuse_parallelism(layer.layer)
        if needs_keys and is_expert_parallel(layer.experts):
            refuse_shared_batch(layer.layer)
    dispatched = [layer for layer in layers if is_expert_parallel(layer.experts)]
    watched = {layer.experts: layer for layer in layers if not is_expert_parallel(layer.experts)}
    configs: dict[int, Any] = {id(experts.config): experts.config for experts in watched}
    configured: dict[int, str | None] = {key: config._experts_implementation for key, config in configs.items()}
    name = f"lit_moeedit_{id(watched):x}"

    def forward(
        module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        layer = watched.get(module)
        output = None if layer is None else run(layer, hidden_states, top_k_index, top_k_weights)
        if output is not None:
            return output
        # the decorator of transformers keeps the module's own forward under __wrapped__
        module_class: Any = type(module)
        eager = module_class.forward.__wrapped__
        chosen = ALL_EXPERTS_FUNCTIONS.get_interface(configured.get(id(module.config)) or "eager", eager)
        result: Tensor = chosen(module, hidden_states, top_k_index, top_k_weights, *args, **kwargs)
        return result

    with held(Undo()) as undo:
        for layer in dispatched:
            undo.enter_context(forward_replaced(layer.experts, _in_front(layer, run)))
        undo.by(ALL_EXPERTS_FUNCTIONS.pop, name, None)
        ALL_EXPERTS_FUNCTIONS[name] = forward
        for key, config in configs.items():
            undo.by(setattr, config, "_experts_implementation_internal", configured[key])
            config._experts_implementation_internal = name
        yield


def _in_front(
    layer: ExpertLayer, run: Callable[[ExpertLayer, Tensor, Tensor, Tensor], Tensor | None]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a forward of the layer's experts that calls ``run`` with this rank's tokens before they are dispatched."""
    dispatch: Callable[[Tensor, Tensor, Tensor], Tensor] = layer.experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        inputs = (own_experts(tensor) for tensor in (hidden_states, top_k_index, top_k_weights))
        output = run(layer, *inputs)
        return dispatch(hidden_states, top_k_index, top_k_weights) if output is None else output

    return forward
