"""A place to edit: some layers and a token, and what trials have found out about editing there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from lit_moeedit.data.encoding import EditToken

Tune = bool | Literal["neighbours"]
"""Values of the setting ``tune`` of :class:`~lit_moeedit.editing.Editor`."""
TOKENS: tuple[EditToken, ...] = ("subject_last", "last")
"""The tokens that can be edited."""


@dataclass(frozen=True)
class Place:
    """Layers and an edit token.

    Attributes:
        layers: indices of the layers, ascending.
        token: the edit token; ``None`` for a method that edits no single token.
        strength: strength of the preservation that trials have chosen; ``None`` if there were none.
        phrasings: number of further prompts of each fact that trials have chosen; ``None`` likewise.
        preserve: class of the preservation that has this strength, with its module; ``None`` likewise.
        stop: loss at which the search for target vectors stops, in nats per token, that trials have chosen; ``None``
            likewise.

    Example:
        >>> str(Place((3, 4), "last")), Place.from_dict(Place((3, 4), "last").to_dict()) == Place((3, 4), "last")
        ('layers 3, 4 at last', True)
    """

    layers: tuple[int, ...]
    token: EditToken | None
    strength: float | None = None
    phrasings: int | None = None
    preserve: str | None = None
    stop: float | None = None

    def __str__(self) -> str:
        parts = [f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"]
        parts += [] if self.token is None else [f"at {self.token}"]
        chosen = [] if self.strength is None else [f"strength {self.strength:g}"]
        chosen += [] if self.stop is None else [f"targets to {self.stop:g} nats"]
        chosen += [f"{self.phrasings} further prompts"] if self.phrasings else []
        return " ".join([*parts, "with", ", ".join(chosen)] if chosen else parts)

    def to_dict(self) -> dict[str, Any]:
        """Return layers and token as JSON types, and what trials have chosen, if there were any."""
        chosen = {"strength": self.strength, "phrasings": self.phrasings, "preserve": self.preserve, "stop": self.stop}
        known = {name: value for name, value in chosen.items() if value is not None}
        return {"layers": list(self.layers), "token": self.token, **known}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make a place of the result of :meth:`to_dict`.

        Raises:
            ValueError: if it is something else.
        """
        layers, token = data.get("layers"), data.get("token")
        indices = layers if isinstance(layers, list) else []
        if not indices or any(type(index) is not int or index < 0 for index in indices) or token not in (*TOKENS, None):
            raise ValueError(f"expected layers (indices) and a token of {', '.join(TOKENS)}, got {dict(data)!r:.200}")
        names = ("strength", "phrasings", "preserve", "stop")
        strength, phrasings, preserve, stop = (data.get(name) for name in names)
        is_strength = strength is None or (type(strength) in (int, float) and 0 < strength < math.inf)
        if not (stop is None or (type(stop) in (int, float) and 0 <= stop < math.inf)):
            raise ValueError(f"expected a stop of at least 0 nats, got {dict(data)!r:.200}")
        if not is_strength or not (phrasings is None or (type(phrasings) is int and phrasings >= 0)):
            raise ValueError(f"expected a strength above 0 and a number of phrasings, got {dict(data)!r:.200}")
        if not (preserve is None if strength is None else isinstance(preserve, str)):
            raise ValueError(f"expected a strength with the class that has it, got {dict(data)!r:.200}")
        return cls(tuple(sorted(set(indices))), token, strength, phrasings, preserve, stop)
