"""The averages of the weights that Lightning's callbacks keep, and the weights that are validated and kept.

:class:`~lightning.pytorch.callbacks.WeightAveraging` trains one set of weights, and validates and keeps another, their
average. So an edit is made in the average, and the weights in training get the same change. Both are written in one
transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.models.experts import UnsupportedModelError, find_model
from lit_moeedit.sharding.lending import lent

Copies = list[Mapping[str, Tensor]]
"""Copies of a model's weights, each by the names of the model's parameters."""


def averaging_callbacks(trainer: L.Trainer) -> list[WeightAveraging | StochasticWeightAveraging]:
    """Return Lightning's callbacks that average the weights, in the order in which their hooks run."""
    kinds = (WeightAveraging, StochasticWeightAveraging)
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


def refuse_averages(trainer: L.Trainer) -> None:
    """Check that averages of the weights can be edited.

    Raises:
        MisconfigurationException: if there are averages of weights that the strategy shards or keeps apart from their
            master weights, or several averages that would take each other's place.
    """
    found = [type(callback).__name__ for callback in averaging_callbacks(trainer)]
    strategy = trainer.strategy
    is_plain = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if found and not is_plain:
        raise MisconfigurationException(
            f"KnowledgeEditing: {found[0]} averages weights under {type(strategy).__name__}, whose checkpoints and "
            "master weights do not get the average; use one device or DDP, or remove one of the two callbacks"
        )
    if len(found) > 1:
        raise MisconfigurationException(
            f"KnowledgeEditing: {' and '.join(found)} would put their averages in each other's place; keep one of them"
        )


def averages_of(trainer: L.Trainer) -> Copies:
    """Return the averages that Lightning's callbacks hold now, by the names of the model's parameters.

    Raises:
        MisconfigurationException: if one was made before the model was.
    """
    averages: Copies = []
    for averaging in averaging_callbacks(trainer):
        if averaging._average_model is None:
            continue
        try:
            averages.append(dict(find_model(averaging._average_model).named_parameters()))
        except UnsupportedModelError as error:
            raise MisconfigurationException(
                f"KnowledgeEditing: {type(averaging).__name__} copied the module before configure_model() made its "
                "model, and will average nothing; call configure_model() before the run"
            ) from error
    return averages


# -- the weights that are validated and kept --------------------------------------------------------------------------


@contextmanager
def edited_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[Copies]:
    """Put the weights that are validated next into the module, to edit and measure them.

    Use it where Lightning has swapped nothing: before and after training batches, and before a validation. An average
    that has not begun is not used, because it begins as a copy of the weights in training.

    Yields:
        The copies that get the same edit: averages, and the weights in training.
    """
    averages, average = averages_of(trainer), _swapped(trainer)
    if average is not None and int(average.n_averaged):
        with _lent(pl_module, average.module) as training:
            yield [*averages, training]
    else:
        yield averages


@contextmanager
def validated_weights(trainer: L.Trainer, pl_module: L.LightningModule, callback: L.Callback) -> Iterator[None]:
    """Put the weights that were validated into the module, in a callback's ``on_validation_epoch_end``.

    Lightning has put those in training back by then if its callback comes before ours in the trainer's list.
    """
    order: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    average = _swapped(trainer)
    is_back = any(isinstance(other, WeightAveraging) for other in order[: order.index(callback)])
    if average is not None and is_back:
        with _lent(pl_module, average.module):
            yield
    else:
        yield


@contextmanager
def final_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """Put the weights that training ends with into the module, in ``on_train_end``, whichever callback comes first."""
    average = _swapped(trainer)
    stochastic = next(iter(callbacks_of(trainer, StochasticWeightAveraging)), None)
    if average is not None:
        with _lent(pl_module, average.module):
            yield
    elif stochastic is not None and stochastic._average_model is not None and _is_kept(stochastic, trainer):
        with _lent(pl_module, stochastic._average_model, buffers=False):
            yield
    else:
        yield


def _swapped(trainer: L.Trainer) -> AveragedModel | None:
    """Return the average that Lightning puts into the module for every validation and when training ends."""
    found = callbacks_of(trainer, WeightAveraging)
    is_used = trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING)
    return found[0]._average_model if found and is_used else None


def _is_kept(averaging: StochasticWeightAveraging, trainer: L.Trainer) -> bool:
    """Tell if the average becomes the weights in ``on_train_end``.

    It does not if training ended early, nor if it did before an additional epoch for the statistics of batch norms.
    """
    if averaging._max_epochs == -1:
        return True
    return trainer.current_epoch - 1 == averaging.swa_end


@contextmanager
def _lent(pl_module: L.LightningModule, average: nn.Module, buffers: bool = True) -> Iterator[Mapping[str, Tensor]]:
    """Put an average into the module; yields the module's own values by the names of the model's parameters."""
    own, values = ([*module.parameters(), *(module.buffers() if buffers else ())] for module in (pl_module, average))
    with lent(own, values) as kept:
        place = {id(tensor): value for tensor, value in zip(own, kept, strict=True)}
        yield {name: place[id(weight)] for name, weight in find_model(pl_module).named_parameters()}
