"""A module's ``training_step``, replaced for one batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L

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
