"""Edits applied to weights, taken out of them, and found in them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lit_moeedit.edits.edit import Edit, LayerChange, Placement
from lit_moeedit.edits.order import EditConflictError, Sequel, check_order, linked
from lit_moeedit.edits.plans import Report, commit_plans, find_layers, find_positions, find_sources, plan_parameter
from lit_moeedit.edits.states import State, states
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Presence:
    """The presence of one edit in one parameter.

    Attributes:
        edit: the edit.
        parameter: name of the parameter.
        status: ``unknown`` if the parameter is in no state that the files have.
        is_exact: whether the state is that of the files bit by bit, and not only after rounding to bfloat16.
    """

    edit: Edit
    parameter: str
    status: Literal["applied", "missing", "unknown"]
    is_exact: bool


def apply(
    model: nn.Module,
    edits: Sequence[Edit],
    *,
    base: nn.Module | str | Path | None = None,
    ranks: Ranks | None = None,
    optimizers: Sequence[Any] = (),
    allow_siblings: bool = False,
    allow_rounding: bool = False,
    report: Report | None = None,
) -> list[Edit]:
    """Apply edits to a model's weights, all of them or none.

    The weights become ``round(base + (Δ_1 + … + Δ_n))``. The result is compared with the states in the files, so that
    it has the bits of the model in which the edits were made. Edits that are in the weights already are not applied
    again. Works in one process, under DDP and under DeepSpeed ZeRO.

    Args:
        model: the model, or a module that holds it. Its experts may be frozen.
        edits: the edits in their order, with those that are in the weights already, or without.
        base: the unedited model or its folder, if the weights have some of the edits and the others were rounded
            together with them. It is whole on each rank, or sharded like the model.
        ranks: the processes that hold the model. Each calls this with the same edits.
        optimizers: the optimizers that train the weights now, as ``trainer.optimizers`` has them.
        allow_siblings: whether to add up edits that were made without each other.
        allow_rounding: whether to accept a result that differs from the files in last bits, as another machine's sums
            may.
        report: called after each layer.

    Returns:
        The edits as they are in the weights: in their order, and with the states that were found, where these are
        others than in the model in which they were made.

    Raises:
        EditConflictError: if the edits do not fit together, or the weights are not those that they belong to. Nothing
            has changed.
        UnsupportedModelError: if the model cannot be edited, or its adapters are merged.
        UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
        FloatingPointError: if the result is not finite; nothing has changed.
        RankError: if another rank failed; nothing has changed.
    """
    ranks = ranks or Ranks.current()
    with ranks.together():
        edits = linked(edits)
        check_order(edits, allow_siblings)
        ranks.check_same("the edits", [edit.id for edit in edits])
        sequels = Sequel.of(edits)
        layers = find_layers(model, sequels)
        now = states(layers, ranks)
        found = find_positions(sequels, now)
        if all(count == len(sequels[name].edits) for name, (count, _) in found.items()):
            log.info("already in the weights: %s", first_few(edit.name for edit in edits))
            return list(edits)
        rounded = sorted(name for name, (_, is_exact) in found.items() if not is_exact)
        if rounded:
            log.warning(
                "the weights are those of the edits up to rounding only (another dtype, or a copy of one): %s. The "
                "edits are applied, but the result has no bits to be compared with",
                first_few(rounded),
            )
        pending = {name for name, (count, _) in found.items() if count < len(sequels[name].edits)}
        started = sorted(name for name in pending if found[name][0] or sequels[name].start)
        sources = (
            {} if base is None else find_sources(base, {name: (sequels[name], layers[name]) for name in started}, ranks)
        )
        plans = {}
        for name in sorted(pending):
            sequel, layer, (count, is_exact) = sequels[name], layers[name], found[name]
            expected = sequel.state(len(sequel.edits)) if is_exact else None
            if name in sources:
                plans[name] = plan_parameter(sequel, layer, sequel.edits, now[name], expected, sources[name])
                continue
            plans[name] = plan_parameter(sequel, layer, sequel.edits[count:], now[name], expected)
            if count and plans[name].expected is None:
                raise EditConflictError(
                    f"{name} has {sequel.edits[count - 1].name!r} already, and the others must be rounded together "
                    "with it: give the base, too"
                )
        after = commit_plans(plans, ranks, optimizers, allow_rounding, report)
    return _placed(edits, sequels, after)


def undo(
    model: nn.Module,
    edits: Sequence[Edit],
    names: Sequence[str],
    *,
    base: nn.Module | str | Path | None = None,
    approximate: bool = False,
    ranks: Ranks | None = None,
    optimizers: Sequence[Any] = (),
    allow_rounding: bool = False,
    report: Report | None = None,
) -> list[Edit]:
    """Take edits out of a model's weights, all of them or none.

    The changed experts are rebuilt from the base and the edits that remain, so that no trace is left. Subtracting is
    not exact, because sums were rounded: some elements end one unit in the last place from what they were.

    Args:
        model: the model, or a module that holds it.
        edits: all edits in the weights, in their order.
        names: names of those to take out.
        base: the unedited model or its folder, whole on each rank or sharded like the model; needed unless
            ``approximate``.
        approximate: whether to subtract the changes instead.
        ranks: the processes that hold the model. Each calls this with the same arguments.
        optimizers: the optimizers that train the weights now.
        allow_rounding: see :func:`apply`.
        report: called after each layer.

    Returns:
        The edits that remain, as :func:`apply` returns them.

    Raises:
        EditConflictError: if there is no such edit, one that remains was made on it, the weights do not have the
            edits, or the base is another one. Nothing has changed.
        ValueError: if there is no base, and ``approximate`` is off.
        UnsupportedModelError: if the model cannot be edited, or its adapters are merged.
        UnsupportedShardingError: if the weights are sharded in a way that cannot be edited.
        RankError: if another rank failed; nothing has changed.
    """
    ranks = ranks or Ranks.current()
    with ranks.together():
        edits = linked(edits)
        removed, remaining = _split(edits, names)
        if base is None and not approximate:
            raise ValueError(
                "give the base, from which the weights are rebuilt; or let approximate subtract the changes, after "
                "which some elements differ in the last place"
            )
        check_order(edits, allow_siblings=True)
        ranks.check_same("the edits", [edit.id for edit in edits])
        sequels, rest = Sequel.of(edits), Sequel.of(remaining)
        touched = {name for edit in removed for name in edit.changes}
        layers = find_layers(model, sequels)
        now = states(layers, ranks)
        found = find_positions(sequels, now)
        concerned = {name: (sequels[name], layers[name]) for name in sorted(touched)}
        sources = {} if base is None or approximate else find_sources(base, concerned, ranks)
        plans, elements = {}, 0
        for name, (sequel, layer) in concerned.items():
            count, is_exact = found[name]
            if count < len(sequel.edits):
                raise EditConflictError(
                    f"{name} does not have the edit {sequel.edits[count].name!r}: nothing is undone"
                )
            if approximate:
                gone = [edit for edit in sequel.edits if edit in removed]
                plan = plan_parameter(sequel, layer, gone, now[name], None)
                plans[name] = replace(plan, pending=[_negated(change) for change in plan.pending])
                experts = {expert for change in plan.pending for expert in change.deltas.experts}
                elements += len(experts) * layer.shape[1] * layer.shape[2]
            else:
                kept = [edit for edit in sequel.edits if edit in remaining]
                known = rest[name].state(len(kept)) if kept else sequel.base
                plans[name] = plan_parameter(sequel, layer, kept, now[name], known if is_exact else None, sources[name])
        after = commit_plans(plans, ranks, optimizers, allow_rounding, report)
    if approximate:
        log.warning(
            "subtracted: up to %s elements (those of the experts that %s changed) may differ by a unit in the last "
            "place from weights without the edit",
            f"{elements:,}",
            first_few(names),
        )
    return _placed(remaining, rest, after)


def verify(model: nn.Module, edits: Sequence[Edit], *, ranks: Ranks | None = None) -> list[Presence]:
    """Find which edits are in a model's weights, layer by layer. Nothing is changed.

    Args:
        model: the model, or a module that holds it.
        edits: the edits in their order.
        ranks: the processes that hold the model. Each calls this with the same edits.

    Raises:
        EditConflictError: if an edit is given twice or is of another model, or one that it was made on is missing.
        UnsupportedModelError: if the model has no experts, or its adapters are merged.
        UnsupportedShardingError: if the weights are sharded in a way that cannot be read.
        RankError: if another rank failed.
    """
    ranks = ranks or Ranks.current()
    with ranks.together():
        edits = linked(edits)
        check_order(edits, allow_siblings=True)
        sequels = Sequel.of(edits)
        now = states(find_layers(model, sequels), ranks)
    found = []
    for name, sequel in sequels.items():
        position = sequel.position(now[name])
        for number, edit in enumerate(sequel.edits):
            status: Literal["applied", "missing", "unknown"] = "unknown"
            if position is not None:
                status = "applied" if number < position[0] else "missing"
            found.append(Presence(edit, name, status, position is not None and position[1]))
    return found


def _negated(change: LayerChange) -> LayerChange:
    """Return what is subtracted to take a change out; all of these are rounded together."""
    return replace(change, deltas=change.deltas.with_right(-change.deltas.right), sum_base="", is_exact=True)


def _split(edits: Sequence[Edit], names: Sequence[str]) -> tuple[list[Edit], list[Edit]]:
    """Split edits into those to take out and those that remain."""
    unknown = sorted(set(names) - {edit.name for edit in edits})
    if unknown or not names:
        raise EditConflictError(
            f"there is no edit {first_few(map(repr, unknown)) or 'given'}; the edits are "
            f"{first_few((edit.name for edit in edits), 20)}"
        )
    removed = [edit for edit in edits if edit.name in names]
    remaining = [edit for edit in edits if edit.name not in names]
    for edit in removed:
        built = [other.name for other in remaining if edit.id in other.made_on]
        if built:
            raise EditConflictError(
                f"{first_few(map(repr, built))} {'was' if len(built) == 1 else 'were'} built on {edit.name!r}: undo "
                f"{'it' if len(built) == 1 else 'them'}, too"
            )
    return removed, remaining


def _placed(edits: Sequence[Edit], sequels: Mapping[str, Sequel], after: Mapping[str, State]) -> list[Edit]:
    """Return edits in their order, with the states of the weights that they are in now."""
    placed = []
    for number, edit in enumerate(edits):
        last = {name for name in edit.changes if sequels[name].edits[-1] is edit and name in after}
        others = {name: after[name] for name in last if after[name] != sequels[name].state(len(sequels[name].edits))}
        on = (*sorted(sequels[edit.layers[0].parameter].start), *(other.id for other in edits[:number]))
        placement = edit.placement if not others else Placement(on, others)
        order = number + 1 + len(sequels[edit.layers[0].parameter].start)
        placed.append(replace(edit, order=order, placement=placement))
    return placed
