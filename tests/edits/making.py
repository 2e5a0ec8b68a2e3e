"""Edits with random changes, made in small models, and the weights in which they were made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditResult, FineTuning
from lit_moeedit.edits import Edit, layers_by_parameter, states
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.solvers import ExpertDeltas

FACTS = [Fact("Rome", "Rome lies in", "Spain", "Italy", ("Rome is in",)), Fact("Oslo", "Oslo is in", "Perú")]
METHOD = FineTuning([0, 1])


def some_deltas(sizes: tuple[int, int, int], seed: int, scale: float = 0.05, terms: int = 5) -> ExpertDeltas:
    """Changes of some of the experts; two terms share a row."""
    experts, d_model, d_hidden = sizes
    generator = torch.Generator().manual_seed(seed)
    return ExpertDeltas(
        torch.randint(0, experts, (terms,), generator=generator),
        torch.arange(terms) // 2,
        scale * torch.randn((terms + 1) // 2, d_model, generator=generator),
        torch.randn(terms, d_hidden, generator=generator),
        experts,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the experts' down-projections."""
    return {name: layer.down_proj.detach().clone() for name, layer in layers_by_parameter(model).items()}


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights, bit by bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def make(
    name: str,
    base: nn.Module,
    on: Sequence[Edit] = (),
    *,
    seed: int = 0,
    layers: Sequence[int] = (0, 1),
    rounding: str = "together",
    terms: int = 5,
    **fields: Any,
) -> tuple[Edit, nn.Module]:
    """Make an edit of a copy of the base with earlier edits; returns it, and the copy.

    Args:
        rounding: ``together`` as frozen weights are edited, ``alone`` as by several edits of a plain model, each
            rounded in float32.
    """
    model, before_it = copy.deepcopy(base), copy.deepcopy(base)
    chosen = {name: layer for name, layer in layers_by_parameter(model).items() if layer.index in layers}
    deltas = {layer.index: some_deltas(layer.shape, seed + layer.index, terms=terms) for layer in chosen.values()}
    with Transaction() as transaction:
        for model_, edits in ((before_it, on), (model, on)):
            for parameter, layer in layers_by_parameter(model_).items():
                changes = [edit.changes[parameter].deltas for edit in edits if parameter in edit.changes]
                if model_ is model and layer.index in deltas:
                    changes.append(deltas[layer.index])
                if rounding == "together" and changes:
                    transaction.commit(layer.down_proj, changes, layer.is_transposed, exact=True)
                for change in changes if rounding == "alone" else ():
                    transaction.commit(layer.down_proj, change, layer.is_transposed)
        transaction.keep()
    before = states({name: layer for name, layer in layers_by_parameter(before_it).items() if name in chosen})
    result = EditResult(FACTS, deltas, None, {})  # type: ignore[arg-type]
    edit = Edit.record(
        name, model, result, before, method=METHOD, made_on=on, metrics_after={"efficacy": 1.0}, **fields
    )
    is_exact = rounding == "together"
    changes = tuple(
        replace(change, sum_base=(change.base if is_exact else change.before).exact, is_exact=is_exact)
        for change in edit.layers
    )
    return replace(edit, layers=changes), model


def chain(base: nn.Module, count: int = 3, **options: Any) -> tuple[list[Edit], list[nn.Module]]:
    """Edits, each made on top of those before it, and the model after each."""
    edits: list[Edit] = []
    models = []
    for number in range(count):
        edit, model = make(f"edit-{number + 1}", base, edits, seed=10 * number, **options)
        edits.append(edit)
        models.append(model)
    return edits, models


def siblings(base: nn.Module, count: int = 3, **options: Any) -> tuple[list[Edit], list[nn.Module]]:
    """Edits that were all made on the base."""
    made = [make(f"sibling-{number + 1}", base, seed=10 * number, **options) for number in range(count)]
    return [edit for edit, _ in made], [model for _, model in made]
