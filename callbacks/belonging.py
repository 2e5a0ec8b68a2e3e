"""Callbacks whose state belongs to the weights of a model, whichever runs and models they see."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import lightning as L
from torch import nn
from typing_extensions import override

from lit_moeedit.callbacks.named import NamedCallback
from lit_moeedit.models.experts import UnsupportedModelError, expert_layers, find_model
from lit_moeedit.per_model import PerModel
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks


def model_of(pl_module: L.LightningModule) -> nn.Module:
    """Return the object by which a model is recognised: the transformers model, else the module."""
    try:
        return find_model(pl_module)
    except UnsupportedModelError:  # refused where a model is needed
        return pl_module


def expert_weights(model: nn.Module, indices: Collection[int] | None = None) -> dict[str, nn.Parameter]:
    """Return the down-projections of the layers with experts, by name; none for a model without experts.

    Args:
        model: the model.
        indices: indices of the layers; ``None`` for all.
    """
    try:
        layers = expert_layers(find_model(model))
    except UnsupportedModelError:
        return {}
    chosen = (layer for index, layer in layers.items() if indices is None or index in indices)
    return {f"{layer.name}.down_proj": layer.down_proj for layer in chosen}


class StateOfWeights(NamedCallback):
    """A callback whose state is about the weights of one model, and follows them.

    A run with another model begins with a new state; a later run with the first model goes on with the first state. A
    model is recognised by its object, a new object (loaded from a checkpoint, say) by its weights: it goes on if its
    edited layers are what the last run left. A state that is restored from a checkpoint belongs to the model that the
    checkpoint is loaded into.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that make up the state; :meth:`begin_state` sets all of them."""

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._models: PerModel[dict[str, Any]] = PerModel(dict)
        self.left: dict[str, str] = {}
        """Fingerprints of the edited layers when the last run ended; empty if they are not known."""
        self.begin_state()

    def begin_state(self) -> None:
        """Set the state to that of a callback that has seen no weights."""

    def take_up(self, model: nn.Module) -> None:
        """Turn to the state of a model. Every rank calls this, because fingerprints may be needed."""
        if self._models.model is not model:
            self._use(self._models.switch(model, self._state(), lambda state: are_left(state["left"], model)))

    def let_go(self) -> None:
        """Put the state away, and begin a new one for the weights that a checkpoint brings."""
        self._use(self._models.switch(None, self._state()))

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self.let_go()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.take_up(model_of(pl_module))

    # DeepSpeed restores states between the start of the fit and that of training
    on_train_start = on_validation_start = on_test_start = on_fit_start

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.state_names, "left")}

    def _use(self, state: dict[str, Any]) -> None:
        if not state:
            self.left = {}
            self.begin_state()
        for name, value in state.items():
            setattr(self, name, value)


def are_left(left: dict[str, str], model: nn.Module) -> bool:
    """Tell if a model has exactly the weights of these fingerprints. Every rank calls this."""
    weights = expert_weights(model)
    if not left or not left.keys() <= weights.keys():
        return False
    return fingerprints({name: weights[name] for name in left}, Ranks.current()) == left
