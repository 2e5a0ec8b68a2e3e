"""A module's ``training_step``, replaced for one batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_moeedit.sharding.shards import is_partitioned

Step = Callable[..., Any]


class ReplacedStep:
    """The replacement of the ``training_step`` of a module until :meth:`restore`.

    Strategies call the attribute of the module, within their wrappers of it, so a replacement is trained under DDP and
    DeepSpeed, too.
    """

    def __init__(self) -> None:
        self._module: L.LightningModule | None = None
        self._own: Step | None = None

    def put(self, pl_module: L.LightningModule, step: Step) -> None:
        """Replace the method by a function that is called with the original one, and then with its arguments."""
        self.restore()
        original = pl_module.training_step
        # a module object may have one of its own, such as a compiled one
        self._module, self._own = pl_module, pl_module.__dict__.get("training_step")

        @wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return step(original, *args, **kwargs)

        pl_module.training_step = replacement  # type: ignore[method-assign]

    def restore(self) -> None:
        """Put the method back, if it is replaced."""
        module, self._module = self._module, None
        if module is None:
            return
        if self._own is None:
            del module.training_step
        else:
            module.training_step = self._own  # type: ignore[method-assign]


def add_loss(output: Any, loss: Tensor) -> Any:
    """Add a loss to the output of ``training_step``, a loss or a dict with ``loss``; the output is not changed."""
    return output + loss if isinstance(output, Tensor) else {**output, "loss": output["loss"] + loss}


def check_further_forward(pl_module: L.LightningModule, asked_by: str, advice: str) -> None:
    """Check that a step may have a further forward, whose loss :func:`add_loss` adds.

    Args:
        pl_module: the module.
        asked_by: callback, and argument if any, that asks for it.
        advice: alternative for the user.

    Raises:
        MisconfigurationException: under manual optimization or DeepSpeed ZeRO stage 3.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{asked_by} needs automatic optimization, which {type(pl_module).__name__} does not use; {advice}"
        )
    # FSDP2 adds up what the backward pass reduces after each use of a weight
    if any(is_partitioned(weight) and not isinstance(weight, DTensor) for weight in pl_module.parameters()):
        raise MisconfigurationException(
            f"{asked_by} needs a second forward in each step, which is not supported under DeepSpeed ZeRO stage 3: it "
            f"reduces gradients twice and fails; {advice}"
        )
