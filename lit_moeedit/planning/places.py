"""Plans of runs that find the layers and the token to edit: the costliest place, and the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.editing import PHASES, Editor
from lit_moeedit.editing.locating.search import PLACES, TRIAL_FACTS, TRIAL_TOKENS, WIDTH
from lit_moeedit.editing.locating.tracing import MAX_FACTS, WINDOWS
from lit_moeedit.editing.locating.tuning import FURTHER, STRENGTHS, STRENGTHS_ALONE, TUNE_FACTS, TUNE_TOKENS
from lit_moeedit.editing.phases import LOCATE
from lit_moeedit.editing.place import TOKENS, Place
from lit_moeedit.models.experts import expert_layers, find_model
from lit_moeedit.module import LitMoE
from lit_moeedit.planning.dry_run import Budgets, Workload, simulate
from lit_moeedit.planning.fake_tensors import Cost
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.upkeep import Upkeep


def simulate_search(
    module: LitMoE,
    editor: Editor,
    sharding: Sharding,
    work: Workload,
    card: float | None = None,
    upkeep: Upkeep | None = None,
) -> tuple[list[Cost], Budgets, list[Editor]]:
    """Simulate a run at each place that may be the costliest of those that its editor may choose.

    The lower the layers, the more of the model each step for the targets takes; the higher, the more a forward for
    statistics and features does. So these are the lowest and the highest layers. The arguments are those of
    :func:`~lit_moeedit.planning.simulate`.

    Returns:
        The costs of the phases, each that of the place where it is highest, with an estimate of the search as
        ``locate``; the token budgets, the smallest ones; and the editor at each of the places. An editor that was given
        its place has only that one, and no search.

    Raises:
        UnsupportedModelError: if a layer cannot be edited.
    """
    if editor.is_resolved:
        return *simulate(module, editor, sharding, work, card, upkeep), [editor]
    known = list(expert_layers(find_model(module)))
    ends = [editor.layers] if editor.layers else [tuple(known[:WIDTH]), tuple(known[-WIDTH:])]
    token: EditToken = "subject_last" if editor.token == "auto" else editor.token
    editors = [editor.at(Place(layers, token)) for layers in dict.fromkeys(ends)]
    if editor.tune:  # it may choose as many
        most = max(editor.phrasings, *(number for number, _, _ in FURTHER))
        editors = [own.at(replace(own.with_settings(Place(own.layers, token)), phrasings=most)) for own in editors]
    costs, budgets = zip(*(simulate(module, own, sharding, work, card, upkeep) for own in editors), strict=True)
    highest = [_highest(phases) for phases in zip(*costs, strict=True)]
    first = next(index for index, cost in enumerate(highest) if cost.phase in PHASES)
    highest.insert(first, locating_cost({cost.phase: cost for cost in highest}, editor, work, len(known)))
    smallest = Budgets(*(min(values) for values in zip(*(vars(own).values() for own in budgets), strict=True)))
    return highest, smallest, editors


def locating_cost(phases: Mapping[str, Cost], editor: Editor, work: Workload, layers: int) -> Cost:
    """Estimate the search for a place, :func:`~lit_moeedit.editing.locating.locate`, from the cost of the edit itself.

    A trace scores a row for each of its facts, layers, tokens and windows. A trial finds targets, edits, and measures
    twice, for some facts. Second moments are those of a part of the text. No phase of it needs more memory than that of
    the edit. Where the editor is tuned, by :func:`~lit_moeedit.editing.locating.tune`, the trials of its settings are
    added; those with the same stop share their targets.

    Args:
        phases: the costs of the edit by phase.
        editor: the editor.
        work: sizes of the run's data.
        layers: number of layers that may be chosen.
    """
    tokens = len(TOKENS) if editor.token == "auto" else 1
    is_located = bool(editor.layers) and editor.token != "auto"
    places = 0 if is_located else tokens * (1 if editor.layers else min(PLACES, layers))
    # a trace runs each fact with and without its subject, and with what each window restores of it
    runs = 0 if editor.layers else 2 + len(WINDOWS) * len(TOKENS) * layers
    traced = runs * min(MAX_FACTS, work.edits) / (work.edits * work.questions)
    share = min(TRIAL_FACTS, work.edits) / work.edits
    length = work.texts * work.text_tokens
    # one pass for the layers of all places
    passes = 0.0 if is_located else min(1.0, TRIAL_TOKENS / length) * max(1.0, min(places, layers / WIDTH))
    scored = 0.0 if is_located else traced + share * (places + 1)
    found, edited = share * places, share * places
    if editor.tune:
        settings, tuned = len(STRENGTHS) + len(STRENGTHS_ALONE) + len(FURTHER), min(TUNE_FACTS, work.edits) / work.edits
        searches = len({editor.targets.stop, *(max(editor.targets.stop, stop) for _, _, stop in FURTHER)})
        passes += min(1.0, TUNE_TOKENS / length)
        scored += tuned * (settings + 1)
        found, edited = found + tuned * searches, edited + tuned * settings
    times = {"statistics": passes, "targets": found, "evaluation": scored}
    parts = [(cost, times.get(name, edited)) for name, cost in phases.items() if name in (*PHASES, *times)]
    costs = [cost for cost, _ in parts]
    return Cost(
        LOCATE,
        held=max(cost.held for cost in costs),
        peak=max(cost.peak for cost in costs),
        host=max(cost.host for cost in costs),
        sent=round(sum(cost.sent * number for cost, number in parts)),
        flops=round(sum(cost.flops * number for cost, number in parts)),
    )


def _highest(costs: Sequence[Cost]) -> Cost:
    """Return the maximum of each value of one phase at several places."""
    names = ("held", "peak", "host", "sent", "flops", "written")
    return replace(costs[0], **{name: max(getattr(cost, name) for cost in costs) for name in names})
