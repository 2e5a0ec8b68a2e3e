"""The one place that reads or writes parameters: expert weights are changed in a transaction."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn


class Deltas(Protocol):
    """What a commit needs to know of deltas: the experts that change, and each one's dense change."""

    @property
    def experts(self) -> list[int]:
        """Experts that change."""
        ...

    def dense(self, expert: int) -> Tensor:
        """Change of one expert, ``[d_model, d_hidden]``."""
        ...

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        ...


class Transaction:
    """A set of weight changes that is applied as a whole or not at all.

    Before an expert is changed, its weights are copied; :meth:`rollback` puts the copies back bit by bit. Leaving the
    ``with`` block by an exception rolls back, whatever the exception is.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2, 3, 4))
        >>> with Transaction() as transaction:
        ...     transaction.touched
        0
    """

    def __init__(self) -> None:
        self._saved: dict[tuple[int, int], tuple[nn.Parameter, Tensor]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.rollback()
        self._saved.clear()

    @property
    def touched(self) -> int:
        """Number of experts changed so far."""
        return len(self._saved)

    @torch.no_grad()
    def commit(self, weight: nn.Parameter, deltas: Deltas, transposed: bool = False) -> float:
        """Add deltas to the experts of one parameter.

        The sum is taken in float32 (or float64, if either is) and rounded once to the parameter's dtype.

        Args:
            weight: ``[E, d_model, d_hidden]``, or ``[E, d_hidden, d_model]`` if ``transposed``.
            deltas: what to add.
            transposed: whether the experts are stored transposed.

        Returns:
            ``‖ΔW‖_F / ‖W‖_F`` over the experts that changed; 0 if none did.

        Raises:
            FloatingPointError: if a delta or a changed weight is not finite; nothing of this parameter has changed.
        """
        if not deltas.is_finite():
            raise FloatingPointError("a delta has values that are not finite")
        changed: dict[int, Tensor] = {}
        square_change = square_weight = 0.0
        for expert in deltas.experts:
            delta = deltas.dense(expert).to(weight.device)
            delta = delta.T if transposed else delta
            precision = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
            square_change += float(delta.double().square().sum())
            square_weight += float(weight[expert].double().square().sum())
            changed[expert] = (weight[expert].to(precision) + delta).to(weight.dtype)
            if not bool(torch.isfinite(changed[expert]).all()):
                raise FloatingPointError(f"the changed weights of expert {expert} are not finite in {weight.dtype}")
        for expert, value in changed.items():
            self._saved.setdefault((id(weight), expert), (weight, weight.data[expert].clone()))
            weight.data[expert].copy_(value)
        return (square_change / square_weight) ** 0.5 if square_weight else 0.0

    @torch.no_grad()
    def rollback(self) -> None:
        """Put back what every changed expert held before, bit by bit."""
        for (_, expert), (weight, value) in self._saved.items():
            weight.data[expert].copy_(value)
        self._saved.clear()
