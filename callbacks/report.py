"""The callback that reports on edits: on the console, in files, and to loggers."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from typing_extensions import override

from lit_moeedit.callbacks.averages import final_weights
from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.limits import end_of
from lit_moeedit.callbacks.listener import EditEvent, EditListener, RetentionEvent
from lit_moeedit.callbacks.measurements import Measurements
from lit_moeedit.callbacks.measuring import Measuring
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.outputs import RunFiles, log_routing, log_tables, show
from lit_moeedit.callbacks.resources import check_parallelism
from lit_moeedit.callbacks.run_report import describe_model, make_report
from lit_moeedit.callbacks.summary import summarize, without_nan
from lit_moeedit.callbacks.summary_table import make_table
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.phases import EVALUATION, Meter
from lit_moeedit.reports import ConsoleReport, Model, Report
from lit_moeedit.reports.report import State

log = logging.getLogger(__name__)


class EditReport(StateOfWeights, EditListener):
    """Report on the edits of every :class:`~lit_moeedit.callbacks.KnowledgeEditing` in the same trainer.

    It measures every fact before and after its edit and when training ends: what the model generates, the probability
    of the new and of the old target, and how many paraphrases and neighbours hold. For a fact that is not generated it
    gives a reason. ``edits.jsonl`` (a line for each fact, see :class:`~lit_moeedit.reports.FactRow`) and
    ``report.html`` (a page that needs nothing but itself) are written at each edit, so that a run that is killed has
    them, too, and at the end. At the end of ``fit``, ``validate`` or ``test`` it writes ``summary.json`` and prints the
    facts and a table of the metrics.

    All files are written into the run's own folder, beside its metrics (``trainer.log_dir``), and ``default_root_dir``
    has those of the latest run: a hard link to each, or a copy. Without a logger the two are one folder, and an earlier
    run's file is renamed to ``summary-v1.json``, ``-v2`` and so on.

    W&B gets the facts as a table ``edits``, TensorBoard as a text ``edits``, and MLflow as ``edits.md``, at each edit
    and at the end. W&B gets for each ``RoutingMonitor``, if there is matplotlib, a plot of the routing similarity by
    layer, too.

    A measurement that fails, on whichever rank, is logged and named in the summary's ``failed``; the run goes on, and
    what else was measured is in the summary. So it is for the perplexity if the validation batches are not mappings
    with ``input_ids``, ``attention_mask`` and ``labels``. A run that ends with an exception writes no summary, but the
    other files.

    With Lightning's ``WeightAveraging`` or ``StochasticWeightAveraging`` it measures the average that training ends
    with. Other callbacks that change weights when training ends belong before this one in the trainer's list.

    Args:
        filename: name of the summary; it appears complete or not at all.
        console: whether to print at the end.
        max_rows: maximum number of rows of the table for loggers.
        autopsy: whether to find which part of the model carried the loss of edits, when training ends (see
            :func:`lit_moeedit.edits.autopsy`). Weights that train are kept in main memory from the last edit on, up to
            the last edited layer. A run that is resumed after its edits has none to compare with; it names the command
            that examines checkpoints instead. The result is ``autopsy`` in the summary, and a part of the page.

    Raises:
        ValueError: if ``filename`` is not the plain name of a file.
        OSError: when the run starts, if the summary could not be written.
        MisconfigurationException: when the run starts, if the model is sharded in a way that is not supported, see
            :class:`~lit_moeedit.callbacks.KnowledgeEditing`.
    """

    wants_answers = True
    state_names = ("measured",)

    def __init__(
        self, filename: str = "summary.json", console: bool = True, max_rows: int = 200, autopsy: bool = False
    ) -> None:
        super().__init__(filename=filename)
        self.filename, self.console, self.max_rows, self.autopsy = filename, console, max_rows, autopsy
        # of this process alone
        self._measuring, self._files = Measuring(autopsy), RunFiles(filename)
        self._started, self._begun = time.perf_counter(), datetime.now(UTC)
        # epoch and step of a checkpoint that was loaded, after which nothing is left to train
        self._end: tuple[int, int] | None = None
        self._model = Model()
        self._shown: list[Table | ConsoleReport | str] = []

    @override
    def begin_state(self) -> None:
        self.measured = Measurements()
        """The measurements of the edits in the model's weights."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            check_parallelism(trainer, pl_module, "EditReport")
        # before any callback's on_validation_start or on_test_start, one of which may edit
        self._started = time.perf_counter()
        self._end, self._shown = None, []
        if stage == TrainerFn.FITTING:
            # what follows a fit in the same process adds to its report
            self._measuring, self._files = Measuring(self.autopsy), RunFiles(self.filename)
            self._begun = datetime.now(UTC)
            self.measured.final, self.measured.final_by_fact = {}, {}
            self.measured.perplexity.pop("after_training", None)
        self._measuring.warned.clear()
        self._files.locate(trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        check_parallelism(trainer, pl_module, "EditReport")
        self._started = time.perf_counter()
        if self._end is not None:
            self._measure_without_training(trainer, pl_module, self._end)

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self._model = describe_model(pl_module)
        # a failed "before" cannot be made up for after an edit
        self._measuring.perplexity(self.measured, trainer, pl_module, "before", again=False)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        meter = Meter(pl_module.device)
        with meter(EVALUATION):
            self._measuring.perplexity(self.measured, trainer, pl_module, "after")
        self.measured.add_edit(event, meter.seconds()[EVALUATION])
        if event.result.kept and trainer.state.fn == TrainerFn.FITTING:
            self._measuring.keep_weights(self.measured, trainer, pl_module)
        self._write_report(trainer, "running")
        self._log_tables(trainer)

    @override
    def on_retention(self, trainer: L.Trainer, pl_module: L.LightningModule, event: RetentionEvent) -> None:
        self._model = describe_model(pl_module)
        self.measured.history = self.measured.history.with_retention(event)
        if trainer.state.fn == TrainerFn.FITTING:
            self._write_report(trainer, "running")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.measured.history.edits:
            self._write_report(trainer, "stopped")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.measured.totals:
            return
        self._model = describe_model(pl_module)  # after the strategy's teardown no weight may be used
        with final_weights(trainer, pl_module):
            step = trainer.global_step if self._end is None else self._end[1]
            self._measuring.end(self.measured, trainer, pl_module, step)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # after the strategy's teardown: no weight may be used any more. All checkpoints have been written, so a full
        # disk costs the summary only.
        self._finish(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer)

    on_test_end = on_fit_end

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._show(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self.measured.state(), "seconds": self._seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.measured = Measurements.of_state("the state of EditReport in the checkpoint", state_dict)
        self._started = time.perf_counter()

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._end = end_of(trainer, checkpoint)
        if self._end is not None and trainer.strategy.restore_checkpoint_after_setup:
            # the weights are restored, no hook is left before the end, and Lightning loads these states next
            for callback in (*callbacks_of(trainer, KnowledgeEditing), self):
                if callback is not self:
                    callback.on_load_checkpoint(trainer, pl_module, checkpoint)
                state = checkpoint["callbacks"].get(callback.state_key)
                if state:
                    callback.load_state_dict(copy.deepcopy(state))
            self._measure_without_training(trainer, pl_module, self._end)
            for editing in callbacks_of(trainer, KnowledgeEditing):
                if state := checkpoint["callbacks"].get(editing.state_key):
                    checkpoint["callbacks"][editing.state_key] = {**state, "survival": editing.survival.state()}
            if checkpoint["callbacks"].get(self.state_key):
                checkpoint["callbacks"][self.state_key] = self.state_dict()

    def summary(self, trainer: L.Trainer) -> dict[str, Any]:
        """Compute the content of ``summary.json`` from the measurements; ``None`` for those that were not made.

        With several edits, ``before`` and ``after`` are those of all their facts together, and ``after_training`` is
        that of the facts of all editing callbacks; what is no mean over facts, such as ``score``, is averaged with
        weights of the numbers of facts. Seconds are sums, ``memory`` has the highest peak of each phase in bytes
        (nothing on a CPU), and ``routing`` is that of the last edit, measured by the first monitor. If measurements
        failed, ``failed`` has their names and messages.

        ``place`` has the edited ``layers`` and ``token``, and whether they were ``found`` or given.

        ``survival`` has the points of the survival curves (see :class:`~lit_moeedit.reports.SurvivalPoint`), and
        ``survivors`` what was left when training ended (see :class:`~lit_moeedit.reports.Survivors`), by the name of
        the editing callback. ``replay`` has what was replayed (see :class:`~lit_moeedit.reports.Replayed`), by the name
        of the :class:`~lit_moeedit.callbacks.EditReplay`.

        With several editing callbacks, ``editors`` has ``edits``, ``solver``, ``place``, ``before``, ``after``,
        ``after_training`` and ``renewals`` of each, by its name (its state key, if it has none); with several monitors,
        ``routing["monitors"]`` has ``similarity``, ``kl`` and ``per_layer`` of the others. After an autopsy,
        ``autopsy`` has its result.
        """
        summary = summarize(self.measured, trainer, self._seconds)
        if self._measuring.autopsy is not None:
            summary["autopsy"] = self._measuring.autopsy.to_dict()
        return summary | ({"failed": dict(self.measured.failed)} if self.measured.failed else {})

    @property
    def _seconds(self) -> float:
        """Duration of the fit so far, with the fits that it resumes."""
        return self.measured.seconds + time.perf_counter() - self._started

    def _report(self, trainer: L.Trainer, state: State) -> Report:
        """Make the report of the run as it is now."""
        return make_report(state, self._begun, self.measured.history, self.summary(trainer), trainer, self._model)

    @rank_zero_only
    def _write_report(self, trainer: L.Trainer, state: State) -> None:
        self._files.write_report(self._report(trainer, state))

    @rank_zero_only
    def _log_tables(self, trainer: L.Trainer) -> None:
        log_tables(trainer, self.measured.history.rows, self.max_rows)

    @rank_zero_only
    def _finish(self, trainer: L.Trainer) -> None:
        if not self.measured.totals:
            log.warning("no facts were edited in this run, so there is nothing to report")
            return
        summary, report = without_nan(self.summary(trainer)), self._report(trainer, "finished")
        self._shown = [*([ConsoleReport(report)] if report.rows else []), make_table(summary)]
        try:
            path = self._files.write_summary(summary)
        except BaseException:
            self._show(trainer)  # even if there is no room for the file
            raise
        self._files.write_report(report)
        if self._measuring.autopsy is not None:
            self._shown.append(f"Autopsy: {self._measuring.autopsy.verdict}.")
        self._shown.append(f"Summary: {path}\nReport: {path.with_name('report.html')}")
        self._log_tables(trainer)
        log_routing(trainer)

    @rank_zero_only
    def _show(self, trainer: L.Trainer) -> None:
        """Print what is to be shown, once."""
        shown, self._shown = self._shown, []
        if shown and self.console:
            show(trainer, shown)

    def _measure_without_training(self, trainer: L.Trainer, pl_module: L.LightningModule, end: tuple[int, int]) -> None:
        """Measure the end of a training that ended before the process did, if its checkpoint does not have it."""
        for editing in callbacks_of(trainer, KnowledgeEditing):
            editing.on_fit_start(trainer, pl_module)  # this callback's turn may be before it
        for editing in callbacks_of(trainer, KnowledgeEditing):
            editing.end_curve(trainer, pl_module, end)
        if not self.measured.final:
            self.on_train_end(trainer, pl_module)
