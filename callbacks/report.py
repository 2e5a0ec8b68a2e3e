"""The callback that says what the edits did: a table on the console, ``summary.json``, and tables for loggers."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from lit_moeedit.atomic_files import appearing, check_writable
from lit_moeedit.callbacks import states
from lit_moeedit.callbacks.knowledge_editing import KnowledgeEditing
from lit_moeedit.callbacks.listener import EditEvent, EditListener
from lit_moeedit.callbacks.resources import callbacks_of, on_first_rank, ranks_of
from lit_moeedit.callbacks.routing import RoutingMonitor
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import PHASES, answers, perplexity
from lit_moeedit.models.experts import find_model
from lit_moeedit.pretrained import printable
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

C = TypeVar("C", bound=L.Callback)
_SHOWN = (
    "efficacy",
    "efficacy_accuracy",
    "generalization",
    "generalization_accuracy",
    "specificity",
    "specificity_accuracy",
    "specificity_retained",
    "score",
    "utility",
    "truth_recalled",
)


class EditReport(EditListener):
    """Reports on the edits of a :class:`~lit_moeedit.callbacks.KnowledgeEditing` in the same trainer.

    When training ends it evaluates the edits once more. At the end of ``fit``, ``validate`` or ``test`` it prints a
    table and writes ``summary.json`` into the trainer's ``default_root_dir``. With a ``WandbLogger`` it logs a table of
    the edits (prompt, old and new target, answers before, after and at the end) and, if there is a ``RoutingMonitor``
    and matplotlib, a plot of the routing similarity by layer.

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
        super().__init__()
        if not filename or Path(filename).name != filename:
            raise ValueError(f"filename must be the name of a file without a folder, got {filename!r}")
        self.filename, self.console, self.max_rows = filename, console, max_rows
        # plain values, because they have to survive a resume: what each edit did, what was said when
        self._edits: list[dict[str, Any]] = []
        self._answers: dict[str, dict[str, str]] = {}
        self._perplexity: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        # of this run alone
        self._final: dict[str, float] | None = None
        self._started = time.perf_counter()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # before any callback's on_validation_start or on_test_start, one of which may edit
        self._started = time.perf_counter()
        self._final = None
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
        editing = _only(trainer, KnowledgeEditing)
        if editing is None:
            return
        self._ask(trainer, pl_module, editing.edited_facts, "at the end")

        def evaluate(_: Ranks, editing: KnowledgeEditing = editing) -> None:
            self._final = editing.evaluate(pl_module).metrics

        if editing.applied_facts:
            self._attempt(trainer, "after_training", evaluate)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # behind the strategy's teardown: no weight may be used any more. All checkpoints have been written, so a full
        # disk costs the summary only.
        self._finish(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._finish(trainer)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        measured = {"edits": self._edits, "answers": self._answers, "perplexity": self._perplexity}
        return {**measured, "failed": self._failed} if self._failed else measured

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = states.report(state_dict, (*PHASES, "edit"))
        self._edits, self._answers = list(state["edits"]), dict(state["answers"])
        self._perplexity = dict(state["perplexity"])
        self._failed = dict(state.get("failed") or {})

    def summary(self, trainer: L.Trainer) -> dict[str, Any]:
        """The content of ``summary.json``, from what was measured before; what was not is ``None``.

        With several edits, ``before`` and ``after`` are means over the edits weighted by their numbers of facts,
        seconds are sums, and ``routing`` is that of the last edit. If measurements failed, ``failed`` has their names
        and messages.
        """
        editing = _only(trainer, KnowledgeEditing)
        monitor = _only(trainer, RoutingMonitor)
        routing: dict[str, Any] = {"similarity": None, "kl": None, "per_layer": {}, "first_edited_layer": None}
        if monitor is not None and monitor.last_edit:
            layers = {k.rpartition("_")[2]: v for k, v in monitor.last_edit.items() if k.startswith("similarity/layer")}
            routing |= {
                "similarity": monitor.last_edit["similarity/mean"],
                "kl": monitor.last_edit["kl/mean"],
                "per_layer": layers,
            }
        if editing is not None:
            routing["first_edited_layer"] = min(editing.editor.layers)
        phases = {name: sum(edit["seconds"][name] for edit in self._edits) for name in (*PHASES, "edit")}
        return {
            "edits": sum(edit["facts"] for edit in self._edits if edit["kept"]),
            "solver": type(editing.editor.solver).__name__ if editing else None,
            "before": self._mean("before"),
            "after": self._mean("after"),
            "after_training": self._final,
            "routing": routing,
            "perplexity": {moment: self._perplexity.get(moment) for moment in ("before", "after", "after_training")},
            "seconds": {"fit": time.perf_counter() - self._started, **phases},
            "renewals": editing.renewals if editing else 0,
            **({"failed": dict(self._failed)} if self._failed else {}),
        }

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.filename

    def _mean(self, moment: str) -> dict[str, float]:
        means: dict[str, float] = {}
        for name in self._edits[0][moment] if self._edits else ():
            # an edit for which nothing was counted has no say
            counted = [edit for edit in self._edits if not math.isnan(edit[moment][name])]
            total = sum(edit["facts"] for edit in counted)
            weighted = sum(edit["facts"] * edit[moment][name] for edit in counted)
            means[name] = weighted / total if total else math.nan
        return means

    def _attempt(self, trainer: L.Trainer, name: str, measure: Callable[[Ranks], object]) -> None:
        """Measure on all ranks or on none; a failure is noted under ``name`` and costs nothing else."""
        ranks, error, is_done = ranks_of(trainer), None, False
        self._failed.pop(name, None)
        try:
            with ranks.together():
                measure(ranks)
            is_done = True
        except BaseException as caught:
            if is_done:  # an interrupt of this rank alone: the others have gone on
                raise
            error = caught
        if error is None:
            return
        # an interrupt is no failed measurement, whichever rank it came to
        if ranks.any(not isinstance(error, Exception)):
            raise error
        self._failed[name] = f"{type(error).__name__}: {error}"
        log.warning("EditReport could not measure %s: %s", name, self._failed[name])
        log.debug("", exc_info=error)

    def _finish(self, trainer: L.Trainer) -> None:
        if not self._edits:
            log.warning("no facts were edited in this run, so there is nothing to report")
            return
        editing = _only(trainer, KnowledgeEditing)
        self._write(trainer, self.summary(trainer), editing.edited_facts if editing is not None else [])

    @rank_zero_only
    def _write(self, trainer: L.Trainer, summary: dict[str, Any], facts: Sequence[Fact]) -> None:
        summary = _without_nan(summary)
        path = self._path(trainer)
        console = Console(quiet=not self.console, emoji=False)
        # shown even if there is no room for the file
        console.print(self._table(summary))
        with appearing(path) as beside:
            beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        console.print(f"Summary: {path}", markup=False, soft_wrap=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._log_to_wandb(logger, trainer, facts)

    def _table(self, summary: dict[str, Any]) -> Table:
        seconds = summary["seconds"]
        renewed = f", renewed {summary['renewals']} times" if summary["renewals"] else ""
        table = Table(
            title=f"{summary['edits']} edits with {summary['solver']} in {seconds['edit']:.1f} s{renewed}",
            caption="routing similarity by layer: "
            + ", ".join(f"{layer}: {_number(value)}" for layer, value in summary["routing"]["per_layer"].items()),
        )
        moments = ("before", "after", "after_training")
        for column in ("", "before", "after the edit", "at the end"):
            table.add_column(column, justify="left" if not column else "right")
        for name in (*_SHOWN, *sorted(n for n in summary["after"] if n.startswith("specificity_retained_"))):
            # a facts file may call a group of neighbours anything
            shown = escape(printable(name.replace("_", " ")))
            table.add_row(shown, *(_number((summary[moment] or {}).get(name)) for moment in moments))
        table.add_row("perplexity", *(_number(summary["perplexity"][moment]) for moment in moments))
        return table

    def _log_to_wandb(self, logger: WandbLogger, trainer: L.Trainer, facts: Sequence[Fact]) -> None:
        moments = ("before", "after", "at the end")
        rows = [
            [fact.prompt, fact.target_true, fact.target_new]
            + [self._answers.get(moment, {}).get(fact.key) for moment in moments]
            for fact in facts[: self.max_rows]
        ]
        columns = ["prompt", "old", "new", "answer before", "answer after", "answer at the end"]
        logger.log_table("edits", columns=columns, data=rows)
        monitor = _only(trainer, RoutingMonitor)
        if monitor is not None and monitor.last_edit:
            figure = monitor.figure()
            if figure is not None:
                logger.log_image("routing", [figure])

    def _measure_perplexity(
        self, trainer: L.Trainer, pl_module: L.LightningModule, moment: str, again: bool = True
    ) -> None:
        loaders, name = trainer.val_dataloaders, f"perplexity {moment}"
        # a failed "before" cannot be made up for after an edit
        if loaders is None or not (again or (moment not in self._perplexity and name not in self._failed)):
            return
        self._perplexity.pop(moment, None)

        def measure(ranks: Ranks) -> None:
            batches = itertools.chain(*loaders) if isinstance(loaders, list | tuple) else loaders
            self._perplexity[moment] = perplexity(find_model(pl_module), batches, ranks)

        self._attempt(trainer, name, measure)

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule, facts: Sequence[Fact], moment: str) -> None:
        editing = _only(trainer, KnowledgeEditing)
        if editing is None or not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            return
        shown = facts[: self.max_rows]

        def ask(_: Ranks) -> None:
            said = answers(find_model(pl_module), editing.tokenizer, [fact.prompt for fact in shown])
            self._answers.setdefault(moment, {}).update(zip((fact.key for fact in shown), said, strict=True))

        self._attempt(trainer, f"answers {moment}", ask)


def _only(trainer: L.Trainer, kind: type[C]) -> C | None:
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    """The same with ``None`` for every number that is not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
