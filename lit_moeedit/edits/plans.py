"""The work of applying edits: checks of the model, plans by parameter, and their commit in one transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lit_moeedit.edits.edit import Edit, LayerChange, in_sums
from lit_moeedit.edits.folders import load_model
from lit_moeedit.edits.order import EditConflictError, Sequel
from lit_moeedit.edits.states import State, layers_by_parameter, states
from lit_moeedit.interrupts import held
from lit_moeedit.models.adapted import refuse_merged
from lit_moeedit.models.experts import ExpertLayer, check_editable, find_model
from lit_moeedit.sharding.backends import refuse_parallelism
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.replacement import replace_experts
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)

Report = Callable[[int, int], object]
"""Called with the number of layers done, and the total number."""


@dataclass(frozen=True)
class Source:
    """A parameter of the base, and its state."""

    weight: nn.Parameter
    state: State


@dataclass(frozen=True)
class EditPlan:
    """The work on one parameter.

    Attributes:
        layer: the layer.
        pending: the changes to add, in their order, in the sums in which they were made.
        source: the base's parameter, from which the changed experts are taken first; ``None`` to add to what is there.
        experts: experts that are taken from the base.
        expected: the state that results; ``None`` if no file has it.
    """

    layer: ExpertLayer
    pending: Sequence[LayerChange]
    source: nn.Parameter | None
    experts: Sequence[int]
    expected: State | None

    @property
    def lacks_base(self) -> bool:
        """Tell if the first change continues a sum whose base is not given."""
        if self.source is not None or not self.pending:
            return False
        return self.pending[0].is_exact and self.pending[0].sum_base != self.pending[0].before.exact


# -- checks -----------------------------------------------------------------------------------------------------------


def find_layers(model: nn.Module, sequels: Mapping[str, Sequel]) -> dict[str, ExpertLayer]:
    """Return the layers that the edits change, after all checks that need no weights."""
    refuse_parallelism(model)
    found = layers_by_parameter(model)
    for name, sequel in sequels.items():
        layer = found.get(name)
        for edit, change in zip(sequel.edits, sequel.changes, strict=True):
            if layer is None:
                raise EditConflictError(
                    f"edit {edit.name!r} changes {name}, which the model does not have; its experts are "
                    f"{first_few(found)}"
                )
            if layer.shape != change.sizes or layer.is_transposed != change.is_transposed:
                raise EditConflictError(
                    f"edit {edit.name!r} changes {name} with (E, d_model, d_hidden) {change.sizes}, but the model's is "
                    f"{layer.shape}{' or stored the other way round' if layer.shape == change.sizes else ''}"
                )
    chosen = {name: found[name] for name in sequels}
    check_editable(find_model(model), [layer.index for layer in chosen.values()])
    return chosen


def find_positions(sequels: Mapping[str, Sequel], now: Mapping[str, State]) -> dict[str, tuple[int, bool]]:
    """Find the number of edits that are in each parameter."""
    found = {}
    for name, sequel in sequels.items():
        position = sequel.position(now[name])
        if position is None:
            raise EditConflictError(_reason(name, sequel, now[name]))
        found[name] = position
    return found


def _reason(name: str, sequel: Sequel, now: State) -> str:
    """Explain weights that are in no state that the edits have."""
    first = sequel.edits[0]
    if now.rounded == sequel.base.rounded:
        missing = first_few(repr(n) for key, n in first.made_on.items() if key in sequel.start)
        return f"{name} is that of the base, but edit {first.name!r} was made on top of {missing}, so apply that first"
    alone = next((e for e in sequel.edits if e.changes[name].after.rounded == now.rounded), None)
    if alone is not None:
        return (
            f"{name} has the edit {alone.name!r} and not those before it: give the edits in the order in which they "
            "are in the weights"
        )
    return (
        f"{name} is neither that of the base of edit {first.name!r} nor one with the edits given: it is of another "
        "model, was trained since, or has other edits (give these, too, in their order)"
    )


# -- the work ---------------------------------------------------------------------------------------------------------


def plan_parameter(
    sequel: Sequel,
    layer: ExpertLayer,
    edits: Sequence[Edit],
    now: State,
    expected: State | None,
    source: Source | None = None,
) -> EditPlan:
    """Plan to add edits to a parameter, or to its base."""
    experts = {expert for change in sequel.changes for expert in change.deltas.experts}
    if expected is not None and (expected.kind != now.kind or (source and source.state != sequel.base)):
        expected = None
    pending = [edit.changes[sequel.parameter] for edit in edits]
    return EditPlan(layer, pending, None if source is None else source.weight, sorted(experts), expected)


def find_sources(
    base: nn.Module | str | Path, concerned: Mapping[str, tuple[Sequel, ExpertLayer]], ranks: Ranks
) -> dict[str, Source]:
    """Find parameters in the base, and check that they are those on which the edits were made."""
    if not concerned:
        return {}
    if not isinstance(base, nn.Module):
        base = load_model(base, next(layer.down_proj.dtype for _, layer in concerned.values()))
    refuse_merged(base)
    layers = layers_by_parameter(base)
    for name, (sequel, layer) in concerned.items():
        if sequel.start:
            raise EditConflictError(
                f"edit {sequel.edits[0].name!r} was made on top of others: with a base, give all edits in the weights"
            )
        other = layers.get(name)
        if other is None or (other.shape, other.is_transposed) != (layer.shape, layer.is_transposed):
            raise EditConflictError(f"the base has no {name}, or one of another shape: it is another model")
        if other.down_proj.dtype != layer.down_proj.dtype:
            raise EditConflictError(
                f"{name} is {layer.down_proj.dtype} in the model and {other.down_proj.dtype} in the base: "
                "load both in one dtype"
            )
    found = states({name: layers[name] for name in concerned}, ranks)
    for name, (sequel, _) in concerned.items():
        if found[name].rounded != sequel.base.rounded:
            held = [edit.name for edit in sequel.edits[: (sequel.position(found[name]) or (0,))[0]]]
            if held:
                raise EditConflictError(
                    f"the base is edited itself, its weights have {first_few(map(repr, held))}: give the model before "
                    f"all edits, on which {held[0]!r} was made"
                )
            raise EditConflictError(
                f"{name} of the base is not the one on which edit {sequel.edits[0].name!r} was made"
            )
    return {name: Source(layers[name].down_proj, found[name]) for name in concerned}


def commit_plans(
    plans: Mapping[str, EditPlan],
    ranks: Ranks,
    optimizers: Sequence[Any],
    allow_rounding: bool,
    report: Report | None,
) -> dict[str, State]:
    """Carry out plans in one transaction, and check that they lead to the expected states; return the states after."""
    with held(Transaction(optimizers, ranks)) as transaction:
        for number, plan in enumerate(plans.values(), 1):
            if plan.source is not None:
                replace_experts(transaction, plan.layer.down_proj, plan.source, plan.experts)
            for own in in_sums(plan.pending):
                deltas = [change.deltas for change in own]
                transaction.commit(plan.layer.down_proj, deltas, plan.layer.is_transposed, exact=own[0].is_exact)
            if report is not None:
                report(number, len(plans))
        after = states({name: plan.layer for name, plan in plans.items()}, ranks)
        differing = [name for name, plan in plans.items() if plan.expected not in (None, after[name])]
        lacking = [name for name in differing if plans[name].lacks_base]
        if lacking:
            raise EditConflictError(
                f"the edits of {first_few(lacking)} were rounded together with earlier ones: give the base, too"
            )
        if differing and not allow_rounding:
            raise EditConflictError(
                f"the result is not that of the files, bit by bit, in {first_few(differing)}. Sums of another machine "
                "or version may differ in the last place, which allow_rounding accepts"
            )
        if differing:
            log.warning("the weights differ from those of the files in last places: %s", first_few(differing))
        transaction.keep()
    return after
