"""The one place that knows how transformers lays experts out, and how to watch them at work.

Since transformers 5 all experts of a layer are one module with three-dimensional parameters, whose forward goes through
``ALL_EXPERTS_FUNCTIONS``. What the module declares of its layout (``has_gate``, ``has_bias``, ``is_transposed``, …) is
enough to serve every family that uses this interface; nothing here depends on an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PretrainedConfig


BLOCK = {"cpu": 512}
"""Largest number of rows of one expert that are computed at a time, by kind of device: a CPU can cache these."""
LARGE_BLOCK = 4096
"""The same on any other device."""


LISTED = "the command 'lit-moeedit families' lists the models that can be edited"
"""Ends a message that refuses a whole family."""


class UnsupportedModelError(ValueError):
    """The model, or one of its layers, cannot be edited; the message says why and what could."""


@dataclass(frozen=True)
class ExpertLayer:
    """One decoder layer with routed experts.

    Attributes:
        index: index of the decoder layer.
        layer: the decoder layer.
        experts: the module that holds all experts of the layer.
        name: qualified name of ``experts`` in the model.
    """

    index: int
    layer: nn.Module
    experts: nn.Module
    name: str

    @property
    def down_proj(self) -> nn.Parameter:
        """The down-projections of all experts as transformers stores them."""
        return self.experts.down_proj  # type: ignore[return-value]

    @property
    def is_transposed(self) -> bool:
        """Whether an expert is stored as ``[d_hidden, d_model]`` instead of ``[d_model, d_hidden]``."""
        return bool(self.experts.is_transposed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(E, d_model, d_hidden)``."""
        # DeepSpeed replaces the data of a partitioned parameter by an empty tensor and keeps the shape here
        experts, rows, columns = getattr(self.down_proj, "ds_shape", self.down_proj.shape)
        return (experts, columns, rows) if self.is_transposed else (experts, rows, columns)

    @property
    def num_experts(self) -> int:
        """``E``."""
        return self.shape[0]


def find_model(module: nn.Module) -> PreTrainedModel:
    """The transformers model in ``module``: itself or the outermost one below it.

    Raises:
        UnsupportedModelError: if there is none, or more than one side by side.
    """
    if isinstance(module, PreTrainedModel):
        return module
    found = [child for child in module.modules() if isinstance(child, PreTrainedModel)]
    outermost = [m for m in found if not any(m is not other and m in set(other.modules()) for other in found)]
    if len(outermost) != 1:
        kinds = ", ".join(type(model).__name__ for model in outermost) or "none"
        raise UnsupportedModelError(
            f"expected one transformers model in {type(module).__name__}, found {len(outermost)} ({kinds}); "
            "if it is made in configure_model(), run this inside a Trainer"
        )
    return outermost[0]


def expert_layers(model: PreTrainedModel) -> dict[int, ExpertLayer]:
    """All layers of ``model`` with routed experts, by layer index, ascending.

    Raises:
        UnsupportedModelError: if the model has none, with the reason.
    """
    layers: dict[int, ExpertLayer] = {}
    for name, experts in model.named_modules():
        if not _is_experts(experts):
            continue
        path = name.split(".")
        # the decoder layer is the entry of the first ModuleList on the way to the experts
        for depth, part in enumerate(path):
            if part.isdigit() and isinstance(model.get_submodule(".".join(path[:depth])), nn.ModuleList):
                layer = model.get_submodule(".".join(path[: depth + 1]))
                layers[int(part)] = ExpertLayer(int(part), layer, experts, name)
                break
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer with routed experts that declares the experts interface of "
            f"transformers >= 5; lit_moeedit edits Mixture-of-Experts models only; {LISTED}"
        )
    return dict(sorted(layers.items()))


