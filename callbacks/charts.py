"""Metrics for loggers: a few charts at any number of layers, single values as a summary, and all of it in CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDIT_CHARTS = frozenset({"efficacy", "generalization", "specificity", "specificity_retained", "score"})
"""Metrics of edits that have a chart; the others are close to one of these."""


def log_curves(trainer: L.Trainer, pl_module: L.LightningModule, prefix: str, metrics: Mapping[str, float]) -> None:
    """Log metrics of a validation, which every rank has measured: all for callbacks and CSV files, charts of a few.

    In a fit, means over layers and :data:`EDIT_CHARTS` have charts, so that their number is the same at any number of
    layers. ``validate`` and ``test`` return what is logged, so all but single layers is.

    Args:
        trainer: the trainer.
        pl_module: its module, in the hook of a callback in which metrics may be logged.
        prefix: the beginning of the names, before ``/``.
        metrics: by names without the prefix.
    """
    fits = trainer.state.fn == TrainerFn.FITTING
    named: dict[str, Any] = {f"{prefix}/{name}": value for name, value in metrics.items()}
    is_chart = {f"{prefix}/{name}": _has_chart(name) if fits else "/layer_" not in name for name in metrics}
    charts = {name: value for name, value in named.items() if is_chart[name]}
    others = {name: value for name, value in named.items() if not is_chart[name]}
    sync = trainer.world_size > 1
    pl_module.log_dict(charts, sync_dist=sync)
    pl_module.log_dict(others, sync_dist=sync, logger=False)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and others:
            logger.log_metrics(others, step=trainer.global_step)


def log_now(trainer: L.Trainer, metrics: Mapping[str, float], step: int | None = None) -> None:
    """Log metrics that have a chart, with all loggers, at an optimizer step; by default at that of the trainer."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step if step is None else step)


def log_summary(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Log what belongs to one moment, and is no chart.

    A CSV file has all of it, W&B has summary values and TensorBoard a text, both without those of single layers. For
    other loggers there are the summary and the report.
    """
    overall = {name: value for name, value in metrics.items() if "/layer_" not in name}
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            logger.log_metrics(dict(metrics), step=trainer.global_step)
        elif isinstance(logger, WandbLogger):
            _to_summary(logger, overall)
        elif isinstance(logger, TensorBoardLogger):
            _to_text(logger, overall, trainer.global_step)


@rank_zero_only
def log_place(trainer: L.Trainer, prefix: str, place: Mapping[str, Any]) -> None:
    """Add the place that an editor has found to the run's configuration, as ``<prefix>_place/layers`` and ``/token``.

    The configuration that was logged at the start has ``auto`` there. The settings of an editor that was tuned follow,
    as ``/strength``, ``/phrasings`` and ``/stop``.
    """
    names = (name for name in ("layers", "token", "strength", "phrasings", "stop") if name in place)
    settings = {f"{prefix}_place/{name}": str(place[name]) for name in names}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # has its hyperparameters from the start
            _to_text(logger, settings, trainer.global_step)
        else:
            logger.log_hyperparams(settings)


@rank_zero_only
def log_figures(trainer: L.Trainer, figures: Mapping[str, Figure]) -> None:
    """Log figures by their names, with the loggers that show images."""
    for logger in trainer.loggers:
        for name, figure in figures.items():
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [figure])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, trainer.global_step)


def shows_figures(trainer: L.Trainer) -> bool:
    """Tell if a logger shows images."""
    return any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers)


def _has_chart(name: str) -> bool:
    return name in EDIT_CHARTS or name.endswith("/mean")


@rank_zero_only
def _to_summary(logger: WandbLogger, metrics: Mapping[str, float]) -> None:
    logger.experiment.summary.update(dict(metrics))


@rank_zero_only
def _to_text(logger: TensorBoardLogger, values: Mapping[str, float | str], step: int) -> None:
    """Write a table for each group of metrics."""
    groups: dict[str, list[Sequence[str]]] = {}
    for name, value in values.items():
        group, _, own = name.partition("/")
        groups.setdefault(group, []).append((own, value if isinstance(value, str) else f"{value:.4g}"))
    for group, rows in groups.items():
        table = "\n".join(f"| {own} | {value} |" for own, value in rows)
        logger.experiment.add_text(group, f"| metric | value |\n| --- | --- |\n{table}", step)
