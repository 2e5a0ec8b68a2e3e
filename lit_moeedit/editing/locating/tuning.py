"""The choice of an editor's settings by trials: strength, layers, further prompts, and stop of the targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.data.facts import Fact, validate_facts
from lit_moeedit.editing.editor import Editor
from lit_moeedit.editing.locating.location import Location
from lit_moeedit.editing.locating.tracing import spread
from lit_moeedit.editing.locating.trials import Trial, Trials
from lit_moeedit.editing.phases import Progress
from lit_moeedit.editing.place import Place, Tune
from lit_moeedit.sharding.history import History
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

TUNE_FACTS = 128
"""Default of the maximum number of facts of the trials."""
FEWEST = 8
"""Minimum number of facts with paraphrases and neighbours by which settings are chosen."""
TUNE_TOKENS = 131072
"""Maximum number of tokens of preservation text in the trials."""
TOLERANCE = 0.01
"""Share of the neighbours that the settings chosen may retain less than the given ones, with ``tune="neighbours"``."""
STRENGTHS = (1.0, 3.0, 0.1, 0.01, 1e-3, 1e-4)
"""Strengths that are tried, in units of the given one."""
STRENGTHS_ALONE = (1.0, 0.01, 1e-3, 1e-4)
"""Likewise with the target layer alone."""
FURTHER = tuple(product((8, 2), (1.0, 0.01), (0.0, 0.3)))
"""Numbers of further prompts that are tried, each with a strength, and with a ``stop`` of the search for target vectors
of at least this, in nats."""


@torch.inference_mode(False)
@torch.no_grad()
def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact | Mapping[str, Any]],
    preservation: Sequence[str] = (),
    *,
    editor: Editor,
    tune_facts: int = TUNE_FACTS,
    optimizers: Sequence[Any] = (),
    histories: dict[str, History] | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Location:
    """Choose strength of the preservation, layers, further prompts, and where the search for target vectors stops.

    Where a model has seen little, an edit says less of the paraphrases, and a weaker preservation or the target layer
    alone is better; where neighbours suffer, it is not. No constant suits both. So some of the facts are edited with
    each of the settings in turn, measured and undone, bit by bit. Those with the same ``stop`` share one search for
    target vectors. Of the settings that generate as many targets as the given ones, those with the highest score
    (harmonic mean of efficacy, generalization and neighbours retained) are chosen; the first of several, and the given
    ones are first. With ``tune="neighbours"`` of the editor it is the highest generalization, of those only that retain
    at most :data:`TOLERANCE` fewer of the neighbours than the given ones.

    What is chosen by paraphrases and neighbours has an advantage when it is measured by the same ones. Facts that are
    there to measure a method should not take part.

    Args:
        model: the model. Weights, modes and random states are the same afterwards.
        tokenizer: its tokenizer.
        facts: the facts to edit, or objects with the keys of a row of a facts file. Those without paraphrases or
            neighbours are edited, too: how strongly an edit must be made, and which further prompts there are, depends
            on their number.
        preservation: text on which the experts must keep their behaviour.
        editor: the given settings; layers and token are known.
        tune_facts: maximum number of facts that are edited, spread evenly over all.
        optimizers: as for :meth:`~lit_moeedit.editing.Editor.edit`.
        histories: likewise.
        ranks: the processes that share the work. Each calls this with the same arguments and gets the same settings.
        progress: called with the name of a step, the number of parts done, and their total number.

    Returns:
        The settings tried, as places, and the choice. With fewer than :data:`FEWEST` facts that have both paraphrases
        and neighbours the given settings are kept, and a warning says so.

    Raises:
        UnsupportedModelError: if the model cannot be edited.
        FactError: if a fact cannot be edited.
        ValueError: if ``tune_facts`` is too low, the editor has no strength, layers or token, or there is no
            preservation text.
        TooLittleMemoryError: if memory does not suffice for a single row.
        RankError: if another rank failed.
    """
    if tune_facts < FEWEST:
        raise ValueError(f"tune_facts must be at least {FEWEST}, got {tune_facts}")
    if not editor.strength:
        raise ValueError("the editor needs a preservation with a strength above 0 to be tuned, such as 'output'")
    if not editor.layers or editor.token == "auto":
        raise ValueError("the editor needs layers and a token to be tuned; locate finds them")
    ranks = ranks or Ranks.current()
    with ranks.together():
        checked = validate_facts(facts, tokenizer=tokenizer)
        chosen = [checked[number] for number in spread(len(checked), tune_facts)]
        telling = sum(bool(fact.paraphrases and fact.neighbours) for fact in chosen)
        places = candidates(editor)
        if telling < FEWEST:
            log.warning(
                "the editor is not tuned: of %d facts with paraphrases and neighbours nothing could be told (at least "
                "%d are needed)",
                telling,
                FEWEST,
            )
            return Location((Trial(places[0], math.nan),), 0, None, {})
        if not preservation:
            raise ValueError("the editor needs preservation text to be tuned; give some")
        report = progress or (lambda phase, done, total: None)
        trials = Trials(
            model, tokenizer, chosen, preservation, editor, TUNE_TOKENS, optimizers, histories, ranks, report
        )
        results = trials.run(places)
        if not any(map(_is_known, results)):
            log.warning(
                "the editor is not tuned: no neighbour is answered right before the edit, or no target vector is found"
            )
        # the ranks may have measured changes that differ in the last bit
        best = torch.tensor([choose_settings(results, editor.tune)])
        ranks.broadcast(best)
    return Location(tuple(results), int(best), None, trials.seconds)


def candidates(editor: Editor) -> list[Place]:
    """Return the settings to try, as places; the given ones are the first.

    Args:
        editor: the given settings.

    Example:
        >>> for place in candidates(Editor(layers=[3], token="last"))[4:]:
        ...     print(place)
        layer 3 at last with strength 0.0003, targets to 0.05 nats
        layer 3 at last with strength 3e-05, targets to 0.05 nats
        layer 3 at last with strength 0.3, targets to 0.05 nats, 8 further prompts
        layer 3 at last with strength 0.3, targets to 0.3 nats, 8 further prompts
        layer 3 at last with strength 0.003, targets to 0.05 nats, 8 further prompts
        layer 3 at last with strength 0.003, targets to 0.3 nats, 8 further prompts
        layer 3 at last with strength 0.3, targets to 0.05 nats, 2 further prompts
        layer 3 at last with strength 0.3, targets to 0.3 nats, 2 further prompts
        layer 3 at last with strength 0.003, targets to 0.05 nats, 2 further prompts
        layer 3 at last with strength 0.003, targets to 0.3 nats, 2 further prompts
    """
    layers, token, given = editor.layers, cast("EditToken", editor.token), editor.phrasings
    assert editor.strength is not None, "an editor without a strength cannot be tuned"
    rows = [(layers, factor, given, 0.0) for factor in STRENGTHS]
    rows += [(layers[-1:], factor, given, 0.0) for factor in STRENGTHS_ALONE]
    rows += [(layers, factor, number, stop) for number, factor, stop in FURTHER]
    places = [
        replace(
            editor.with_settings(Place(own, token)),
            strength=editor.strength * factor,
            phrasings=number,
            stop=max(stop, editor.targets.stop),
        )
        for own, factor, number, stop in rows
    ]
    return list(dict.fromkeys(places))


def choose_settings(trials: Sequence[Trial], tune: Tune = True) -> int:
    """Return the index of the best settings, see :func:`tune`; those of the first trial are the given ones.

    If these make no edit, because its weights would not be finite, the first ones that do take their place.

    Example:
        >>> place = Place((1,), "last")
        >>> given = Trial(place, 0.1, 1.0, 0.7, 0.99)
        >>> others = [Trial(place, 0.1, 1.0, 0.8, 0.99), Trial(place, 0.1, 1.0, 0.9, 0.95)]
        >>> choose_settings([given, *others]), choose_settings([given, *others], "neighbours")
        (2, 1)
    """
    # the weights may not hold what the given settings make of them
    first = next((number for number, trial in enumerate(trials) if trial.efficacy is not None), 0)
    if not _is_known(trials[first]):
        return first
    efficacy, retained = trials[first].efficacy or 0.0, trials[first].specificity_retained or 0.0
    allowed = [n for n, trial in enumerate(trials) if trial.efficacy is not None and trial.efficacy >= efficacy]
    if tune == "neighbours":
        kept = [n for n in allowed if (trials[n].specificity_retained or 0.0) >= retained - TOLERANCE]
        return max(kept, key=lambda n: trials[n].generalization or 0.0)
    return max(allowed, key=lambda n: trials[n].score or 0.0)


def _is_known(trial: Trial) -> bool:
    """Tell if a trial was edited, and its neighbours could be compared."""
    retained = trial.specificity_retained
    return trial.efficacy is not None and retained is not None and not math.isnan(retained)
