"""The layout of routed experts in transformers' models.

Since transformers 5 all experts of a layer are one module with three-dimensional parameters, and its forward goes
through ``ALL_EXPERTS_FUNCTIONS``. The module declares its layout in attributes (``has_gate``, ``has_bias``,
``is_transposed``, …). These serve every family that uses this interface, so nothing here depends on an architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel

from lit_moeedit.models.adapted import refuse_adapters, refuse_merged
from lit_moeedit.models.errors import UnsupportedModelError as UnsupportedModelError
from lit_moeedit.models.quantised import quantised_experts
from lit_moeedit.sharding.backends import refuse_parallelism, settle
from lit_moeedit.sharding.shards import whole_shape

FAMILIES_HINT = "the command 'lit-moeedit families' lists the models that can be edited"
"""The end of a message that refuses a whole family."""

EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Keys of configs that hold ``k``, the number of experts that a token is routed to."""


@dataclass(frozen=True)
class ExpertLayer:
    """A decoder layer with routed experts.

    Attributes:
        index: index of the decoder layer.
        layer: the decoder layer.
        experts: the module that holds all experts of the layer.
        name: qualified name of ``experts`` in the model.
        output_scale: change of the layer's output for a unit change of its experts' output, ``[d_model]``; ``None`` if
            it is not measured. See :func:`~lit_moeedit.models.output_scale.output_scales`.
    """

    index: int
    layer: nn.Module
    experts: nn.Module
    name: str
    output_scale: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def down_proj(self) -> nn.Parameter:
        """The down-projections of all experts, as transformers stores them."""
        return cast("nn.Parameter", self.experts.down_proj)

    @property
    def weight_name(self) -> str:
        """The name of :attr:`down_proj` in the model without adapters: those of peft put modules in between."""
        name = self.name.removeprefix("base_model.model.")
        return f"{'.'.join(part for part in name.split('.') if part != 'base_layer')}.down_proj"

    @property
    def is_transposed(self) -> bool:
        """True if an expert is stored as ``[d_hidden, d_model]`` instead of ``[d_model, d_hidden]``."""
        return bool(self.experts.is_transposed)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes ``(E, d_model, d_hidden)``."""
        experts, rows, columns = whole_shape(self.down_proj)
        return (experts, columns, rows) if self.is_transposed else (experts, rows, columns)

    @property
    def num_experts(self) -> int:
        """The number of experts ``E``."""
        return self.shape[0]


def find_model(module: nn.Module) -> PreTrainedModel:
    """Find the transformers model in ``module``: the module itself, or the outermost model below it.

    Averages in torch's ``AveragedModel`` do not count.

    Raises:
        UnsupportedModelError: there is none, or there are several, none of which contains the others.
        UnsupportedShardingError: there is none, because of the way in which the model is distributed.
    """
    if isinstance(module, PreTrainedModel):
        return module
    averages = [x for x in module.modules() if isinstance(x, AveragedModel) and x is not module]
    averaged = {child for average in averages for child in average.modules()}
    found = [x for x in module.modules() if isinstance(x, PreTrainedModel) and x not in averaged]
    outermost = [m for m in found if not any(m is not other and m in set(other.modules()) for other in found)]
    if len(outermost) != 1:
        refuse_parallelism(module)
        kinds = ", ".join(type(model).__name__ for model in outermost) or "none"
        raise UnsupportedModelError(
            f"expected one transformers model in {type(module).__name__}, found {len(outermost)} ({kinds}); "
            "if it is made in configure_model(), run this inside a Trainer"
        )
    return outermost[0]


def expert_layers(model: PreTrainedModel) -> dict[int, ExpertLayer]:
    """Find all layers of ``model`` with routed experts, and release weights that are gathered, so they can be read.

    Returns:
        The layers by layer index, ascending.

    Raises:
        UnsupportedModelError: the model has none; the message gives the reason.
        UnsupportedShardingError: the model has none, because of the way in which it is distributed.
    """
    settle(model)
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
        refuse_parallelism(model)
        for reason in quantised_experts(model).values():
            raise UnsupportedModelError(reason)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer with routed experts that declares the experts interface of "
            f"transformers >= 5; lit_moeedit edits Mixture-of-Experts models only; {FAMILIES_HINT}"
        )
    return dict(sorted(layers.items()))


def _is_experts(module: nn.Module) -> bool:
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def experts_per_token(model: PreTrainedModel) -> int:
    """Read ``k``, the number of experts that a token is routed to, from the model's config; 8 if it has none."""
    config = model.config.get_text_config()
    return next((value for name in EXPERTS_PER_TOKEN_KEYS if isinstance(value := getattr(config, name, None), int)), 8)


def check_editable(model: PreTrainedModel, layers: Sequence[int]) -> list[ExpertLayer]:
    """Check that the layers with the given indices can be edited, be they frozen or not.

    Returns:
        The layers, ascending.

    Raises:
        UnsupportedModelError: a layer has no experts, is quantised, or has a norm after its experts, which makes the
            effect of a delta non-linear; or adapters are merged, or cannot be trained. The message names the layer and
            the reason.
    """
    refuse_merged(model)
    refuse_adapters(model)
    found = expert_layers(model)
    name = type(model).__name__
    if not layers:
        raise UnsupportedModelError(f"no layer to edit was given; {name} has experts in layers {_ranges(found)}")
    for index in layers:
        if index not in found:
            missing = f"layer {index} of {name} has no routed experts; layers with experts: {_ranges(found)}"
            raise UnsupportedModelError(quantised_experts(model).get(index, missing))
    chosen = [found[index] for index in sorted(set(layers))]
    for layer in chosen:
        weight = layer.down_proj
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UnsupportedModelError(
                f"the experts of layer {layer.index} of {name} are quantised ({weight.dtype}); "
                "load the model in float32, bfloat16 or float16 to edit it"
            )
        if getattr(layer.experts, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{name} normalises the output of each expert (layer {layer.index}): "
                f"a change of the down-projection does not act linearly there; {FAMILIES_HINT}"
            )
        if len(whole_shape(weight)) != 3:
            raise UnsupportedModelError(
                f"{layer.name}.down_proj of {name} must be [E, d_model, d_hidden], got {list(weight.shape)}"
            )
    return chosen


def _ranges(indices: Mapping[int, Any]) -> str:
    return ", ".join(map(str, indices)) if len(indices) <= 12 else f"{min(indices)} to {max(indices)}"
