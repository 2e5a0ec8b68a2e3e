"""Draws of statements for a batch: a function of seed, batch and rank, so that a resumed run draws the same."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
UNKNOWN_NEED = 0.5
"""Need of a fact that has not been measured yet."""
LEAST_NEED = 0.01
"""Need of a fact that is generated with certainty."""
SAFE_NEED = 0.2
"""Need below which a fact is not stated."""


@dataclass(frozen=True)
class Draws:
    """Draws of statements, the same for the same arguments in every process.

    Every other statement is the next one of a cycle through all facts, in an order that is new in each round. The
    others are drawn with probabilities in proportion to the need of their facts. So no fact waits for longer than two
    rounds, and a fact that is nearly lost is stated more often. Facts that are known to be safe are left out.

    Args:
        seed: seed of all draws.
    """

    seed: int = 0

    def count(self, expected: float, batch: int) -> int:
        """Round the expected number of rows of a batch up or down at random, so that it holds on average.

        The number is the same on all ranks.

        Example:
            >>> sum(Draws().count(0.25, batch) for batch in range(1000)) / 1000
            0.224
        """
        return math.floor(expected + random.Random(f"{self.seed}/{batch}").random())

    def draw(
        self,
        statements: Mapping[str, Sequence[T]],
        count: int,
        start: int,
        batch: int,
        rank: int = 0,
        needs: Mapping[str, float] | None = None,
        least: int = 0,
    ) -> list[T]:
        """Draw the statements of a batch.

        Args:
            statements: statements by the key of their fact.
            count: maximum number of statements.
            start: number of statements that were drawn before, on all ranks together; an estimate will do.
            batch: index of the batch in the run.
            rank: index of the process.
            needs: by key of a fact, its need in [0, 1]: 0 if it is generated with certainty, 1 if it is lost. ``None``
                for draws without regard to it, all of which are returned.
            least: number of the first statements that are returned even if their facts are safe.
        """
        keys, rng = list(statements), random.Random(f"{self.seed}/{batch}/{rank}")
        if not keys:
            return []
        weights = None if needs is None else [max(LEAST_NEED, needs.get(key, UNKNOWN_NEED)) for key in keys]
        drawn: list[T] = []
        for place in range(start, start + count):
            if weights is not None and place % 2:
                key = rng.choices(keys, weights)[0]
            else:
                turn = place // (1 if weights is None else 2)
                key = keys[_order(self.seed, turn // len(keys), len(keys))[turn % len(keys)]]
            statement = rng.choice(statements[key])
            if len(drawn) < least or needs is None or needs.get(key, UNKNOWN_NEED) >= SAFE_NEED:
                drawn.append(statement)
        return drawn


@lru_cache(maxsize=8)
def _order(seed: int, turn: int, count: int) -> list[int]:
    """Return the order of the facts in one round of the cycle."""
    order = list(range(count))
    random.Random(f"{seed}/{turn}/order").shuffle(order)
    return order
