"""The search for layers and token: a causal trace, then trial edits at the places that it suggests."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.data.facts import Fact, validate_facts
from lit_moeedit.editing.editor import Editor
from lit_moeedit.editing.locating.location import Location
from lit_moeedit.editing.locating.tracing import MAX_FACTS, Trace, spread, trace, window
from lit_moeedit.editing.locating.trials import Trial, Trials, choose, finalists
from lit_moeedit.editing.phases import Progress
from lit_moeedit.editing.place import TOKENS, Place
from lit_moeedit.editing.targets import TargetOptimizer
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import decoder_layers
from lit_moeedit.sharding.history import History
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

TRIAL_FACTS = 8
"""Default of the maximum number of facts of a trial."""
FINAL_FACTS = 32
"""Default of the maximum number of facts of the last trial, between the places that were good in the first."""
PLACES = 4
"""Default of the maximum number of places of each token."""
TRIAL_TOKENS = 32768
"""Maximum number of tokens of preservation text in a trial."""
WIDTH = 3
"""Maximum number of layers of a place."""
WEAK = 0.1
"""Share of the highest peak below which a token gets two places at most."""
FOUND = 1.0
"""Maximum target loss, in nats per token, with which target vectors count as found."""
PERSISTENT: Mapping[str, Any] = {"steps": 60, "learning_rate": 0.5, "clamp": 2.0, "weight_decay": 0.05}
"""Settings of target vectors for models that the default, that of the papers, does not reach."""


@torch.inference_mode(False)
@torch.no_grad()
def locate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact | Mapping[str, Any]],
    preservation: Sequence[str] = (),
    *,
    editor: Editor | None = None,
    trial_facts: int = TRIAL_FACTS,
    final_facts: int = FINAL_FACTS,
    trace_facts: int = MAX_FACTS,
    places: int = PLACES,
    optimizers: Sequence[Any] = (),
    histories: dict[str, History] | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Location:
    """Find the layers and the token at which facts are best edited.

    First, a causal trace (:func:`~lit_moeedit.editing.locating.trace`) finds the layers whose experts carry the facts.
    Where a model stores a fact is not always where it is best edited. So places around the peaks are tried, for both
    tokens: single layers and windows of at most three. The target vectors of some facts are optimised at each. A place
    whose loss stays more than 1 nat above the lowest one is dropped. At the others the facts are edited, measured and
    undone, bit by bit.
    :func:`~lit_moeedit.editing.locating.trials.choose` has the rule by which the best one is chosen. Where several
    places are as good as the few facts can tell, and there are more facts, these places are tried again with more.

    Args:
        model: the model. Weights, modes and random states are the same afterwards.
        tokenizer: its tokenizer.
        facts: the facts to edit, or objects with the keys of a row of a facts file.
        preservation: text on which the experts must keep their behaviour. Without it, places are tried with an editor
            that preserves nothing, unless ``editor`` is given.
        editor: settings of the trials. Layers or a token that it has are not searched for. ``None`` for those of
            ``Editor(layers="auto", token="auto")`` and, if these find no target vectors, stronger ones.
        trial_facts: maximum number of facts of a trial, spread evenly over the given ones.
        final_facts: maximum number of facts of a second trial of the best places, likewise; none if it is lower.
        trace_facts: maximum number of facts that are traced, likewise.
        places: maximum number of places of each token.
        optimizers: as for :meth:`~lit_moeedit.editing.Editor.edit`.
        histories: likewise.
        ranks: the processes that share the work. Each calls this with the same arguments and gets the same place.
        progress: called with the name of a step, the number of parts done, and their total number.

    Raises:
        UnsupportedModelError: if the model cannot be edited.
        FactError: if a fact cannot be edited.
        ValueError: if there is no fact, a number is below 1, or ``editor`` needs preservation text and there is none.
        TooLittleMemoryError: if memory does not suffice for a single row.
        RankError: if another rank failed.
    """
    given = {"trial_facts": trial_facts, "final_facts": final_facts, "trace_facts": trace_facts, "places": places}
    for name, number in given.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    ranks = ranks or Ranks.current()
    report = progress or (lambda phase, done, total: None)
    with ranks.together():
        facts = validate_facts(facts, tokenizer=tokenizer)
        if not facts:
            raise ValueError("there is no fact by which a place could be found")
        settings = editor if editor is not None else _default_editor(bool(preservation))
        if settings.needs_moments and not preservation:
            raise ValueError("the editor needs preservation text to find layers and token; give some")
        layers = settings.find_layers(model)
        found = (
            trace(model, tokenizer, facts, ranks, settings.token_budget, report, trace_facts)
            if (not settings.layers)
            else None
        )
        tried = list(candidates(model, layers, settings, found, places))
        seconds = {"trace": 0.0 if found is None else found.seconds}

        def run(own: Editor, places: Sequence[Place], count: int, highest: float = math.inf) -> tuple[list[Trial], int]:
            """Return the trials of places with some of the facts, and the index of the best one, on all ranks alike."""
            chosen = [facts[number] for number in spread(len(facts), count)]
            trials = Trials(
                model, tokenizer, chosen, preservation, own, TRIAL_TOKENS, optimizers, histories, ranks, report
            )
            results = trials.run(places, highest)
            for step, duration in trials.seconds.items():
                seconds[step] = seconds.get(step, 0.0) + duration
            # the ranks may have measured changes that differ in the last bit
            best = torch.tensor([choose(results, len(chosen))])
            ranks.broadcast(best)
            return results, int(best)

        changed = dict[str, Any]()
        results, best = run(settings, tried, trial_facts, FOUND if editor is None else math.inf)
        if editor is None and min(trial.nll for trial in results) > FOUND:
            changed, settings = dict(PERSISTENT), copy(settings)
            settings.targets = TargetOptimizer(**PERSISTENT)
            results, best = run(settings, tried, trial_facts)
        close = finalists(results, best, min(trial_facts, len(facts)))
        if len(close) > 1 and min(final_facts, len(facts)) > trial_facts:
            again, winner = run(settings, [results[number].place for number in close], final_facts)
            if again[winner].efficacy is not None:
                best = close[winner]
            for number, trial in zip(close, again, strict=True):
                results[number] = trial if trial.efficacy is not None else results[number]
    location = Location(tuple(results), best, found, seconds, changed)
    if location.best.nll > FOUND:
        log.warning(
            "target vectors are not found at any place: the lowest loss is %.1f nats per token; give the editor's "
            "targets more steps, a higher learning_rate or a higher clamp%s",
            location.best.nll,
            f", such as {dict(PERSISTENT)}" if editor is not None else "",
        )
    return location


def _default_editor(preserves: bool) -> Editor:
    if not preserves:
        log.warning("places are tried with nothing preserved, because there is no preservation text")
    return Editor("auto", token="auto", preserve="output" if preserves else "none")


def candidates(
    model: PreTrainedModel, layers: Sequence[ExpertLayer], editor: Editor, found: Trace | None, count: int
) -> Iterator[Place]:
    """Yield the places to try: for each token the peak windows of a trace, its peak layer, and the highest layer.

    Args:
        model: the model.
        layers: the layers that may be edited, ascending.
        editor: its layers and token are kept where it has them.
        found: the trace; ``None`` if the editor has layers.
        count: maximum number of places of each token.
    """
    last = decoder_layers(model, layers[-1])[-1]
    for number, token in enumerate(TOKENS):
        if editor.token not in ("auto", token):
            continue
        if found is None:
            yield Place(editor.layers, token)
            continue
        # nothing reads the subject's hidden state after the last layer
        usable = [layer.index for layer in layers if token == "last" or layer.layer is not last] or [layers[-1].index]
        single, wide = found.restored[:, number, : len(usable)].nan_to_num().tolist()
        # the target vectors of two places show if a token that restores next to nothing is of use all the same
        is_weak = max(wide) < WEAK * float(found.restored.nan_to_num().max())
        yield from _around_peaks(usable, token, single, wide, min(count, 2) if is_weak else count)


def _around_peaks(
    layers: Sequence[int], token: EditToken, single: Sequence[float], wide: Sequence[float], count: int
) -> list[Place]:
    """Return the best window, its best layer, the best windows of which no layer has been taken, and the highest layer.

    Args:
        layers: indices of the layers.
        token: the token.
        single: share that each layer restores.
        wide: share that the window around each layer restores.
        count: maximum number of places.
    """
    size = min(WIDTH, len(layers))
    half = size // 2
    # whole windows only: those at the ends have their middle further inside
    centres = range(half, len(layers) - (size - 1 - half)) if size > 1 else range(len(layers))
    ordered = sorted(centres, key=lambda centre: -wide[centre])
    windows = [list(window(centre, size, len(layers)))[:size] for centre in ordered]
    places = [windows[0]]
    peak = max(range(len(layers)), key=single.__getitem__)
    if size > 1:
        places.append([peak])
    for other in windows[1:]:
        if not set(other) & {position for place in places if len(place) > 1 for position in place}:
            places.append(other)
    # in small models all windows overlap
    places += [[position] for position in sorted(range(len(layers)), key=lambda p: -single[p]) if position != peak]
    top = [len(layers) - 1]
    if top not in places[:count] and count > 2:  # a trace restores nothing there that is not in the layers below, too
        places.insert(count - 1, top)
    return [Place(tuple(layers[position] for position in place), token) for place in places[:count]]
