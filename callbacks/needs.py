"""The need of edited facts to be stated again, by the probability of their new targets."""

from __future__ import annotations

import math

import lightning as L
import torch

from lit_moeedit.editing.evaluation import score
from lit_moeedit.models.experts import find_model
from lit_moeedit.replay import Statements
from lit_moeedit.sharding.ranks import Ranks

MEASURE_EVERY = 16
"""Optimizer steps between two measurements of what facts need."""
MEASURED = 1.0
"""Number of facts that are measured for each statement since the last measurement."""


def steps_between(every_n_steps: int) -> int:
    """Return the optimizer steps between two measurements, a multiple of those between two replays."""
    return every_n_steps * max(1, MEASURE_EVERY // every_n_steps)


def measure_needs(
    trainer: L.Trainer, pl_module: L.LightningModule, statements: Statements, expected: float, every_n_steps: int
) -> dict[str, float]:
    """Measure the probabilities of the new targets of some facts, in turn; every rank calls this.

    Args:
        trainer: the trainer, after an optimizer step at which a measurement is due.
        pl_module: its module.
        statements: the statements of all facts; there is at least one.
        expected: number of statements for a batch, on average.
        every_n_steps: optimizer steps between two replays.

    Returns:
        By key of a fact, its need in [0, 1]: 0 if its new target is generated with certainty, 1 if it is lost.
    """
    facts, every = statements.facts, steps_between(every_n_steps)
    replays = every // every_n_steps * trainer.world_size
    # the batches of two ranks may have other numbers of rows
    count = Ranks.current().least(min(len(facts), max(1, math.ceil(MEASURED * expected * replays))))
    start = trainer.global_step // every * count
    chosen = [facts[(start + i) % len(facts)] for i in range(count)]
    with Ranks.current().together():
        found = score(
            find_model(pl_module),
            statements.tokenizer,
            [fact.prompt for fact in chosen],
            [fact.target_new for fact in chosen],
        )
    needs = torch.where(found.exact, 1.0 - found.log_prob.exp(), 1.0).tolist()
    return {fact.key: need for fact, need in zip(chosen, needs, strict=True)}
