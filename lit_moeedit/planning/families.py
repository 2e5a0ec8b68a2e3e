"""The command ``families``: which models can be edited, tried out on a small one of each family."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moeedit.models.experts import LISTED, ExpertLayer, UnsupportedModelError, check_editable, expert_layers
from lit_moeedit.models.keys import Routing, watch_routing
from lit_moeedit.models.output_scale import output_gains
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.planning.family_catalog import NOT_MADE, Family, small_model
from lit_moeedit.planning.family_catalog import families as all_families

TESTED_WITH = "5.23.0"
"""The version of transformers with which the proofs of every family were run."""

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}
"""What routers make of their logits."""


@dataclass(frozen=True)
class Finding:
    """What was found out about a family.

    Attributes:
        family: its model type.
        layout: how its experts are stored.
        router: how its gates are made.
        refusal: why it cannot be edited; empty if it can.
        note: what is done for it that most need not.
    """

    family: str
    layout: str = ""
    router: str = ""
    refusal: str = ""
    note: str = ""


def families() -> None:
    """List the families of models with experts in the installed transformers, and which of them can be edited.

    The list is what transformers declares. A small model of each family is made, with random weights, and checked as
    every model is before it is edited; layout and router are read off that, too. Nothing is loaded or downloaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            found = [finding(family) for family in all_families()]
        finally:
            transformers.logging.set_verbosity(level)
    Console(emoji=False).print(table(found))


def table(found: list[Finding]) -> Table:
    """Findings as a table, those that can be edited first."""
    good = [one for one in found if not one.refusal]
    tested = TESTED_WITH if transformers.__version__ == TESTED_WITH else "-"
    result = Table(
        title=f"transformers {transformers.__version__}: {len(good)} of {len(found)} families can be edited",
        caption="gates: of a small model with the family's default settings, but several groups of experts where it "
        f"knows them; tested: the proofs of this package were run with that version of transformers ({TESTED_WITH})",
    )
    for name in ("family", "experts", "gates", "supported", "tested"):
        result.add_column(name, no_wrap=name == "family")
    for one in sorted(found, key=lambda one: bool(one.refusal)):
        support = f"no: {one.refusal}" if one.refusal else "; ".join(filter(None, ("yes", one.note)))
        result.add_row(one.family, one.layout, one.router, support, tested)
    return result


def finding(family: Family) -> Finding:
    """Make a small model of a family and look at it."""
    if not family.is_declared:
        return Finding(family.model_type, refusal="its experts are no module of transformers' experts interface")
    layout = router = ""
    try:
        model = small_model(family.model_type)
        layers = list(expert_layers(model).values())
        layout, router = _layout(layers[0]), _router(model, layers[-1])
        gains = output_gains(model, check_editable(model, [layer.index for layer in layers]))
    except UnsupportedModelError as error:
        return Finding(family.model_type, layout, router, refusal=str(error).removesuffix(f"; {LISTED}"))
    except NOT_MADE as error:
        # a family that is newer than this package may want another small config
        logging.getLogger(__name__).debug("", exc_info=error)
        return Finding(family.model_type, refusal=f"not known, as no small model of it runs ({error})")
    gain = gains[layers[-1].index]
    factor = "a factor" if bool((gain == gain[0]).all()) else "a factor for each entry"
    note = "" if bool((gain == 1).all()) else f"{factor} behind the experts is accounted for"
    return Finding(family.model_type, layout, router, note=note)


def _layout(layer: ExpertLayer) -> str:
    experts: Any = layer.experts
    own_gate = type(experts)._apply_gate.__module__ == type(experts).__module__
    said = {
        "transposed": experts.is_transposed,
        "gate and up interleaved": experts.has_gate and not experts.is_concatenated,
        "no gate": not experts.has_gate,
        "biases": experts.has_bias,
        "activation of its own": experts.has_gate and own_gate,
        "a norm behind each": experts.has_post_expert_norm,
    }
    return ", ".join(name for name, holds in said.items() if holds) or "default"


def _router(model: PreTrainedModel, layer: ExpertLayer) -> str:
    """How the gates depend on the router's logits, found by trying."""
    routing: list[Routing] = []
    returned: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: returned.append(output))
        for module in layer.layer.modules()
    ]
    try:
        with inference(model), watch_routing(model, [layer], lambda _, seen: routing.append(seen)):
            model(input_ids=torch.arange(3, 35).view(2, 16), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
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
    """Whether a module returned router logits, together with the chosen experts."""
    if not isinstance(output, tuple) or not all(isinstance(part, Tensor) for part in output):
        return False
    chosen = [part for part in output if not part.is_floating_point() and part.numel() == experts.numel()]
    return len(output) > 2 and any(torch.equal(part.reshape(experts.shape), experts) for part in chosen)
