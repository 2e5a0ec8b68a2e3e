"""The callback that reports on edits: on the console, in files, and to loggers."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.table import Table
from typing_extensions import override

from lit_moeedit.callbacks.attempts import attempt
from lit_moeedit.callbacks.averages import final_weights
from lit_moeedit.callbacks.belonging import StateOfWeights
from lit_moeedit.callbacks.conflicts import contradicting_texts
from lit_moeedit.callbacks.history import History
from lit_moeedit.callbacks.just_edited import JustEdited
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.limits import end_of
from lit_moeedit.callbacks.listener import EditEvent, EditListener, RetentionEvent
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.report_page import FILES, describe_model, log_tables, make_report, write_page
from lit_moeedit.callbacks.resources import check_parallelism
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.callbacks.run_folder import RunFile
from lit_moeedit.callbacks.summary import (
    COSTS,
    MOMENTS,
    EditTotals,
    make_table,
    mean_metrics,
    mean_of,
    read_totals,
    show,
    summarize_routing,
    without_nan,
)
from lit_moeedit.callbacks.validation import validating, validation_batches
from lit_moeedit.checkpoint_fields import check_fields
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import perplexity
from lit_moeedit.editing.outcomes import measure
from lit_moeedit.editing.phases import EVALUATION, Meter
from lit_moeedit.edits import Autopsy
from lit_moeedit.models.experts import find_model
from lit_moeedit.reports import ConsoleReport, MissingAutopsy, Model, Report
from lit_moeedit.reports.report import State
from lit_moeedit.sharding.ranks import Ranks

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
    state_names = ("_edits", "_final", "_history", "_perplexity", "_failed", "_seconds")

    def __init__(
        self, filename: str = "summary.json", console: bool = True, max_rows: int = 200, autopsy: bool = False
    ) -> None:
        super().__init__(filename=filename)
        self.filename, self.console, self.max_rows = filename, console, max_rows
        self.autopsy, self._just_edited = autopsy, JustEdited()
        self._autopsy: Autopsy | MissingAutopsy | None = None
        # of this process alone
        self._started = time.perf_counter()
        # epoch and step of a checkpoint that was loaded, after which nothing is left to train
        self._end: tuple[int, int] | None = None
        self._file, self._pages = RunFile(filename), {name: RunFile(name) for name in FILES}
        self._begun, self._model = datetime.now(UTC), Model()
        self._warned: set[str] = set()
        self._shown: list[Table | ConsoleReport | str] = []

    @override
    def begin_state(self) -> None:
        # plain values, because they have to survive a resume: sums over edits, metrics at the end of training by the
        # label of the editing callback, and what was measured of each fact
        self._edits: list[EditTotals] = []
        self._final: dict[str, dict[str, float]] = {}
        self._history = History()
        self._perplexity: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        self._seconds = 0.0  # of fits before this one, which it resumes

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            check_parallelism(trainer, pl_module, "EditReport")
        # before any callback's on_validation_start or on_test_start, one of which may edit
        self._started = time.perf_counter()
        self._end, self._warned, self._shown = None, set(), []
        if stage == TrainerFn.FITTING:
            # what follows a fit in the same process adds to its report
            self._final, self._file = {}, RunFile(self.filename)
            self._just_edited, self._autopsy = JustEdited(), None
            self._pages, self._begun = {name: RunFile(name) for name in FILES}, datetime.now(UTC)
            self._perplexity.pop("after_training", None)
        for file in (self._file, *self._pages.values()):
            file.locate(trainer)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._started = time.perf_counter()
        if self._end is not None:
            self._measure_without_training(trainer, pl_module, self._end)

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self._model = describe_model(pl_module)
        self._measure_perplexity(trainer, pl_module, "before", again=False)

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        result = event.result
        meter = Meter(pl_module.device)
        with meter(EVALUATION):
            self._measure_perplexity(trainer, pl_module, "after")
        seconds = {**event.seconds, **result.seconds}
        seconds[EVALUATION] = seconds.get(EVALUATION, 0.0) + meter.seconds()[EVALUATION]
        metrics = event.before.metrics, event.after.metrics
        self._totals(event.name).add(len(result.facts), result.kept, *metrics, seconds, event.memory)
        self._history = self._history.with_edit(event)
        if self.autopsy and result.kept and trainer.state.fn == TrainerFn.FITTING:
            with self._attempt("autopsy"):
                self._just_edited.keep(trainer, pl_module)
        self._write_page(trainer, "running")
        self._log_tables(trainer)

    @override
    def on_retention(self, trainer: L.Trainer, pl_module: L.LightningModule, event: RetentionEvent) -> None:
        self._model = describe_model(pl_module)
        self._history = self._history.with_retention(event)
        if trainer.state.fn == TrainerFn.FITTING:
            self._write_page(trainer, "running")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._history.edits:
            self._write_page(trainer, "stopped")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._edits:
            return
        self._model = describe_model(pl_module)  # after the strategy's teardown no weight may be used
        with final_weights(trainer, pl_module):
            self._measure_end(trainer, pl_module)

    def _measure_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure_perplexity(trainer, pl_module, "after_training")
        editings = callbacks_of(trainer, KnowledgeEditing)
        for editing in editings:
            if editing.edited_facts:
                with self._attempt("after_training" if len(editings) == 1 else f"after_training of {editing.label}"):
                    self._measure_facts(trainer, pl_module, editing)
        if self.autopsy:
            with self._attempt("autopsy"):
                self._autopsy = self._just_edited.examine(trainer, pl_module)

    def _measure_facts(self, trainer: L.Trainer, pl_module: L.LightningModule, editing: KnowledgeEditing) -> None:
        facts, undone = editing.applied_facts, editing.undone_facts
        settings: Any = {"token_budget": editing.editor.token_budget}
        model, step = find_model(pl_module), trainer.global_step if self._end is None else self._end[1]
        if facts:
            evaluation, baseline = editing.evaluate(pl_module), editing.neighbours_before
            self._final[editing.label] = evaluation.metrics
            found = measure(model, editing.tokenizer, facts, baseline, evaluation=evaluation, **settings)
            contradictions = contradicting_texts(trainer, facts)
            self._history = self._history.with_end(editing.name, facts, found, step, contradictions)
        if undone:
            found = measure(model, editing.tokenizer, undone, **settings)
            self._history = self._history.with_end(editing.name, undone, found, step, {})

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # after the strategy's teardown: no weight may be used any more. All checkpoints have been written, so a full
        # disk costs the summary only.
        self._finish(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer, pl_module)

    on_test_end = on_fit_end

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._show(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        measured = {
            "totals": [totals.state() for totals in self._edits],
            "final": self._final,
            "history": self._history.state(),
            "perplexity": self._perplexity,
            "seconds": self._seconds + time.perf_counter() - self._started,
        }
        return {**measured, "failed": self._failed} if self._failed else measured

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where = "the state of EditReport in the checkpoint"
        edits = read_totals(where, state_dict)
        numbers, texts = {str: (int, float)}, {str: str}
        shapes: dict[str, Any] = {
            "history": dict,
            "perplexity": numbers,
            "failed": texts,
            "final": {str: numbers},
        }
        # before there were totals there were neither seconds nor metrics at the end of training
        check_fields(where, state_dict, ("failed", "final", "seconds", "history"), **shapes, seconds=(int, float))
        # that of an earlier version has no history
        history = History.of_state(where, state_dict.get("history") or {})
        self._edits = edits
        self._history = history
        self._perplexity = dict(state_dict["perplexity"])
        self._failed, self._final = dict(state_dict.get("failed") or {}), dict(state_dict.get("final") or {})
        self._seconds, self._started = state_dict.get("seconds") or 0.0, time.perf_counter()

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

        With several edits, ``before`` and ``after`` are means over the edits weighted by their numbers of facts,
        ``after_training`` is such a mean over the editing callbacks, seconds are sums, ``memory`` has the highest peak
        of each phase in bytes (nothing on a CPU), and ``routing`` is that of the
        last edit, measured by the first monitor. If measurements failed, ``failed`` has their names and messages.

        ``place`` has the edited ``layers`` and ``token``, and whether they were ``found`` or given.

        ``survival`` has the points of the survival curves (see :class:`~lit_moeedit.reports.SurvivalPoint`), and
        ``survivors`` what was left when training ended (see :class:`~lit_moeedit.reports.Survivors`), by the name of
        the editing callback.

        With several editing callbacks, ``editors`` has ``edits``, ``solver``, ``place``, ``before``, ``after``,
        ``after_training`` and ``renewals`` of each, by its name (its state key, if it has none); with several monitors,
        ``routing["monitors"]`` has ``similarity``, ``kl`` and ``per_layer`` of the others. After an autopsy,
        ``autopsy`` has its result.
        """
        editings, monitors = callbacks_of(trainer, KnowledgeEditing), callbacks_of(trainer, RoutingMonitor)
        routing = summarize_routing(monitors[0].last_edit if monitors else {})
        edited = (index for editing in editings for index in editing.editor.layers)
        routing["first_edited_layer"] = min(edited, default=None)
        if len(monitors) > 1:
            routing["monitors"] = {monitor.label: summarize_routing(monitor.last_edit) for monitor in monitors[1:]}
        seconds = {name: sum(edits.seconds.get(name, 0.0) for edits in self._edits) for name in (*COSTS, "edit")}
        memory = {name: max((edits.memory.get(name, 0) for edits in self._edits), default=0) for name in COSTS}
        summary = {
            **self._summarize(editings, self._edits),
            "routing": routing,
            "perplexity": {moment: self._perplexity.get(moment) for moment in MOMENTS},
            "seconds": {"fit": self._seconds + time.perf_counter() - self._started, **seconds},
            "memory": {name: peak for name, peak in memory.items() if peak},
            "renewals": sum(editing.renewals for editing in editings),
            "survival": [asdict(point) for editing in editings for point in editing.survival.points],
            "survivors": {e.name or "": asdict(e.survivors) for e in editings if e.survivors is not None},
        }
        if len(editings) > 1:
            summary["editors"] = {
                editing.label: {
                    **self._summarize([editing], [edits for edits in self._edits if edits.name == editing.name]),
                    "renewals": editing.renewals,
                }
                for editing in editings
            }
        if self._autopsy is not None:
            summary["autopsy"] = self._autopsy.to_dict()
        return summary | ({"failed": dict(self._failed)} if self._failed else {})

    def _summarize(self, editings: Sequence[KnowledgeEditing], edits: Sequence[EditTotals]) -> dict[str, Any]:
        final = {e.label: (len(e.applied_facts), self._final.get(e.label)) for e in editings if e.applied_facts}
        measured = [(facts, metrics) for facts, metrics in final.values() if metrics is not None]
        # a measurement that failed cannot be left out of a mean
        is_whole = len(measured) == len(final) > 0
        return {
            "edits": sum(totals.facts for totals in edits),
            "solver": ", ".join(dict.fromkeys(editing.editor.name for editing in editings)) or None,
            "place": editings[0].place if len(editings) == 1 else None,
            "before": mean_of(totals.before for totals in edits),
            "after": mean_of(totals.after for totals in edits),
            "after_training": mean_metrics(measured) if is_whole else None,
        }

    def _totals(self, name: str | None) -> EditTotals:
        """Return the sums over the edits of the callback of this name."""
        found = next((totals for totals in self._edits if totals.name == name), None)
        if found is None:
            found = EditTotals(name)
            self._edits.append(found)
        return found

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Make a measurement on all ranks or on none; a failure is recorded under ``name`` and costs nothing else."""

        def fail(error: BaseException) -> None:
            self._failed[name] = text = f"{type(error).__name__}: {error}"
            # what cannot be measured before an edit cannot be measured after it: once is enough
            level = logging.DEBUG if text in self._warned else logging.WARNING
            self._warned.add(text)
            log.log(level, "EditReport could not measure %s: %s", name, text)
            log.debug("", exc_info=error)

        self._failed.pop(name, None)
        with attempt(fail):
            yield

    def _report(self, trainer: L.Trainer, state: State) -> Report:
        """Make the report of the run as it is now."""
        editings, monitors = callbacks_of(trainer, KnowledgeEditing), callbacks_of(trainer, RoutingMonitor)
        routing = monitors[0].last_edit if monitors else {}
        return make_report(state, self._begun, self._history, self.summary(trainer), editings, routing, self._model)

    @rank_zero_only
    def _write_page(self, trainer: L.Trainer, state: State) -> None:
        try:
            write_page(self._report(trainer, state), self._pages)
        except OSError as error:  # a full disk, which is no reason to lose a run
            log.warning("EditReport could not write %s: %s", " and ".join(FILES), error)

    @rank_zero_only
    def _log_tables(self, trainer: L.Trainer) -> None:
        log_tables(trainer, self._history.rows, self.max_rows)

    @rank_zero_only
    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._edits:
            log.warning("no facts were edited in this run, so there is nothing to report")
            return
        summary = without_nan(self.summary(trainer))
        facts = ConsoleReport(self._report(trainer, "finished"))
        self._shown = [*([facts] if self._history.rows else []), make_table(summary)]
        try:
            path = self._file.write(json.dumps(summary, indent=2) + "\n")
        except BaseException:
            self._show(trainer)  # even if there is no room for the file
            raise
        self._write_page(trainer, "finished")
        if self._autopsy is not None:
            self._shown.append(f"Autopsy: {self._autopsy.verdict}.")
        self._shown.append(f"Summary: {path}\nReport: {path.with_name('report.html')}")
        self._log_tables(trainer)
        self._log_figures(trainer)

    @rank_zero_only
    def _show(self, trainer: L.Trainer) -> None:
        """Print what is to be shown, once."""
        shown, self._shown = self._shown, []
        if shown and self.console:
            show(trainer, shown)

    def _log_figures(self, trainer: L.Trainer) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        for monitor in callbacks_of(trainer, RoutingMonitor) if loggers else ():
            figure = monitor.figure()
            for logger in loggers if figure is not None else ():
                logger.log_image(monitor.metrics_prefix, [figure])

    def _measure_without_training(self, trainer: L.Trainer, pl_module: L.LightningModule, end: tuple[int, int]) -> None:
        """Measure the end of a training that ended before the process did, if its checkpoint does not have it."""
        for editing in callbacks_of(trainer, KnowledgeEditing):
            editing.on_fit_start(trainer, pl_module)  # this callback's turn may be before it
        for editing in callbacks_of(trainer, KnowledgeEditing):
            editing.end_curve(trainer, pl_module, end)
        if not self._final:
            self.on_train_end(trainer, pl_module)

    def _measure_perplexity(
        self, trainer: L.Trainer, pl_module: L.LightningModule, moment: str, again: bool = True
    ) -> None:
        name = f"perplexity {moment}"
        # a failed "before" cannot be made up for after an edit
        if not again and (moment in self._perplexity or name in self._failed):
            return
        self._perplexity.pop(moment, None)
        with self._attempt(name), validating(trainer) as loaders:
            if loaders is not None:
                batches = validation_batches(trainer, pl_module, loaders)
                self._perplexity[moment] = perplexity(find_model(pl_module), batches, Ranks.current())
