"""The count of the statements that a run was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.reports.plain import restored, to_plain
from lit_moeedit.sharding.ranks import Ranks


@dataclass(frozen=True)
class Counted:
    """The counts of a checkpoint.

    Attributes:
        statements: number of statements, on all ranks.
        facts: number of facts that were stated last.
        given_up: subjects of the facts that were given up.
    """

    statements: int = 0
    facts: int = 0
    given_up: tuple[str, ...] = ()


class Tally:
    """The count of statements so far.

    Ranks draw as many as each other as long as their batches have as many rows. So between two exchanges the others are
    taken to have drawn as many as this one, and a checkpoint needs no exchange.

    Args:
        counted: the counts of a run that is resumed.

    Attributes:
        facts: number of facts that are stated.
        given_up: subjects of the facts that are given up.
    """

    def __init__(self, counted: Counted | None = None) -> None:
        counted = counted or Counted()
        self.facts, self.given_up = counted.facts, counted.given_up
        self._exchanged, self._own, self._others = counted.statements, 0, 0

    @property
    def statements(self) -> int:
        """Number of statements so far, on all ranks."""
        return self._exchanged + self._own + self._others

    def add(self, statements: int, ranks: int) -> None:
        """Add the statements of a batch of this rank, which is one of ``ranks``."""
        self._own += statements
        self._others += statements * (ranks - 1)

    def exchange(self, ranks: Ranks) -> None:
        """Make the count exact and the same on all ranks; every rank calls this at the same moment."""
        own = torch.tensor(self._own)
        if ranks.size > 1:
            ranks.check_errors()
            ranks.all_reduce(own)
        self._exchanged += int(own)
        self._own = self._others = 0

    def state(self) -> dict[str, Any]:
        """Return the count as plain values."""
        plain: dict[str, Any] = to_plain(Counted(self.statements, self.facts, self.given_up))
        return plain

    @classmethod
    def of_state(cls, where: str, state: object) -> Self:
        """Make a count from the result of :meth:`state`.

        Raises:
            CheckpointError: naming the field that is not as it should be.
        """
        where = f"{where}, replayed"
        counted: Counted = restored(Counted, state, where)
        for name in ("statements", "facts"):
            if getattr(counted, name) < 0:
                raise CheckpointError(f"{where}: field {name!r} should be at least 0, but is {getattr(counted, name)}")
        return cls(counted)
