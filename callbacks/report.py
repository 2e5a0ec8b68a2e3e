"""The callback that reports on edits: a table on the console, ``summary.json``, and tables for loggers."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from typing_extensions import override

from lit_moeedit.atomic_files import atomic_file, check_writable
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.named import NamedCallback, callbacks_of
from lit_moeedit.callbacks.resources import on_first_rank
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.callbacks.summary import MOMENTS, make_table, mean_metrics, summarize_routing, without_nan
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import PHASES, answers, perplexity
from lit_moeedit.models.experts import find_model
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class EditReport(NamedCallback, EditListener):
    """Report on the edits of every :class:`~lit_moeedit.callbacks.KnowledgeEditing` in the same trainer.

    When training ends it evaluates the edits once more. At the end of ``fit``, ``validate`` or ``test`` it prints a
    table and writes ``summary.json`` into the trainer's ``default_root_dir``. With a ``WandbLogger`` it logs a table of
    the edits (prompt, old and new target, answers before, after and at the end) and, for each ``RoutingMonitor``, if
    there is matplotlib, a plot of the routing similarity by layer.

    A measurement that fails, on whichever rank, is logged and named in the summary's ``failed``; the run goes on, and
    what else was measured is in the summary. A run that ends with an exception writes no summary.

    Callbacks that change weights when training ends, such as Lightning's ``WeightAveraging``, belong before this one in
    the trainer's list, so that it measures what they leave.

    Args:
        filename: name of the summary; it appears complete or not at all.
        console: whether to print the table.
        max_rows: the table of edits has at most this many rows.

    Raises:
        ValueError: if ``filename`` is not the plain name of a file.
        OSError: when the run starts, if the summary could not be written.
    """

    def __init__(self, filename: str = "summary.json", console: bool = True, max_rows: int = 200) -> None:
        super().__init__(filename=filename)
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename must be the name of a file without a folder, got {filename!r}")
        self.filename, self.console, self.max_rows = filename, console, max_rows
        # plain values, because they have to survive a resume: the result of each edit, and answers by moment and fact
        self._edits: list[dict[str, Any]] = []
        self._answers: dict[str, dict[str, str]] = {}
        self._perplexity: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        # of this run alone
        self._final: dict[str, dict[str, float]] = {}  # by the label of the editing callback
        self._started = time.perf_counter()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # before any callback's on_validation_start or on_test_start, one of which may edit
        self._started = time.perf_counter()
        self._final = {}
        path = self._path(trainer)
        on_first_rank(trainer, lambda: check_writable(path))

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    @override
    def on_edit_start(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact]) -> None:
        self._measure_perplexity(trainer, pl_module, "before", again=False)
        self._ask(trainer, pl_module, facts, "before")

    @override
    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self._edits.append(
            {
                "name": event.name,
                "facts": len(event.result.facts),
                "kept": event.result.kept,
                "before": event.before.metrics,
                "after": event.after.metrics,
                "seconds": event.result.seconds,
            }
        )
        self._measure_perplexity(trainer, pl_module, "after")
        self._ask(trainer, pl_module, event.result.facts, "after")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._edits:
            return
        self._measure_perplexity(trainer, pl_module, "after_training")
        self._ask(trainer, pl_module, _edited_facts(trainer), "at the end")
        editings = callbacks_of(trainer, KnowledgeEditing)
        for editing in editings:
            if editing.applied_facts:
                with self._attempt("after_training" if len(editings) == 1 else f"after_training of {editing.label}"):
                    self._final[editing.label] = editing.evaluate(pl_module).metrics

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
    def state_dict(self) -> dict[str, Any]:
        measured = {"edits": self._edits, "answers": self._answers, "perplexity": self._perplexity}
        return {**measured, "failed": self._failed} if self._failed else measured

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where, numbers, texts = "the state of EditReport in the checkpoint", {str: (int, float)}, {str: str}
        shapes: dict[str, Any] = {"edits": [dict], "answers": {str: texts}, "perplexity": numbers, "failed": texts}
        check_fields(where, state_dict, ("failed",), **shapes)
        shapes = {"name": str, "facts": int, "kept": bool, "before": numbers, "after": numbers, "seconds": numbers}
        for index, edit in enumerate(state_dict["edits"]):
            inner = f"{where}, edits[{index}]"
            check_fields(inner, edit, ("name",), **shapes)
            if not edit["seconds"].keys() >= {*PHASES, "edit"}:
                raise CheckpointError(f"{inner} should hold the seconds of {', '.join((*PHASES, 'edit'))}")
        self._edits, self._answers = list(state_dict["edits"]), dict(state_dict["answers"])
        self._perplexity = dict(state_dict["perplexity"])
        self._failed = dict(state_dict.get("failed") or {})

    def summary(self, trainer: L.Trainer) -> dict[str, Any]:
        """Compute the content of ``summary.json`` from the measurements; ``None`` for those that were not made.

        With several edits, ``before`` and ``after`` are means over the edits weighted by their numbers of facts,
        ``after_training`` is such a mean over the editing callbacks, seconds are sums, and ``routing`` is that of the
        last edit, measured by the first monitor. If measurements failed, ``failed`` has their names and messages.

        With several editing callbacks, ``editors`` has ``edits``, ``solver``, ``before``, ``after``,
        ``after_training`` and ``renewals`` of each, by its name (its state key, if it has none); with several monitors,
        ``routing["monitors"]`` has ``similarity``, ``kl`` and ``per_layer`` of the others.
        """
        editings, monitors = callbacks_of(trainer, KnowledgeEditing), callbacks_of(trainer, RoutingMonitor)
        routing = summarize_routing(monitors[0].last_edit if monitors else {})
        routing["first_edited_layer"] = min((min(editing.editor.layers) for editing in editings), default=None)
        if len(monitors) > 1:
            routing["monitors"] = {monitor.label: summarize_routing(monitor.last_edit) for monitor in monitors[1:]}
        seconds = {name: sum(edit["seconds"][name] for edit in self._edits) for name in (*PHASES, "edit")}
        summary = {
            **self._summarize(editings, self._edits),
            "routing": routing,
            "perplexity": {moment: self._perplexity.get(moment) for moment in MOMENTS},
            "seconds": {"fit": time.perf_counter() - self._started, **seconds},
            "renewals": sum(editing.renewals for editing in editings),
        }
        if len(editings) > 1:
            summary["editors"] = {
                editing.label: {
                    **self._summarize([editing], [edit for edit in self._edits if edit.get("name") == editing.name]),
                    "renewals": editing.renewals,
                }
                for editing in editings
            }
        return summary | ({"failed": dict(self._failed)} if self._failed else {})

    def _summarize(self, editings: Sequence[KnowledgeEditing], edits: Sequence[dict[str, Any]]) -> dict[str, Any]:
        final = {e.label: (len(e.applied_facts), self._final.get(e.label)) for e in editings if e.applied_facts}
        measured = [(facts, metrics) for facts, metrics in final.values() if metrics is not None]
        # a measurement that failed cannot be left out of a mean
        is_whole = len(measured) == len(final) > 0
        return {
            "edits": sum(edit["facts"] for edit in edits if edit["kept"]),
            "solver": ", ".join(dict.fromkeys(editing.editor.name for editing in editings)) or None,
            "before": mean_metrics([(edit["facts"], edit["before"]) for edit in edits]),
            "after": mean_metrics([(edit["facts"], edit["after"]) for edit in edits]),
            "after_training": mean_metrics(measured) if is_whole else None,
        }

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.filename

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Make a measurement on all ranks or on none; a failure is recorded under ``name`` and costs nothing else."""
        ranks, is_done = Ranks.current(), False
        self._failed.pop(name, None)
        try:
            with ranks.together():
                yield
            is_done = True
        except BaseException as error:
            # once done, it is an interrupt of this rank alone: the others have gone on. An interrupt is no failed
            # measurement, whichever rank it came to
            if is_done or ranks.any(not isinstance(error, Exception)):
                raise
            self._failed[name] = f"{type(error).__name__}: {error}"
            log.warning("EditReport could not measure %s: %s", name, self._failed[name])
            log.debug("", exc_info=error)

    @rank_zero_only
    def _finish(self, trainer: L.Trainer) -> None:
        if not self._edits:
            log.warning("no facts were edited in this run, so there is nothing to report")
            return
        summary, path = without_nan(self.summary(trainer)), self._path(trainer)
        console = Console(quiet=not self.console, emoji=False)
        # shown even if there is no room for the file
        console.print(make_table(summary))
        with atomic_file(path) as beside:
            beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        console.print(f"Summary: {path}", markup=False, soft_wrap=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_to_wandb(logger, trainer)

    def _log_to_wandb(self, logger: WandbLogger, trainer: L.Trainer) -> None:
        moments = ("before", "after", "at the end")
        rows = [
            [fact.prompt, fact.target_true, fact.target_new]
            + [self._answers.get(moment, {}).get(fact.key) for moment in moments]
            for fact in _edited_facts(trainer)[: self.max_rows]
        ]
        columns = ["prompt", "old", "new", "answer before", "answer after", "answer at the end"]
        logger.log_table("edits", columns=columns, data=rows)
        for monitor in callbacks_of(trainer, RoutingMonitor):
            figure = monitor.figure()
            if figure is not None:
                logger.log_image(monitor.metrics_prefix, [figure])

    def _measure_perplexity(
        self, trainer: L.Trainer, pl_module: L.LightningModule, moment: str, again: bool = True
    ) -> None:
        loaders, name = trainer.val_dataloaders, f"perplexity {moment}"
        # a failed "before" cannot be made up for after an edit
        if loaders is None or not (again or (moment not in self._perplexity and name not in self._failed)):
            return
        self._perplexity.pop(moment, None)
        with self._attempt(name):
            batches = itertools.chain(*loaders) if isinstance(loaders, list | tuple) else loaders
            self._perplexity[moment] = perplexity(find_model(pl_module), batches, Ranks.current())

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact], moment: str) -> None:
        editings = callbacks_of(trainer, KnowledgeEditing)
        if not editings or not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            return
        known, shown = self._answers.get(moment, {}), facts[: self.max_rows]
        if moment == "before":  # any edit: another callback may have edited the same fact
            shown = [fact for fact in shown if fact.key not in known]
        with self._attempt(f"answers {moment}"):
            found = answers(find_model(pl_module), editings[0].tokenizer, [fact.prompt for fact in shown])
            self._answers[moment] = {**known, **dict(zip((fact.key for fact in shown), found, strict=True))}


def _edited_facts(trainer: L.Trainer) -> list[Fact]:
    """The edited facts of all callbacks, each once."""
    facts = (fact for editing in callbacks_of(trainer, KnowledgeEditing) for fact in editing.edited_facts)
    return list({fact.key: fact for fact in facts}.values())
