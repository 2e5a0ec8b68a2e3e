"""States of callbacks, checked as they come out of a checkpoint: a file that somebody else may have made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lit_moeedit.checkpoint_fields import CheckpointError, field

State = Mapping[str, Any]
_NUMBER = (int, float)


def editing(state: State) -> State:
    """The state of a ``KnowledgeEditing``, as it is, if it is one.

    Raises:
        CheckpointError: saying which field is wrong; likewise below.
    """
    where = "the state of KnowledgeEditing in the checkpoint"
    judged = _named(where, state, "applied", list, "lists of true and false")
    if not all(isinstance(value, bool) for values in judged.values() for value in values):
        raise CheckpointError(f"{where}: field 'applied' should hold lists of true and false by names")
    if not all(isinstance(fact, str) for fact in field(where, state, "undone", list)):
        raise CheckpointError(f"{where}: field 'undone' should hold texts")
    for name in ("edits_made", "last_step", "renewals"):
        if field(where, state, name, int) < 0:
            raise CheckpointError(f"{where}: field {name!r} should be at least 0, but is {state[name]}")
    field(where, state, "memory", dict, optional=True)
    return state


def report(state: State, phases: Iterable[str]) -> State:
    """The state of an ``EditReport``, as it is, if it is one with the seconds of all ``phases``."""
    where = "the state of EditReport in the checkpoint"
    _named(where, state, "perplexity", _NUMBER, "numbers")
    for answers in _named(where, state, "answers", dict, "answers").values():
        _named(where, {"answers": answers}, "answers", str, "texts")
    if field(where, state, "failed", dict, optional=True):
        _named(where, state, "failed", str, "texts")
    edits = field(where, state, "edits", list)
    for index, edit in enumerate(edits):
        inner = f"{where}, edits[{index}]"
        if not isinstance(edit, dict):
            raise CheckpointError(f"{inner} should be a dict, but is a {type(edit).__name__}")
        field(inner, edit, "facts", int)
        field(inner, edit, "kept", bool)
        before, after, seconds = (
            _named(inner, edit, name, _NUMBER, "numbers") for name in ("before", "after", "seconds")
        )
        if before.keys() != edits[0]["before"].keys() or after.keys() != edits[0]["after"].keys():
            raise CheckpointError(f"{inner} should hold the same metrics as the others")
        if not seconds.keys() >= set(phases):
            raise CheckpointError(f"{inner} should hold the seconds of {', '.join(phases)}")
    return state


def routing(state: State) -> State:
    """The state of a ``RoutingMonitor``, as it is, if it is one."""
    where = "the state of RoutingMonitor in the checkpoint"
    field(where, state, "probe", str)
    _named(where, state, "last_edit", _NUMBER, "numbers")
    experts, probabilities = (field(where, state, name, dict) for name in ("experts", "probabilities"))
    sound = experts.keys() == probabilities.keys() and all(
        isinstance(layer, int) and _is_routing(chosen, probabilities[layer]) for layer, chosen in experts.items()
    )
    if not sound:
        raise CheckpointError(
            f"{where}: fields 'experts' and 'probabilities' should hold experts [N, k] and finite probabilities [N, E] "
            "of the same layers"
        )
    return state


def _named(where: str, state: State, name: str, kind: type | tuple[type, ...], what: str) -> dict[str, Any]:
    """Values of one kind by texts, in a field."""
    found: dict[str, Any] = field(where, state, name, dict)
    if not all(isinstance(key, str) and isinstance(value, kind) for key, value in found.items()):
        raise CheckpointError(f"{where}: field {name!r} should hold {what} by names")
    return found


def _is_routing(chosen: Any, probabilities: Any) -> bool:
    return (
        isinstance(chosen, Tensor)
        and isinstance(probabilities, Tensor)
        and chosen.ndim == probabilities.ndim == 2
        and len(chosen) == len(probabilities)
        and not chosen.is_floating_point()
        and probabilities.is_floating_point()
        and bool(((chosen >= 0) & (chosen < probabilities.shape[1])).all())
        and bool(probabilities.isfinite().all())
    )
