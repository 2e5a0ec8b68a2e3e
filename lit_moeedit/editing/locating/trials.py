"""Trials of places: target vectors, then an edit of some facts that is measured and undone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from lit_moeedit.data.encoding import EditToken, pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.editor import Editor
from lit_moeedit.editing.evaluation import Evaluation, evaluate
from lit_moeedit.editing.phases import Progress
from lit_moeedit.editing.place import Place
from lit_moeedit.editing.targets import TargetOptimizer, Targets
from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.experts import check_editable
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.sharding.history import History
from lit_moeedit.sharding.ranks import RankFloatingPointError, Ranks

log = logging.getLogger(__name__)

FINALISTS = 3
"""Maximum number of places in the last trial."""
MAX_EXCESS = 1.0
"""Maximum excess of a place's target loss over the lowest one, in nats, with which it is edited for a trial."""
CLOSE = 0.1
"""Difference of scores that a few facts cannot tell: with 8 facts of 4 paraphrases, one standard error of a share."""
TIE = 0.02
"""Difference of scores below which the smaller change of the weights decides: with 8 facts scores are no finer."""


@dataclass(frozen=True)
class Trial:
    """The measurements of a place.

    Those after an edit are ``None`` if its target vectors are not good enough, or its weights would not be finite.

    Attributes:
        place: layers and token.
        nll: mean negative log-likelihood of the new targets with their target vectors, in nats per token.
        efficacy: share of the facts whose new target is generated.
        generalization: share of their paraphrases, which are not edited; NaN if there are none.
        specificity_retained: of the neighbours answered right before, the share still answered right; NaN if none was.
        change: relative change of the weights, over all layers: the root of the sum of squares of
            ``‖ΔW‖_F / ‖W‖_F``.
        facts: number of facts of the trial.
    """

    place: Place
    nll: float
    efficacy: float | None = None
    generalization: float | None = None
    specificity_retained: float | None = None
    change: float | None = None
    facts: int = 0

    @property
    def score(self) -> float | None:
        """Harmonic mean of those of the three shares that are known; ``None`` without an edit."""
        if self.efficacy is None:
            return None
        shares = (self.efficacy, self.generalization, self.specificity_retained)
        known = [share for share in shares if share is not None and not math.isnan(share)]
        return len(known) / sum(1 / share for share in known) if all(known) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as JSON types; NaN becomes ``None``."""
        values = {name: value for name, value in asdict(self).items() if name != "place"} | {"score": self.score}
        known = {name: None if value is None or math.isnan(value) else value for name, value in values.items()}
        return {**self.place.to_dict(), **known}


def choose(trials: Sequence[Trial], facts: int) -> int:
    """Return the index of the best trial.

    Efficacy comes first: only places within one fact of the highest count. Of these, the highest score (harmonic mean
    of efficacy, generalization and specificity retained) decides and, of scores that differ by less than ``TIE``, the
    smallest change. If no place was edited, it is the one with the lowest target loss.

    Args:
        trials: the trials.
        facts: number of facts of a trial.

    Example:
        >>> place = Place((1,), "last")
        >>> choose([Trial(place, 0.1, 1.0, 0.5, 1.0, 0.2), Trial(place, 0.1, 1.0, 0.9, 1.0, 0.3)], facts=8)
        1
    """
    edited = {number: trial for number, trial in enumerate(trials) if trial.score is not None}
    if not edited:
        return min(range(len(trials)), key=lambda number: trials[number].nll)
    highest = max(trial.efficacy or 0.0 for trial in edited.values())
    near = {n: trial for n, trial in edited.items() if (trial.efficacy or 0.0) >= highest - 1 / facts - 1e-6}
    best = max(trial.score or 0.0 for trial in near.values())
    tied = (n for n, trial in near.items() if (trial.score or 0.0) > best - TIE)
    return min(tied, key=lambda n: (near[n].change or 0.0, n))


def finalists(trials: Sequence[Trial], best: int, facts: int) -> list[int]:
    """Return the indices of the places that a trial of a few facts cannot tell from the best one, ascending.

    Args:
        trials: the trials.
        best: index of the best one.
        facts: number of facts of a trial.

    Example:
        >>> place = Place((1,), "last")
        >>> finalists([Trial(place, 0.1, 1.0, 0.9, 1.0), Trial(place, 0.1, 1.0, 0.8, 1.0), Trial(place, 7.0)], 0, 8)
        [0, 1]
    """
    highest = max(trial.efficacy or 0.0 for trial in trials)
    least = (trials[best].score or 0.0) - CLOSE
    near = [
        number
        for number, trial in enumerate(trials)
        if trial.score is not None
        and trial.score >= least
        and (trial.efficacy or 0.0) >= highest - 1 / facts - 1e-6
        and number != best
    ]
    return sorted([best, *sorted(near, key=lambda number: -(trials[number].score or 0.0))[: FINALISTS - 1]])


class _KnownTargets(TargetOptimizer):
    """Target vectors that have been found already."""

    def __init__(self, settings: TargetOptimizer, targets: Targets) -> None:
        self.__dict__ |= settings.__dict__
        self._targets = targets

    @override
    def optimize(self, *args: Any, **kwargs: Any) -> Targets:
        return self._targets


class Trials:
    """Trials of places on the same facts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: the facts of the trials, checked.
        preservation: text on which the experts must keep their behaviour.
        editor: the settings.
        max_tokens: maximum number of tokens of preservation text.
        optimizers: as for :meth:`~lit_moeedit.editing.EditMethod.edit`; likewise the others.
        histories: the changes of frozen experts so far.
        ranks: the processes that share the work.
        progress: called with ``"trial"`` and the phase, the number of steps done, and their total number.

    Attributes:
        seconds: duration of the target vectors, of second moments, and of the edits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        preservation: Sequence[str],
        editor: Editor,
        max_tokens: int,
        optimizers: Sequence[Any],
        histories: dict[str, History] | None,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self.model, self.tokenizer, self.facts, self.preservation = model, tokenizer, facts, preservation
        self.editor, self.max_tokens, self.ranks, self.progress = copy(editor), max_tokens, ranks, progress
        self.editor.tune = False  # a trial has the settings of its place
        self.optimizers, self.histories = optimizers, histories
        self.seconds = dict.fromkeys(("targets", "statistics", "edits"), 0.0)
        self._failed: list[tuple[Place, Exception]] = []
        self._further: dict[tuple[int, EditToken], list[list[str]]] = {}

    def run(self, places: Sequence[Place], highest: float = math.inf) -> list[Trial]:
        """Try all places; the weights are bit-identical afterwards.

        Args:
            places: the places.
            highest: no place is edited if the lowest target loss is above this.
        """
        with held(Undo()) as undo:
            _quiet(undo)
            with self._timed("targets"):
                targets = self.targets(places)
            nll = [float(found.nll.mean()) for found in targets]
            lowest = min(nll)
            chosen = [n for n, loss in enumerate(nll) if loss <= lowest + MAX_EXCESS and _are_usable(targets[n])]
            trials = [Trial(place, loss, facts=len(self.facts)) for place, loss in zip(places, nll, strict=True)]
            if not chosen or lowest > highest:
                return trials
            with self._timed("statistics"):
                moments = self._moments({index for n in chosen for index in places[n].layers})
            with self._timed("edits"):
                before = evaluate(self.model, self.tokenizer, self.facts, ranks=self.ranks)
                done: dict[tuple[Any, ...], Trial] = {}
                for number, n in enumerate(chosen, 1):
                    place, further = places[n], self.further_prompts(places[n])
                    # such as with more further prompts where there are none
                    case = replace(place, phrasings=None), *map(tuple, further)
                    if case not in done:
                        done[case] = self._edit(trials[n], targets[n], further, moments, before)
                    trials[n] = replace(done[case], place=place)
                    self.progress("trial edits", number, len(chosen))
        for place, error in self._failed:  # not in the block, which is quiet
            log.warning("a trial of %s made no edit: %s", place, error)
        self._failed.clear()
        return trials

    def targets(self, places: Sequence[Place]) -> list[Targets]:
        """Find the target vectors at each place, once for those with the same token, highest layer, and stop."""
        tops = [Place(place.layers[-1:], place.token, stop=place.stop) for place in places]
        known: dict[Place, Targets] = {}
        for top in dict.fromkeys(tops):
            editor, facts = self.editor.at(top), dict(enumerate(self.facts))
            encoded = editor.encode(self.tokenizer, self.facts)
            encoded = editor.with_neutral_prompts(self.model, self.tokenizer, facts, encoded, ranks=self.ranks)
            known[top] = editor.targets.with_stop(top.stop).optimize(
                self.model,
                check_editable(self.model, top.layers)[0],
                encoded.rows,
                pad_id(self.tokenizer),
                ranks=self.ranks,
            )
            self.progress("trial targets", len(known), len(set(tops)))
        return [known[top] for top in tops]

    def further_prompts(self, place: Place) -> list[list[str]]:
        """Find the further prompts of each fact at a place, once for each number and token."""
        editor, token = self.editor.at(place), cast("EditToken", place.token)
        if (case := (editor.phrasings, token)) not in self._further:
            self._further[case] = [[] for _ in self.facts]
            if editor.phrasings:
                self._further[case] = editor.find_phrasings(self.model, self.tokenizer, self.facts, ranks=self.ranks)
        return self._further[case]

    def _moments(self, layers: set[int]) -> Mapping[int, SecondMoments] | None:
        """Compute the second moments of all layers in one pass over the text."""
        editor = self.editor.at(Place(tuple(sorted(layers)), "last"))
        if not editor.needs_moments:
            return None
        editor.max_tokens = min(self.max_tokens, editor.max_tokens or self.max_tokens)
        return editor.moments(
            self.model,
            self.tokenizer,
            check_editable(self.model, editor.layers),
            self.preservation,
            ranks=self.ranks,
            progress=lambda done, total: self.progress("trial statistics", done, total),
        )

    def _edit(
        self,
        trial: Trial,
        targets: Targets,
        further: list[list[str]],
        moments: Mapping[int, SecondMoments] | None,
        before: Evaluation,
    ) -> Trial:
        """Edit, measure and undo; a trial whose edit is not finite in the weights' dtype is one without an edit."""
        editor, after = self.editor.at(trial.place), list[Evaluation]()
        editor.targets = _KnownTargets(editor.targets, targets)
        editor.neutral_prompts = 0  # nothing is searched for
        vars(editor).update(find_phrasings=lambda *args: further)

        def guard() -> bool:
            after.append(evaluate(self.model, self.tokenizer, self.facts, before.neighbours_exact, ranks=self.ranks))
            return False

        try:
            result = editor.edit(
                self.model,
                self.tokenizer,
                self.facts,
                moments=None if moments is None else {index: moments[index] for index in trial.place.layers},
                guard=guard,
                optimizers=self.optimizers,
                ranks=self.ranks,
                histories=self.histories,
            )
        except (FloatingPointError, RankFloatingPointError) as error:  # it is undone, on all ranks
            self._failed.append((trial.place, error))
            self.ranks.forget()
            return trial
        found = after[0].metrics
        return replace(
            trial,
            efficacy=found["efficacy_accuracy"],
            generalization=found["generalization_accuracy"],
            specificity_retained=found["specificity_retained"],
            change=math.hypot(*result.relative_change.values()),
        )

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[step] += perf_counter() - start


def _are_usable(targets: Targets) -> bool:
    """Tell if an edit accepts target vectors: all are finite, and a gradient reaches those of each edit."""
    return targets.are_finite and not bool(targets.stuck.any())


def _quiet(undo: Undo) -> None:
    """Leave out what the editing modules log of edits that are undone."""
    logger = logging.getLogger("lit_moeedit.editing")
    undo.by(logger.setLevel, logger.level)
    logger.setLevel(logging.ERROR)
