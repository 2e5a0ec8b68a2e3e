"""A run whose edits are all lost once, before their only renewal, whatever the training does."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.callbacks.renewals import EditRenewing
from lit_moeedit.planning import CostCounter
from lit_moeedit.planning.upkeep import RENEWAL
from lit_moeedit.replay import Draws


def lose_all_once(patch: pytest.MonkeyPatch, meter: CostCounter) -> list[int]:
    """Count renewals with ``meter``; edits are all generated, but for the first time that a renewal asks.

    Returns:
        A list that gets an element each time that a renewal asks which edits are lost.
    """
    asked: list[int] = []
    renew, lost, evaluate = EditRenewing._renew, EditRenewing._lost, KnowledgeEditing.evaluate

    def metered(*args: Any) -> None:
        with meter.phase(RENEWAL):
            renew(*args)

    def all_lost_at_first(self: Any, module: Any, facts: Any) -> list[str]:
        asked.append(len(lost(self, module, facts)))
        return [fact.key for fact in facts] if len(asked) == 1 else []

    def all_generated(*args: Any) -> Any:
        found = evaluate(*args)
        return replace(found, edits_exact=torch.ones_like(found.edits_exact))

    patch.setattr(EditRenewing, "_renew", metered)
    patch.setattr(EditRenewing, "_lost", all_lost_at_first)
    patch.setattr(KnowledgeEditing, "evaluate", all_generated)
    # as a plan does for the steps that it simulates
    patch.setattr(Draws, "count", lambda self, expected, batch: ceil(expected))
    return asked
