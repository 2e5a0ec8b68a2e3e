"""States of a model's experts, told apart by fingerprints; the names of their parameters, and their histories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lit_moeedit.models.experts import ExpertLayer, expert_layers, find_model
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.history import History
from lit_moeedit.sharding.ranks import Ranks

_ATTRIBUTE = "frozen_edits"


@dataclass(frozen=True)
class State:
    """The state of one parameter.

    Attributes:
        exact: fingerprint of its elements.
        rounded: fingerprint of its elements rounded to bfloat16, the same for copies in bfloat16, and for float32
            copies of those.
    """

    exact: str
    rounded: str

    @property
    def kind(self) -> str:
        """Shape and dtype of the parameter."""
        return self.exact.rpartition(" ")[0]


def layers_by_parameter(model: nn.Module) -> dict[str, ExpertLayer]:
    """Find a model's layers with routed experts, by the names of their down-projections in a model without adapters.

    Raises:
        UnsupportedModelError: if there is no such model, or it has no such layers.
    """
    return {layer.weight_name: layer for layer in expert_layers(find_model(model)).values()}


def states(layers: Mapping[str, ExpertLayer], ranks: Ranks | None = None) -> dict[str, State]:
    """Compute the states of layers' down-projections, however they are sharded.

    Args:
        layers: layers by the names of their parameters, see :func:`layers_by_parameter`.
        ranks: the processes that share the work. Each calls this.

    Raises:
        UnsupportedShardingError: if a parameter is partitioned in a way that cannot be read.
    """
    ranks = ranks or Ranks.current()
    weights = {name: layer.down_proj for name, layer in layers.items()}
    exact = fingerprints(weights, ranks)
    halves = {name: weight for name, weight in weights.items() if weight.dtype != torch.bfloat16}
    rounded = exact | fingerprints(halves, ranks, rounded_to=torch.bfloat16)
    return {name: State(exact[name], rounded[name]) for name in weights}


def histories_in(model: nn.Module) -> dict[str, History]:
    """Return the histories that :func:`keep_in` has put into a model; its weights may have changed since."""
    found: dict[str, History] = getattr(model, _ATTRIBUTE, {})
    return found


def keep_in(model: nn.Module, histories: dict[str, History]) -> None:
    """Let histories travel with a model, so that a later run knows what was added to its frozen experts."""
    setattr(model, _ATTRIBUTE, histories)
