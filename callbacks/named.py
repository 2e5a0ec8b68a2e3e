"""Callbacks of which several live together in one trainer."""

from __future__ import annotations

import logging
import re
from typing import Any, ClassVar, TypeVar

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

log = logging.getLogger(__name__)

C = TypeVar("C", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, kind: type[C]) -> list[C]:
    """Return all callbacks of a kind in the trainer."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def insert_callback(trainer: L.Trainer, callback: L.Callback) -> None:
    """Add a callback before those that save checkpoints, after all others."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = (index for index, other in enumerate(callbacks) if isinstance(other, Checkpoint))
    callbacks.insert(next(checkpoints, len(callbacks)), callback)


def metrics_prefix(kind: str, name: str | None) -> str:
    """Return the prefix of a callback's metrics: ``edit``, or ``edit_<name>``."""
    return kind if name is None else f"{kind}_{name}"


class NamedCallback(L.Callback):
    """A callback of which a trainer may have several, each with its own metrics and its own state in checkpoints.

    A state belongs to the callback with the same name, whatever else has changed, and the state without a name to the
    callback without one, of which there may be one. Where a run has one callback of a kind and its checkpoint one
    state, they belong together if one of them has no name.

    Args:
        name: part of the names of the metrics; ``None`` for the names without it.
        settings: settings that tell callbacks without a name apart.

    Raises:
        ValueError: if the name has other than letters, digits, ``_``, ``-`` and ``.``.
        MisconfigurationException: when the run starts, if two callbacks would log metrics under the same names, or
            states of a checkpoint cannot be told apart.
    """

    groups: ClassVar[tuple[str, ...]] = ()
    """Groups of the metrics of a callback without a name; the first of them begins the others."""

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        super().__init__()
        if name is not None and not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be made of letters, digits, '_', '-' and '.', got {name!r}")
        self.name = name
        self._settings = settings

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(**(self._settings if self.name is None else {"name": self.name}))

    @property
    def label(self) -> str:
        """The name, or the state key of a callback without one."""
        return self.name or self.state_key

    @property
    def heading(self) -> str:
        """The beginning of a message of this callback: its name, if it has one."""
        return f"{self.name}: " if self.name else ""

    @property
    def metrics_prefix(self) -> str:
        """The prefix of the metrics."""
        return metrics_prefix(self.groups[0], self.name)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for other in callbacks_of(trainer, NamedCallback):
            shared = self._metric_groups & other._metric_groups
            if other is not self and shared:
                raise MisconfigurationException(
                    f"{self.label} and {other.label} would both log {min(shared)}/…; give each a 'name' of its own"
                )

    @property
    def _metric_groups(self) -> set[str]:
        return {self.metrics_prefix + group.removeprefix(self.groups[0]) for group in self.groups}

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # afterwards Lightning looks for the state under the callback's key. Called for each callback of a kind, this
        # sorts the states of all of them.
        states, kind = checkpoint["callbacks"], type(self).__qualname__
        same = [callback for callback in callbacks_of(trainer, NamedCallback) if type(callback) is type(self)]
        found = [key for key in states if key == kind or str(key).startswith(f"{kind}{{")]
        waiting = [callback for callback in same if callback.state_key not in found]
        left = [key for key in found if key not in {callback.state_key for callback in same}]
        unnamed = [callback for callback in waiting if callback.name is None]
        nameless = [key for key in left if not key.startswith(f"{kind}{{'name'")]
        if len(same) == len(found) == 1 and (unnamed or nameless):  # two different names are no mistake
            unnamed, nameless = waiting, left
        if len(unnamed) == len(nameless) == 1:
            log.info("the state %s of the checkpoint is that of %s now", nameless[0], unnamed[0].state_key)
            states[unnamed[0].state_key] = states.pop(nameless[0])
            waiting.remove(unnamed[0])
            left.remove(nameless[0])
        if waiting and left:
            raise MisconfigurationException(
                f"the checkpoint holds the states {', '.join(left)}, but no callback with such a name is there, while "
                f"{', '.join(callback.state_key for callback in waiting)} found none; give each {kind} the 'name' that "
                "it had, and keep those that have a state"
            )
