"""Repair of what DeepSpeed's universal checkpoints lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def mend_optimizer(optimizer: Any, weight_decays: Sequence[float]) -> None:
    """Give each weight its own Adam step and each group its own weight decay again.

    A run that is sharded over another number of ranks resumes from a universal checkpoint. From it DeepSpeed's stage 3
    takes one step tensor for all weights, which then counts once for each of them, and the settings of the first group
    for all groups. Every other optimizer stays as it is.

    Args:
        optimizer: the optimizer, as the trainer has it.
        weight_decays: weight decays of its groups, in order.
    """
    seen: set[int] = set()
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, Tensor):
            if step.data_ptr() in seen:
                state["step"] = step.clone()
            seen.add(step.data_ptr())
    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=False):
        group["weight_decay"] = weight_decay
