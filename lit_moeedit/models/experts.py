"""The one place that knows how transformers lays experts out.

Since transformers 5 all experts of a layer are one module with three-dimensional parameters, whose forward goes through
``ALL_EXPERTS_FUNCTIONS``. What the module declares of its layout (``has_gate``, ``has_bias``, ``is_transposed``, …) is
enough to serve every family that uses this interface; nothing here depends on an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

LISTED = "the command 'lit-moeedit families' lists the models that can be edited"
"""Ends a message that refuses a whole family."""


PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names under which configs of families have ``k``, the number of experts that a token is sent to."""


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


def experts_per_token(model: PreTrainedModel) -> int:
    """``k``, the number of experts that a token is sent to, from the model's config; 8 where it does not say."""
    config = model.config.get_text_config()
    return next((value for name in PER_TOKEN if isinstance(value := getattr(config, name, None), int)), 8)


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
