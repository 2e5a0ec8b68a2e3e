"""The callback that keeps edits of frozen experts, which a checkpoint of the trained weights alone does not hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
from typing_extensions import override

from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of, insert_callback
from lit_moeedit.callbacks.resources import optimizers_of
from lit_moeedit.edits import layers_by_parameter
from lit_moeedit.edits.histories import STATE_KEY, find_missing, histories_of, make, refuse_base, state_of
from lit_moeedit.interrupts import held
from lit_moeedit.models.experts import ExpertLayer, UnsupportedModelError
from lit_moeedit.sharding.fingerprint import Part, fingerprints
from lit_moeedit.sharding.history import EditSum, History
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError
from lit_moeedit.sharding.transaction import Transaction

log = logging.getLogger(__name__)


class FrozenEdits(StateOfWeights):
    """The edits of frozen experts, as changes of low rank, in the state of a run.

    :class:`~lit_moeedit.callbacks.KnowledgeEditing` adds it to the trainer by itself. A checkpoint of the trained
    weights alone (a pruned ``state_dict``, DeepSpeed's ``exclude_frozen_parameters``) does not hold edits of frozen
    experts. So this state does, with fingerprints of the experts before and after each edit. When a run is resumed from
    such a checkpoint, with the base that it began with, the edits are made again before anything is measured, bit for
    bit. Another base is refused. Where the checkpoint holds the edited experts, nothing is made.

    Attributes:
        histories: by names of parameters, as a model without adapters has them.
    """

    state_names = ("histories",)
    histories: dict[str, History]

    def __init__(self) -> None:
        super().__init__()
        self._is_unchecked = False
        self._in_checkpoint: frozenset[str] | None = None
        self._bases: dict[str, Part] = {}  # what a checkpoint took the place of, until it is known if it is needed

    @property
    @override
    def state_key(self) -> str:
        return STATE_KEY

    def add_to(self, trainer: L.Trainer) -> FrozenEdits:
        """Add this callback to a trainer, unless there is one already; return the one there is.

        That one takes over what this one knows.
        """
        found = callbacks_of(trainer, FrozenEdits)
        if found:
            found[0]._adopt(self)
            return found[0]
        insert_callback(trainer, self)
        strategy = trainer.strategy
        # no hook comes between the making of the model and that
        load = partial(self._keep_bases, trainer, strategy.load_checkpoint)
        strategy.load_checkpoint = load  # type: ignore[method-assign]
        # nor before the saving of weights only, without the states of callbacks
        save = partial(self._save_too, trainer, strategy.save_checkpoint)
        strategy.save_checkpoint = save  # type: ignore[method-assign]
        return self

    def _adopt(self, other: FrozenEdits) -> None:
        """Take over the states of models that another callback has from earlier runs."""
        if other is self:
            return
        if self._models.is_new:
            self._models, self.histories, self.left = other._models, other.histories, other.left
        else:
            other.let_go()
            self._models.take_over(other._models)
        other.__init__()  # type: ignore[misc]

    def _keep_bases(self, trainer: L.Trainer, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; what it takes the place of may be the base of its edits."""
        edited = {index for editing in callbacks_of(trainer, EditState) for index in editing.editor.layers}
        try:
            self._bases = {
                name: Part.of(layer.down_proj).to("cpu")
                for name, layer in layers_by_parameter(trainer.lightning_module).items()
                if layer.index in edited and not layer.down_proj.requires_grad
            }
        except (UnsupportedModelError, UnsupportedShardingError):  # refused later, with the reason
            log.debug("", exc_info=True)
        return load(*args, **kwargs)

    def _save_too(
        self, trainer: L.Trainer, save: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Save a checkpoint with this state, even one of weights only: a frozen base may not be in it."""
        self._forget_trained(trainer.lightning_module)
        if any(self.histories.values()):
            checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, self.state_dict())
        return save(checkpoint, *args, **kwargs)

    @override
    def begin_state(self) -> None:
        self.histories = {}

    # -- the state ----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return state_of(self.histories)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.histories = histories_of(state_dict)
        self._is_unchecked = True

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        # DeepSpeed loads the weights from files of its own
        weights = checkpoint.get("state_dict")
        self._in_checkpoint = frozenset(weights) if isinstance(weights, Mapping) and weights else None

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._forget_trained(pl_module)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget_trained(pl_module)

    def _forget_trained(self, pl_module: L.LightningModule) -> None:
        """Forget experts that are no longer frozen: what they are is in every checkpoint."""
        if any(self.histories.values()):
            for name, layer in layers_by_parameter(pl_module).items():
                if layer.down_proj.requires_grad:
                    self.histories.pop(name, None)

    # -- edits that are missing ---------------------------------------------------------------------------------------

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.make_missing(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.make_missing(trainer, pl_module)

    def make_missing(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the edits of frozen experts that a restored checkpoint tells of but does not hold, all or none.

        Every rank calls this; once after each restored checkpoint it does something.

        Raises:
            EditConflictError: if the experts are neither the base of the edits nor what these have left.
        """
        if not self._is_unchecked:
            self._bases = {}
            return
        self._is_unchecked = False
        ranks, layers = Ranks.current(), layers_by_parameter(pl_module)
        with ranks.together():
            todo = self._find_missing(layers, ranks)
            with held(Transaction(optimizers_of(trainer), ranks)) as transaction:
                for name, sums in todo.items():
                    self.histories[name] = (
                        *(own for own in self.histories[name] if all(own is not other for other in sums)),
                        *make(layers[name], sums, transaction),
                    )
                transaction.keep()
            self._find_bases(layers, ranks)
        if todo:
            edits = max(sum(len(own.deltas) for own in sums) for sums in todo.values())
            log.info("made %d changes of frozen experts again, which the checkpoint does not hold", edits)

    def _find_missing(self, layers: Mapping[str, ExpertLayer], ranks: Ranks) -> dict[str, list[EditSum]]:
        todo: dict[str, list[EditSum]] = {}
        for name, found in find_missing(layers, self.histories, ranks).items():
            stored_name = f"{layers[name].name}.down_proj"
            if found:
                todo[name] = found
            elif found is None and any(key.endswith(stored_name) for key in self._in_checkpoint or ()):
                log.warning("the frozen experts %s were changed after the last edit; the checkpoint's are used", name)
                del self.histories[name]
            elif found is None:
                raise refuse_base(name)
        return todo

    def _find_bases(self, layers: Mapping[str, ExpertLayer], ranks: Ranks) -> None:
        """Take the bases of the last sums, with which further edits are rounded together, if they were there."""
        bases = {
            name: self._bases[name].to(layers[name].down_proj.dtype)
            for name, history in self.histories.items()
            if history and history[-1].elements is None and history[-1].is_exact and name in self._bases
        }
        self._bases = {}
        found = fingerprints(bases, ranks) if bases else {}
        for name, base in bases.items():
            *others, last = self.histories[name]
            if found[name] == last.base:
                changed = {expert for change in last.deltas for expert in change.experts}
                elements = {expert: base.rows(expert).clone() for expert in changed}
                self.histories[name] = (*others, replace(last, elements=elements))