def _is_experts(module: nn.Module) -> bool:
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def check_editable(model: PreTrainedModel, layers: Sequence[int]) -> list[ExpertLayer]:
    """The expert layers with the given indices, ascending, after checking that each can be edited.

    Raises:
        UnsupportedModelError: naming the layer and the reason: no experts, frozen, quantised, or a norm behind the
            experts, which makes the effect of a delta non-linear.
    """
    found = expert_layers(model)
    name = type(model).__name__
    if not layers:
        raise UnsupportedModelError(f"no layer to edit was given; {name} has experts in layers {_ranges(found)}")
    for index in layers:
        if index not in found:
            raise UnsupportedModelError(
                f"layer {index} of {name} has no routed experts; layers with experts: {_ranges(found)}"
            )
    chosen = [found[index] for index in sorted(set(layers))]
    for layer in chosen:
        weight = layer.down_proj
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UnsupportedModelError(
                f"the experts of layer {layer.index} of {name} are quantised ({weight.dtype}); "
                "load the model in float32, bfloat16 or float16 to edit it"
            )
        if not weight.requires_grad:
            raise UnsupportedModelError(
                f"the experts of layer {layer.index} of {name} ({layer.name}.down_proj) are frozen; "
                "edit layers that train, or set requires_grad_(True)"
            )
        if getattr(layer.experts, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{name} normalises the output of each expert (layer {layer.index}): "
                f"a change of the down-projection does not act linearly there; {LISTED}"
            )
        if len(getattr(weight, "ds_shape", weight.shape)) != 3:
            raise UnsupportedModelError(
                f"{layer.name}.down_proj of {name} must be [E, d_model, d_hidden], got {list(weight.shape)}"
            )
    return chosen


def _ranges(indices: Mapping[int, Any]) -> str:
    return ", ".join(map(str, indices)) if len(indices) <= 12 else f"{min(indices)} to {max(indices)}"


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
    rows = [_key(layer, j, hidden[token]) for j, token, _ in pairs.blocks()]
    return RoutedKeys(
        pairs.token,
        pairs.expert,
        gates.reshape(-1)[pairs.slot],
        torch.cat(rows) if rows else hidden.new_zeros(0, layer.shape[2], dtype=layer.down_proj.dtype),
    )


@contextmanager
def stream_keys(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    select: Callable[[], Tensor | None],
    observe: Callable[[ExpertLayer, int, Tensor, Tensor], None],
    last: ExpertLayer | None = None,
) -> Iterator[None]:
    """While open, run the experts of the given layers here and hand out the keys of the selected tokens on their way.

    Where all tokens are of interest, this costs nothing besides what ``observe`` does: no projection is computed twice,
    and of the keys one block of one expert's is held at a time. The configured implementation of the experts, and
    whatever watches from outside of this context, is not called for these layers. Without gradients.

    Args:
        model: the model whose forward is run inside.
        layers: layers to watch, of those that :func:`check_editable` lets pass.
        select: called once per layer and forward; the flattened token positions ``[n]`` to run, ``None`` for all. The
            experts' output is 0 for the others, so those must be tokens that nobody attends to.
        observe: called with the layer, an expert, its keys of ``n`` tokens (a block at most), ``[n, d_hidden]``, and
            their gates, ``[n]``.
        last: a layer whose output nobody wants: it is 0, and its down-projections are not computed.
    """

    def run(layer: ExpertLayer, hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        with torch.no_grad():
            pairs = _pairs(layer, experts, select())
            # several experts' outputs are added up: in float32, as in the implementations of transformers
            output = torch.zeros(hidden.shape, device=hidden.device)
            for j, token, slot in pairs.blocks():
                key, gate = _key(layer, j, hidden[token]), gates.reshape(-1)[slot]
                observe(layer, j, key, gate)
                if layer is not last:
                    output.index_add_(0, token, _project(layer, "down_proj", j, key) * gate[:, None].float())
            return output.to(hidden.dtype)

    with _intercepted(model, layers, run):
        yield


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
    module: Any = layer.experts
    name = "gate_up_proj" if module.has_gate else "up_proj"
    projected = _project(layer, name, expert, inputs)
    return module._apply_gate(projected) if module.has_gate else module.act_fn(projected)


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
