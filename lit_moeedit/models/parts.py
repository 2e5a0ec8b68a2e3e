"""The parts of a model around its edited layers, found by the structure of its modules."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moeedit.models.experts import ExpertLayer, UnsupportedModelError, expert_layers
from lit_moeedit.sharding.backends import settle

Kind = Literal["down-projections", "gate/up-projections", "routers", "shared experts", "attention", "norms and scales"]
"""Kinds of weights in a decoder layer with routed experts."""
Place = Literal["embeddings", "other layers below", "above and head"]
"""Places of all other weights."""

KEY_MAKERS = "all that makes keys"
EDITED_LAYERS = "edited layers whole"

_MIXES = {"attention_mask", "position_embeddings", "past_key_values", "past_key_value", "cache_params"}
"""Arguments of modules that pass information from token to token: attention, state spaces, convolutions."""


@dataclass(frozen=True)
class ModelPart:
    """Some weights of a model that are looked at together.

    Attributes:
        name: its name, for people.
        weights: names of parameters and buffers in the model, in its order.
    """

    name: str
    weights: tuple[str, ...]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and the buffers that its checkpoints have, by name; tied ones once."""
    settle(model)
    found: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}".lstrip(".")] = buffer
    return found


def find_kinds(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, Kind | Place]:
    """Find the kind of each weight of the edited layers, and the place of each of the others.

    Nothing depends on the names of a family: experts declare themselves, what passes information from token to token
    takes a mask or a cache, and modules outside of the decoder layers lie before or after these. Buffers count as the
    module that they belong to, and tied weights as the first of them, mostly the embeddings.

    Args:
        model: the model.
        layers: indices of the edited layers.

    Returns:
        A kind or place for every tensor of :func:`stored_tensors`.

    Raises:
        UnsupportedModelError: if the model has no routed experts, or none in one of the layers.
    """
    known = expert_layers(model)
    missing = sorted(set(layers) - set(known))
    if missing or not layers:
        have = ", ".join(map(str, known))
        raise UnsupportedModelError(
            f"expected layers with routed experts ({have}) of {type(model).__name__}, got {missing or 'none'}"
        )
    edited, target = {index: _LayerKinds(known[index]) for index in layers}, max(layers)
    paths = {id(module): path for path, module in model.named_modules()}
    stem = paths[id(known[target].layer)].rpartition(".")[0]
    order = {id(module): number for number, module in enumerate(model.modules())}
    begin = order[id(model.get_submodule(stem))]
    found: dict[str, Kind | Place] = {}
    for name in stored_tensors(model):
        if name.startswith(f"{stem}."):
            index, _, rest = name.removeprefix(f"{stem}.").partition(".")
            if int(index) in edited:
                found[name] = edited[int(index)].of(rest)
            else:
                found[name] = "other layers below" if int(index) < target else "above and head"
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            found[name] = "embeddings" if order[id(owner)] < begin else "above and head"
    return found


def find_parts(model: PreTrainedModel, layers: Sequence[int]) -> list[ModelPart]:
    """Split a model's weights by kind and place, and join the parts that tell more together.

    Args:
        model: the model.
        layers: indices of the edited layers; the last one is the target layer.

    Returns:
        The parts that have weights: disjoint ones first, which have every weight once, then all that makes keys
        (everything up to the target layer but the down-projections of the edited layers), and the edited layers whole.

    Raises:
        UnsupportedModelError: as :func:`find_kinds`.
    """
    kinds = find_kinds(model, layers)
    in_layers = get_args(Kind)
    makes_keys = {*in_layers, "embeddings", "other layers below"} - {"down-projections"}
    groups: dict[str, set[str]] = {name: {name} for name in (*in_layers, *get_args(Place))}
    groups |= {KEY_MAKERS: makes_keys, EDITED_LAYERS: set(in_layers)}
    parts = [
        ModelPart(name, tuple(weight for weight, kind in kinds.items() if kind in group))
        for name, group in groups.items()
    ]
    return [part for part in parts if part.weights]


class _LayerKinds:
    """The kinds of the weights of one decoder layer, by their names in it."""

    def __init__(self, layer: ExpertLayer) -> None:
        self._layer = layer.layer
        self._own = next(path for path, module in layer.layer.named_modules() if module is layer.experts)
        # adapters of peft put modules around the experts
        self._experts = self._own.removesuffix(".base_layer" * self._own.count(".base_layer"))
        # experts of some families lie in the decoder layer itself, beside their router
        self._block = self._experts.rpartition(".")[0]

    def of(self, name: str) -> Kind:
        """Return the kind of a parameter or buffer."""
        path, _, leaf = name.rpartition(".")
        if f"{path}.".startswith(f"{self._experts}."):
            is_down = leaf.startswith("down_proj") if path == self._own else self._adapted(path) == "down_proj"
            return "down-projections" if is_down else "gate/up-projections"
        is_inside = bool(self._block) and f"{path}.".startswith(f"{self._block}.")
        start = f"{self._block}." if is_inside else ""
        child = f"{path}.".removeprefix(start).partition(".")[0]
        if child:  # else it belongs to the layer or the block itself
            module = self._layer.get_submodule(start + child)
            family = type(module).__name__.lower()
            if not is_inside and _MIXES & set(inspect.signature(module.forward).parameters):
                return "attention"
            if "norm" in family:
                return "norms and scales"
            if "shared" in child or family.endswith("mlp"):
                return "shared experts"
        return "routers" if is_inside or child == "router" else "norms and scales"

    def _adapted(self, path: str) -> object:
        """Return the name of the parameter that the innermost adapter around the experts changes."""
        names = path.split(".")
        around = (self._layer.get_submodule(".".join(names[:depth])) for depth in range(len(names), 0, -1))
        return next((module.parameter_name for module in around if hasattr(module, "parameter_name")), None)
