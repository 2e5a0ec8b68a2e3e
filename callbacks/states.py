"""States of callbacks, checked as they come out of a checkpoint: a file that somebody else may have made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_moeedit.sharding.files import CheckpointError, field

EDIT: dict[str, type] = {"facts": int, "kept": bool, "before": dict, "after": dict, "seconds": dict}
"""What a report keeps of each edit."""


def number(where: str, state: Mapping[str, Any], name: str) -> int:
    """A count in a state; ``where`` names the state in an error."""
    value: int = field(where, state, name, int)
    if value < 0:
        raise CheckpointError(f"{where}: field {name!r} should be at least 0, but is {value}")
    return value


def texts(where: str, state: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts in a state."""
    found: list[str] = field(where, state, name, list)
    if not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{where}: field {name!r} should hold texts")
    return found


def named(where: str, state: Mapping[str, Any], name: str, kind: type | tuple[type, ...], what: str) -> dict[str, Any]:
    """Values of one kind by texts, in a state."""
    found: dict[str, Any] = field(where, state, name, dict)
    if not all(isinstance(key, str) and isinstance(value, kind) for key, value in found.items()):
        raise CheckpointError(f"{where}: field {name!r} should hold {what} by names")
    return found


def judgements(where: str, state: Mapping[str, Any], name: str) -> dict[str, list[bool]]:
    """For each fact, by its key, whether its neighbours were said right."""
    found: dict[str, list[bool]] = named(where, state, name, list, "lists of true and false")
    if not all(isinstance(value, bool) for values in found.values() for value in values):
        raise CheckpointError(f"{where}: field {name!r} should hold lists of true and false by names")
    return found


def edits(where: str, state: Mapping[str, Any], name: str, phases: tuple[str, ...]) -> list[dict[str, Any]]:
    """What a report keeps of its edits."""
    found: list[dict[str, Any]] = field(where, state, name, list)
    for index, edit in enumerate(found):
        inner = f"{where}, {name}[{index}]"
        if not isinstance(edit, dict):
            raise CheckpointError(f"{inner} should be a dict, but is a {type(edit).__name__}")
        for key, kind in EDIT.items():
            field(inner, edit, key, kind)
        for key in ("before", "after", "seconds"):
            named(inner, edit, key, (int, float), "numbers")
        if not edit["seconds"].keys() >= set(phases) or edit["before"].keys() != found[0]["before"].keys():
            raise CheckpointError(
                f"{inner} should hold the seconds of {', '.join(phases)}, and the metrics of the others"
            )
    return found


def routing(where: str, state: Mapping[str, Any]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Chosen experts ``[N, k]`` (int64) and probabilities ``[N, E]`` (float32) by layer index."""
    experts, probabilities = (field(where, state, name, dict) for name in ("experts", "probabilities"))
    sound = experts.keys() == probabilities.keys() and all(
        isinstance(layer, int) and _is_routing(chosen, probabilities[layer]) for layer, chosen in experts.items()
    )
    if not sound:
        raise CheckpointError(
            f"{where}: fields 'experts' and 'probabilities' should hold, for the same layers, experts [N, k] and "
            "finite probabilities [N, E]"
        )
    return {i: x.long() for i, x in experts.items()}, {i: x.float() for i, x in probabilities.items()}


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
