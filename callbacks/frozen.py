"""The callback that keeps edits of frozen experts, which a checkpoint of the trained weights alone does not hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
from typing_extensions import override

from lit_moeedit.callbacks.belonging import StateOfWeights, model_of
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of, insert_callback
from lit_moeedit.callbacks.resources import optimizers_of
from lit_moeedit.edits import layers_by_parameter
from lit_moeedit.edits.histories import (
    STATE_KEY,
    find_missing,
    histories_of,
    make,
    refuse_base,
    state_of,
)
from lit_moeedit.edits.states import histories_in, keep_in
from lit_moeedit.interrupts import held
from lit_moeedit.models.experts import ExpertLayer, UnsupportedModelError
from lit_moeedit.sharding.fingerprint import Part, fingerprints
from lit_moeedit.sharding.history import EditSum, History
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.sharding.shards import UnsupportedShardingError
from lit_moeedit.sharding.transaction import Transaction
from lit_moeedit.text import first_few

log = logging.getLogger(__name__)


class FrozenEdits(StateOfWeights):
    """The edits of frozen experts, as changes of low rank, in the state of a run.

    :class:`~lit_moeedit.callbacks.KnowledgeEditing` adds it to the trainer by itself. A checkpoint of the trained
    weights alone (a pruned ``state_dict``, DeepSpeed's ``exclude_frozen_parameters``) does not hold edits of frozen
    experts. So this state does, with fingerprints of the experts before and after each edit. When a run is resumed from
    such a checkpoint, with the base that it began with, the edits are made again before anything is measured, bit for
    bit. Another base is refused, also by a checkpoint from before the first edit. Where the checkpoint holds the edited
    experts, nothing is made.

    Histories travel with the model: a later run with other callbacks, and one of a module from
    :meth:`LitMoE.load_from_checkpoint <lit_moeedit.LitMoE>`, go on with them.

    Attributes:
        histories: by names of parameters, as a model without adapters has them.
        unedited: fingerprints of the frozen experts that the run edits later.
    """

    state_names = ("histories", "unedited")
    histories: dict[str, History]
    unedited: dict[str, str]

    def __init__(self) -> None:
        super().__init__()
        self._is_unchecked = False
        self._is_new_fit = False
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
            self._models = other._models
            self._use(other._state())
        else:
            other.let_go()
            self._models.take_over(other._models)
        other.__init__()  # type: ignore[misc]

    def _keep_bases(self, trainer: L.Trainer, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint; what it takes the place of may be the base of its edits."""
        try:
            layers = _edited_layers(trainer, trainer.lightning_module)
            self._bases = {name: Part.of(layer.down_proj).to("cpu") for name, layer in layers.items()}
        except (UnsupportedModelError, UnsupportedShardingError):  # refused later, with the reason
            log.debug("", exc_info=True)
        return load(*args, **kwargs)

    def _save_too(
        self, trainer: L.Trainer, save: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Save a checkpoint with this state, even one of weights only: a frozen base may not be in it."""
        self._forget_trained(trainer.lightning_module)
        if any(self.histories.values()) or self.unedited:
            checkpoint.setdefault("callbacks", {}).setdefault(self.state_key, self.state_dict())
        return save(checkpoint, *args, **kwargs)

    @override
    def begin_state(self) -> None:
        self.histories, self.unedited = {}, {}

    # -- the state ----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return state_of(self.histories, self.unedited)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.histories, self.unedited = histories_of(state_dict)
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
        if any(self.histories.values()) or self.unedited:
            for name, layer in layers_by_parameter(pl_module).items():
                if layer.down_proj.requires_grad:
                    self.histories.pop(name, None)
                    self.unedited.pop(name, None)

    # -- the start of a fit -------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._is_new_fit = True

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make what a restored checkpoint lacks, and compare what is known of frozen experts with the weights.

        Every rank calls this before the first edit of a fit; once in each fit it does something.

        Raises:
            EditConflictError: see :meth:`make_missing`.
        """
        self.make_missing(trainer, pl_module)
        if not self._is_new_fit:
            return
        self._is_new_fit = False
        model, ranks = model_of(pl_module), Ranks.current()
        travelling = histories_in(model)
        with ranks.together():
            layers = _edited_layers(trainer, pl_module, {*self.histories, *travelling})
            weights = {name: layer.down_proj for name, layer in layers.items()}
            now = fingerprints(weights, ranks) if weights else {}
        known = ((name, own.get(name)) for name in layers for own in (travelling, self.histories))
        # experts in another state were trained or loaded since
        self.histories = {
            name: _fitting(history, layers[name])
            for name, history in known
            if history and history[-1].after[-1] == now[name]
        }
        self.unedited = {name: value for name, value in now.items() if name not in self.histories}
        keep_in(model, self.histories)
        alone = [name for name, own in self.histories.items() if _lacks_base(own[-1])]
        if alone:
            log.info(
                "the base of the frozen experts %s is not in memory: their next edit begins another sum, and ends with "
                "other bits than in a run that was not interrupted; to have its bits, resume with a module of the base",
                first_few(alone),
            )

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
            EditConflictError: if the experts are neither the base of the edits nor what these have left, or those of a
                checkpoint from before the first edit are others.
        """
        model, is_restored = model_of(pl_module), self._is_unchecked
        self.take_up(model)
        self._is_unchecked = False
        if is_restored:
            self._make_missing(trainer, pl_module)
        self._bases = {}
        travelling = histories_in(model)
        is_new = not self.histories
        if is_new:
            self.histories = travelling
        if is_restored or is_new or not travelling:
            keep_in(model, self.histories)

    def _make_missing(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
            self._find_bases(pl_module, layers, ranks)
        if todo:
            edits = max(sum(len(own.deltas) for own in sums) for sums in todo.values())
            log.info("made %d changes of frozen experts again, which the checkpoint does not hold", edits)

    def _find_missing(self, layers: Mapping[str, ExpertLayer], ranks: Ranks) -> dict[str, list[EditSum]]:
        todo: dict[str, list[EditSum]] = {}
        for name, found in find_missing(layers, self.histories, self.unedited, ranks).items():
            stored_name = f"{layers[name].name}.down_proj"
            is_stored = any(key.endswith(stored_name) for key in self._in_checkpoint or ())
            if found:
                todo[name] = found
            elif found is None and not is_stored:
                raise refuse_base(name, name in self.unedited)
            elif found is None and name in self.histories:
                log.warning("the frozen experts %s were changed after the last edit; the checkpoint's are used", name)
                del self.histories[name]
        return todo

    def _find_bases(self, pl_module: L.LightningModule, layers: Mapping[str, ExpertLayer], ranks: Ranks) -> None:
        """Take the bases of the last sums, with which further edits are rounded together, where they are known.

        They were in the weights that the checkpoint took the place of, or travel with the model.
        """
        wanted = {name: own[-1] for name, own in self.histories.items() if own and _lacks_base(own[-1])}
        replaced = {name: self._bases[name].to(layers[name].down_proj.dtype) for name in wanted if name in self._bases}
        found = fingerprints(replaced, ranks) if replaced else {}
        travelling = histories_in(model_of(pl_module))
        for name, last in wanted.items():
            known = [own.elements or {} for own in travelling.get(name, ()) if own.base == last.base]
            if found.get(name) == last.base:
                known.append({expert: replaced[name].rows(expert).clone() for expert in last.experts})
            elements = next((one for one in reversed(known) if one.keys() >= {*last.experts}), None)
            self.histories[name] = (*self.histories[name][:-1], replace(last, elements=elements))


def _lacks_base(own: EditSum) -> bool:
    """Tell if a sum cannot be continued for want of its base."""
    return own.is_exact and own.elements is None


def _fitting(history: History, layer: ExpertLayer) -> History:
    """Return a history without the base of its last sum if that was sharded in another way than the layer is."""
    *others, last = history
    part = Part.of(layer.down_proj)
    fits = all(len(elements) == len(part.rows(expert)) for expert, elements in (last.elements or {}).items())
    return history if fits else (*others, replace(last, elements=None))


def _edited_layers(
    trainer: L.Trainer, pl_module: L.LightningModule, others: Container[str] = ()
) -> dict[str, ExpertLayer]:
    """Return the frozen layers that the trainer's callbacks edit, and ``others`` that are frozen, by parameter."""
    editors = [editing.editor for editing in callbacks_of(trainer, EditState)]
    edited = {index for editor in editors for index in editor.layers}
    may_be_any = any(editor.finds_layers for editor in editors)  # the state that tells the place is not restored yet
    return {
        name: layer
        for name, layer in layers_by_parameter(pl_module).items()
        if (may_be_any or layer.index in edited or name in others) and not layer.down_proj.requires_grad
    }
