"""The command ``families``: a table of the models that can be edited, found by trying a small one of each family."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moeedit.models.experts import FAMILIES_HINT, ExpertLayer, UnsupportedModelError, check_editable, expert_layers
from lit_moeedit.models.keys import Routing, watch_routing
from lit_moeedit.models.output_scale import output_scales
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.planning.family_catalog import NOT_MADE, Family, moe_families, small_model

TESTED_WITH = "5.23.0"
"""The version of transformers with which the tests of every family were run."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
"""Functions that routers apply to their logits."""


@dataclass(frozen=True)
class Finding:
    """Properties of a family, found with a small model.

    Attributes:
        family: its model type.
        layout: layout of its experts.
        router: function from the router's logits to the gates.
        refusal: reason why it cannot be edited; empty if it can.
        note: special treatment that it needs; empty for most.
    """

    family: str
    layout: str = ""
    router: str = ""
    refusal: str = ""
    note: str = ""


def families() -> None:
    """List the families of models with experts in the installed transformers, and which of them can be edited.

    The list comes from what transformers declares. A small model of each family is made with random weights, and
    checked as every model is before an edit. Its layout and its router are read off it, too. Nothing is downloaded.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_error()
        found = [finding(family) for family in moe_families()]
    Console(emoji=False).print(table(found))


def table(found: list[Finding]) -> Table:
    """Format findings as a table, the families that can be edited first."""
    good = [one for one in found if not one.refusal]
    tested = TESTED_WITH if transformers.__version__ == TESTED_WITH else "-"
    result = Table(
        title=f"transformers {transformers.__version__}: {len(good)} of {len(found)} families can be edited",
        caption="gates: of a small model with the family's default settings, but several groups of experts where it "
        f"has them; tested: this package's tests were run with that version of transformers ({TESTED_WITH})",
    )
    for name in ("family", "experts", "gates", "supported", "tested"):
        result.add_column(name, no_wrap=name == "family")
    for one in sorted(found, key=lambda one: bool(one.refusal)):
        support = f"no: {one.refusal}" if one.refusal else "; ".join(filter(None, ("yes", one.note)))
        result.add_row(one.family, one.layout, one.router, support, tested)
    return result


def finding(family: Family) -> Finding:
    """Make a small model of a family and find its properties."""
    if not family.is_declared:
        return Finding(family.model_type, refusal="its experts do not declare transformers' experts interface")
    layout = router = ""
    try:
        model = small_model(family.model_type)
        layers = list(expert_layers(model).values())
        layout, router = _layout(layers[0]), _router(model, layers[-1])
        scales = output_scales(model, check_editable(model, [layer.index for layer in layers]))
    except UnsupportedModelError as error:
        return Finding(family.model_type, layout, router, refusal=str(error).removesuffix(f"; {FAMILIES_HINT}"))
    except NOT_MADE as error:
        # a family that is newer than this package may need another small config
        logging.getLogger(__name__).debug("", exc_info=error)
        return Finding(family.model_type, refusal=f"not known, as no small model of it runs ({error})")
    scale = scales[layers[-1].index]
    factor = "a factor" if bool((scale == scale[0]).all()) else "a factor for each entry"
    note = "" if bool((scale == 1).all()) else f"{factor} after the experts is accounted for"
    return Finding(family.model_type, layout, router, note=note)


def _layout(layer: ExpertLayer) -> str:
    experts: Any = layer.experts
    own_gate = type(experts)._apply_gate.__module__ == type(experts).__module__
    properties = {
        "transposed": experts.is_transposed,
        "gate and up interleaved": experts.has_gate and not experts.is_concatenated,
        "no gate": not experts.has_gate,
        "biases": experts.has_bias,
        "own activation": experts.has_gate and own_gate,
        "a norm after each": experts.has_post_expert_norm,
    }
    return ", ".join(name for name, holds in properties.items() if holds) or "default"


def _router(model: PreTrainedModel, layer: ExpertLayer) -> str:
    """Name the function from the router's logits to the gates, found by trying."""
    routing: list[Routing] = []
    returned: list[Any] = []
    with ExitStack() as stack:
        for module in layer.layer.modules():
            hook = module.register_forward_hook(lambda module, args, output: returned.append(output))
            stack.callback(hook.remove)
        with inference(model), watch_routing([layer], lambda _, seen: routing.append(seen)):
            model(input_ids=torch.arange(3, 35).view(2, 16), use_cache=False)
    experts, gates = routing[0].experts, routing[0].gates.double()
    config = model.config.get_text_config()
    grouped = ", in groups" if (getattr(config, "n_group", None) or 1) > 1 else ""
    for logits in filter(lambda output: _routes(output, experts), returned):
        for name, function in SCORES.items():
            scores = function(logits[0].reshape(len(experts), -1).double()).gather(1, experts)
            for norm, divisor in (("", torch.ones(1)), (", normalised", scores.sum(-1, keepdim=True))):
                factors = gates * divisor / scores
                factor = float(factors.mean())
                if bool(((factors - factor).abs() < 1e-4 * abs(factor)).all()):
                    return f"{name}{norm}{'' if abs(factor - 1) < 1e-4 else ' × a factor'}{grouped}"
    return f"other{grouped}"


def _routes(output: Any, experts: Tensor) -> bool:
    """Tell if a module returned router logits together with the chosen experts."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) for part in output):
        return False
    chosen = [part for part in output if not part.is_floating_point() and part.numel() == experts.numel()]
    return len(output) > 2 and any(torch.equal(part.reshape(experts.shape), experts) for part in chosen)
