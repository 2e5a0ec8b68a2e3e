"""A place to edit: some layers and a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from lit_moeedit.data.encoding import EditToken

TOKENS: tuple[EditToken, ...] = ("subject_last", "last")
"""The tokens that can be edited."""


@dataclass(frozen=True)
class Place:
    """Layers and an edit token.

    Attributes:
        layers: indices of the layers, ascending.
        token: the edit token; ``None`` for a method that edits no single token.

    Example:
        >>> str(Place((3, 4), "last")), Place.from_dict(Place((3, 4), "last").to_dict())
        ('layers 3, 4 at last', Place(layers=(3, 4), token='last'))
    """

    layers: tuple[int, ...]
    token: EditToken | None

    def __str__(self) -> str:
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {', '.join(map(str, self.layers))}"
        return layers if self.token is None else f"{layers} at {self.token}"

    def to_dict(self) -> dict[str, Any]:
        """Return layers and token as JSON types."""
        return {"layers": list(self.layers), "token": self.token}

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
        return cls(tuple(sorted(set(indices))), token)
