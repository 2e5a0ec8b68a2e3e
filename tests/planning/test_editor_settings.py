"""Plans of settings that add forwards or rows to an edit, against the same edits with numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.editing import TargetOptimizer
from lit_moeedit.planning import Cost, CostCounter
from lit_moeedit.planning.dry_run import Budgets
from lit_moeedit.planning.report import remarks
from lit_moeedit.planning.sharding import Sharding
from lit_moeedit.planning.upkeep import TRAINING, Upkeep
from tests.editing.test_neutral_prompts import knowing
from tests.planning.test_planning import WORK, Different, editor, keys_of, planned

PLACE: dict[str, Any] = {"layers": [0, 2], "preserve": "none", "token": "last", "token_budget": 4096, "ridge": 1e3}
"""One batch holds everything: of several, a plan takes all to be as long as the first. With a large ridge no second try
of the solver depends on the numbers."""
ROWS = {"features", "solve", "commit"}
"""Phases that grow with the rows of an edit."""


def counted(model: PreTrainedModel, answers: bool = False, **settings: Any) -> dict[str, Cost]:
    """What an edit with numbers takes, of a model that gives all facts' true answer, or of one that gives none."""
    tokenizer: Any = Different()
    if answers:
        (true,) = set(tokenizer([WORK.facts()[0].target_true])["input_ids"][0])
        model.lm_head.register_forward_hook(
            lambda module, inputs, output: output.index_fill(-1, torch.tensor(true), 99.0)
        )
    counter = CostCounter([*model.parameters(), *model.buffers()])
    with counter:
        editor(**PLACE, **settings).edit(model, tokenizer, WORK.facts(), phase=counter.phase)
    return counter.phases


def assert_alike(plan: dict[str, Cost], found: dict[str, Cost]) -> None:
    for name in ROWS:
        # which experts are visited, and how often, depends on the numbers
        few = name != "features"
        rise = found[name].peak - found[name].held
        assert plan[name].peak - plan[name].held == pytest.approx(rise, rel=0.5 if few else 0.1), name
        assert plan[name].flops == pytest.approx(found[name].flops, rel=0.5 if few else 0.01), name


@pytest.mark.slow
def test_residuals_of_each_layer_take_one_more_forward(make_model: Callable[..., PreTrainedModel]) -> None:
    keys, plans, runs = keys_of("qwen3_moe"), [], []
    for of in ("target_layer", "each_layer"):
        plans.append(planned("qwen3_moe", Sharding(on_cpu=True), editor(**PLACE, residual_of=of)))
        runs.append(counted(make_model(**keys), residual_of=of))
        assert_alike(plans[-1], runs[-1])
    added = [each["features"].flops - plain["features"].flops for plain, each in (plans, runs)]
    assert added[0] == added[1] > 0


def test_further_prompts_are_counted_as_if_all_were_answered(make_model: Callable[..., PreTrainedModel]) -> None:
    keys, count = keys_of("qwen3_moe"), 2
    plan = planned("qwen3_moe", Sharding(on_cpu=True), editor(**PLACE, phrasings=count))
    assert_alike(plan, counted(make_model(**keys), answers=True, phrasings=count))
    # those of a model that answers none of them are candidates all the same
    none, plain = (counted(make_model(**keys), phrasings=n)["features"].flops for n in (count, 0))
    assert plain < none < plan["features"].flops


@pytest.mark.slow
def test_neutral_prompts_are_counted_as_if_none_gave_the_truth(make_model: Callable[..., PreTrainedModel]) -> None:
    targets = TargetOptimizer(steps=5, stop=0.0)
    place = {**PLACE, "layers": [0, 1], "token": "subject_last", "neutral": "{} is", "targets": targets}
    keys, plans, runs = keys_of("qwen3_moe"), [], []
    for count in (0, 2):
        plans.append(planned("qwen3_moe", Sharding(on_cpu=True), editor(**place, neutral_prompts=count)))
        tokenizer: Any = Different()
        model = make_model(**keys)
        counter = CostCounter([*model.parameters(), *model.buffers()])
        with counter, knowing(WORK.facts()):
            editor(**place, neutral_prompts=count).edit(model, tokenizer, WORK.facts(), phase=counter.phase)
        runs.append(counter.phases)
        assert plans[-1]["targets"].flops == pytest.approx(runs[-1]["targets"].flops, rel=0.01)
    assert plans[0]["targets"].flops < plans[1]["targets"].flops
    assert plans[0]["features"].flops == plans[1]["features"].flops


@pytest.mark.slow
def test_ranks_share_the_candidates() -> None:
    def features(ranks: int, **settings: Any) -> Cost:
        own = editor(**{**PLACE, "token_budget": 64}, **settings)
        return planned("qwen3_moe", Sharding(ranks, on_cpu=True), own)["features"]

    plain, further = (features(2, phrasings=count) for count in (0, 3))
    assert further.sent > plain.sent and plain.flops < further.flops < features(1, phrasings=3).flops


@pytest.mark.parametrize(
    ("edits", "told"), [(6, "at most 3 for each fact, of 5"), (50, "at most 3 for each fact, of 12")]
)
def test_the_limit_is_named(edits: int, told: str) -> None:
    costs = [Cost(TRAINING, 0, 9)]
    for count in (0, 3):
        run: Any = SimpleNamespace(editor=editor(phrasings=count, neutral_prompts=count), upkeep=Upkeep())
        lines = remarks(costs, run, replace(WORK, edits=edits), Budgets(1, 1, 1), [run.editor])
        (line,) = [line for line in lines if "Further prompts" in line] or [""]
        assert (told in line and "an upper limit: features, solve and commit" in line) == bool(count)
        (line,) = [line for line in lines if "neutral" in line] or [""]
        assert (told in line and "an upper limit: targets" in line) == bool(count)
