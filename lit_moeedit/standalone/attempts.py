"""Attempts at an edit: at places that are found, with target vectors that are optimised for longer if needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditMethod, Editor, EditResult, Evaluation, TargetOptimizer, evaluate
from lit_moeedit.editing.further import Further, FurtherMeasures
from lit_moeedit.editing.locating import PERSISTENT, Trial, locate
from lit_moeedit.editing.outcomes import Reason, measure, reasons
from lit_moeedit.editing.phases import EVALUATION, LOCATE, OTHER, PHASES, Meter, Progress
from lit_moeedit.editing.routing_trace import RoutingTrace, compare_traces, trace_routing
from lit_moeedit.edits.states import histories_in, keep_in
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.reports import Cost, Guard, Measured, Place, Routing
from lit_moeedit.reports.meanings import MEANINGS
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

MAX_PROBES = 64
"""Maximum number of texts on which routing is compared."""


@dataclass(frozen=True)
class Found:
    """The edit that was kept or, if none was, the best one that was undone.

    Attributes:
        editor: the method that made it.
        result: its result.
        before: evaluation before it.
        after: evaluation with the edit in the weights.
        measured_before: measurements of each fact before it.
        measured_after: measurements with the edit in the weights.
        reasons: by fact key, why a fact is not generated.
        routing: routing with the edit compared with before.
        costs: cost by phase.
        guards: limits, and what was measured.
        places: places that were tried.
        warnings: what the user should know.
    """

    editor: EditMethod
    result: EditResult
    before: Evaluation
    after: Evaluation
    measured_before: Sequence[Measured]
    measured_after: Sequence[Measured]
    reasons: Mapping[str, Reason]
    routing: Routing | None = None
    costs: tuple[Cost, ...] = ()
    guards: tuple[Guard, ...] = ()
    places: tuple[Place, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def edit_with_attempts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    texts: Sequence[str],
    editor: EditMethod | None = None,
    *,
    layers: Sequence[int] | Literal["auto"] = "auto",
    token: EditToken | Literal["auto"] = "auto",
    min_efficacy: float = 0.5,
    undo: bool = False,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    measures: FurtherMeasures | None = None,
) -> Found:
    """Edit facts, with stronger settings if the first ones leave some that are not generated.

    Each attempt is measured in the weights. It is kept if all facts are generated. Otherwise it is undone and, after
    the last attempt, the best one is made once more, if it suffices.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: the facts, checked.
        texts: text on which the experts must keep their behaviour.
        editor: the method, which is the only attempt; ``None`` for an :class:`~lit_moeedit.editing.Editor`.
        layers: layers of that editor; ``auto`` finds them.
        token: its edit token; ``auto`` finds it.
        min_efficacy: smallest share of edited prompts that the model continues with the new answer.
        undo: whether to undo the edit in any case, after it has been measured.
        ranks: the processes that edit together. Each calls this.
        progress: called with a phase's name, the number of steps done, and their total number.
        measures: further measures around each attempt.
    """
    ranks, meter = ranks or Ranks.current(), Meter(model.device)
    with ranks.together(), meter(EVALUATION):
        before = evaluate(model, tokenizer, facts, ranks=ranks)
        measured_before = measure(model, tokenizer, facts, ranks=ranks, evaluation=before)
        probes = list(texts)[:MAX_PROBES]
        trace = trace_routing(model, tokenizer, probes, ranks=ranks) if probes else None
        further = _further(measures, model, facts, before, measured_before, None, ranks)
        before = further.add_to(before)
    editors, places = _editors(model, tokenizer, facts, texts, editor, layers, token, ranks, progress, meter)
    made: list[_Attempt] = []
    for own in editors:
        attempt = _Attempt(own, before)
        is_last = own is editors[-1]

        def guard(attempt: _Attempt = attempt, is_last: bool = is_last) -> bool:
            with ranks.together(), meter(EVALUATION):
                attempt.after = evaluate(model, tokenizer, facts, before.neighbours_exact, ranks=ranks)
                attempt.measured = measure(
                    model, tokenizer, facts, before.neighbours_exact, ranks, evaluation=attempt.after
                )
                attempt.trace = trace_routing(model, tokenizer, probes, ranks=ranks) if probes else None
                attempt.further = _further(measures, model, facts, attempt.after, attempt.measured, further, ranks)
                attempt.after = attempt.further.add_to(attempt.after)
            is_best = all(attempt.score >= other.score for other in made)
            is_enough = attempt.efficacy >= min_efficacy
            return not undo and is_enough and (attempt.efficacy == 1 or (is_last and is_best))

        attempt.make(model, tokenizer, facts, texts, guard, ranks, progress)
        made.append(attempt)
        if attempt.result.kept or attempt.efficacy == 1:
            break
        if not is_last:
            log.info(
                "%d of %d facts are generated; undone, and made again with target vectors optimised for longer",
                int(attempt.after.edits_exact.sum()),
                len(facts),
            )
    best = max(reversed(made), key=lambda attempt: (attempt.result.kept, attempt.score))
    if not best.result.kept and not undo and best.efficacy >= min_efficacy:
        best.make(model, tokenizer, facts, texts, None, ranks, progress)
    if measures is not None:
        found = measures.of_result(best.result, further, best.further)
        best.after = replace(best.after, further={**best.after.further, **found})
    generated = {fact.key: measured.generated for fact, measured in zip(facts, best.measured, strict=True)}
    return Found(
        best.editor,
        best.result,
        before,
        best.after,
        measured_before,
        best.measured,
        reasons(best.result, best.after, best.editor, generated),
        _routing(trace, best.trace),
        _costs(meter, made, best),
        (
            Guard(
                "min_efficacy",
                min_efficacy,
                best.efficacy,
                best.efficacy < min_efficacy,
                1,
                MEANINGS["efficacy_accuracy"],
            ),
        ),
        tuple(places),
    )


class _Attempt:
    """One attempt, and what was measured while it was in the weights."""

    after: Evaluation
    result: EditResult
    measured: list[Measured]
    trace: RoutingTrace | None = None
    further = Further()

    def __init__(self, editor: EditMethod, before: Evaluation) -> None:
        self.editor, self._before = editor, before
        self.meters: list[Meter] = []
        """One for each time that the edit was made; all but the last one were undone."""

    @property
    def efficacy(self) -> float:
        """Share of the facts that are generated."""
        return float(self.after.edits_exact.float().mean())

    @property
    def score(self) -> tuple[float, ...]:
        """The values by which attempts are compared: efficacy first, then what the edit reaches and keeps besides."""
        others = (
            self.after.metrics.get(name, float("nan")) for name in ("generalization_accuracy", "specificity_retained")
        )
        return self.efficacy, sum(value for value in others if value == value)

    def make(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        texts: Sequence[str],
        guard: Any,
        ranks: Ranks,
        progress: Progress | None,
    ) -> None:
        """Make the edit; the guard measures and decides."""
        histories, meter = histories_in(model), Meter(model.device)
        settings: Any = {"ranks": ranks, "progress": progress, "histories": histories, "phase": meter}
        self.result = self.editor.edit(model, tokenizer, facts, texts, guard=guard, **settings)
        keep_in(model, histories)
        self.meters.append(meter)


def _further(
    measures: FurtherMeasures | None,
    model: PreTrainedModel,
    facts: Sequence[Fact],
    evaluation: Evaluation,
    measured: Sequence[Measured],
    before: Further | None,
    ranks: Ranks,
) -> Further:
    """Make further measures; the layers that will be edited may not be known yet, so weights are read in all."""
    if measures is None:
        return Further()
    generated = [one.generated for one in measured]
    return measures.measure(model, facts, evaluation, list(expert_layers(model)), before, generated, ranks)


def _editors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    texts: Sequence[str],
    editor: EditMethod | None,
    layers: Sequence[int] | Literal["auto"],
    token: EditToken | Literal["auto"],
    ranks: Ranks,
    progress: Progress | None,
    meter: Meter,
) -> tuple[list[EditMethod], list[Place]]:
    """Return the methods to try, in their order, and the places tried to find layers and token."""
    if editor is not None:
        return [editor], []
    first = Editor(layers, token=token)
    persistent = copy(first)
    persistent.targets = TargetOptimizer(**PERSISTENT)
    if first.is_resolved:
        return [first, persistent], []
    # what it is not given, it tries with stronger settings itself
    given = None if (layers, token) == ("auto", "auto") else persistent
    with meter(LOCATE):
        location = locate(model, tokenizer, facts, texts, editor=given, ranks=ranks, progress=progress)
    log.info("%s", location)
    places = [
        Place(trial.place.layers, str(trial.place.token), _scores(trial), chosen=trial is location.best)
        for trial in location.trials
    ]
    editors = [persistent] if given is not None or location.targets else [first, persistent]
    return [own.at(location.place) for own in editors], places


def _costs(meter: Meter, made: Sequence[_Attempt], best: _Attempt) -> tuple[Cost, ...]:
    """Return the cost of each phase: around the edit, of the edit that is reported, of others, and of the rest.

    The seconds add up to those since ``meter`` was made.
    """
    *earlier, last = best.meters
    undone = [*earlier, *(other for attempt in made if attempt is not best for other in attempt.meters)]
    around = meter.seconds()
    costs = [Cost(phase, around.get(phase, 0.0), meter.memory.get(phase)) for phase in (LOCATE, EVALUATION)]
    costs += [Cost(phase, last.seconds()[phase], last.memory.get(phase)) for phase in PHASES if phase in last.seconds()]
    peaks = [peak for other in undone for peak in other.memory.values()]
    phases = (seconds for other in undone for phase, seconds in other.seconds().items() if phase != OTHER)
    costs.append(Cost("undone attempts", sum(phases), max(peaks, default=None)))
    rest = around[OTHER] - sum(cost.seconds for cost in costs[2:])
    return tuple(cost for cost in (*costs, Cost(OTHER, max(0.0, rest))) if cost.seconds > 0)


def _scores(trial: Trial) -> dict[str, float]:
    """Return what a trial has measured, by name."""
    return {
        name: value
        for name, value in trial.to_dict().items()
        if isinstance(value, float | int) and not isinstance(value, bool)
    }


def _routing(before: RoutingTrace | None, after: RoutingTrace | None) -> Routing | None:
    """Compare the routing of the probe texts."""
    if before is None or after is None:
        return None
    found = compare_traces(before, after)
    similarity, kl = ({i: found[f"{kind}/layer_{i}"] for i in after.experts} for kind in ("similarity", "kl"))
    return Routing(found["similarity/mean"], found["kl/mean"], similarity, kl)
