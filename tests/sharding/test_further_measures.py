"""Norms of experts, and further measures, of sharded models: those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Probe
from lit_moeedit.editing import answers, evaluate, further
from lit_moeedit.editing.further import MEASURES, FurtherMeasures, HeldOut
from lit_moeedit.models.experts import check_editable
from lit_moeedit.sharding.expert_norms import expert_norms
from lit_moeedit.sharding.ranks import RankError, Ranks
from tests.processes import run_ranks
from tests.sharding import fsdp2_models, small_edits
from tests.sharding.small_edits import FACTS, LAYERS, STAGES, TEXTS, editor, tokenizer

SHARDED = {
    "uneven": fsdp2_models.Case(experts=5),
    "an empty shard": fsdp2_models.Case(experts=1),
    "bfloat16": fsdp2_models.Case(dtype=torch.bfloat16),
    "rows": fsdp2_models.Case(layout="rows", experts=5),
    "columns": fsdp2_models.Case(layout="columns", experts=5),
    "replicas": fsdp2_models.Case(layout="replicas"),
}
PROBED = [
    replace(
        fact,
        probes=(
            # an odd number of rows, so that a rank has more of them than the other
            Probe("portability", fact.prompt, (fact.target_new, "bread")),
            Probe("multi_hop", f"{fact.subject} and the sea", ("the", "Italy", fact.subject)),
        ),
    )
    for fact in FACTS
]


PROMPTS = [fact.prompt for fact in FACTS]


def norms_of(model: PreTrainedModel, ranks: Ranks) -> dict[int, list[float]]:
    weights = {layer.index: layer.down_proj for layer in check_editable(model, LAYERS)}
    return {index: norms.tolist() for index, norms in expert_norms(weights, ranks).items()}


def expected_norms(model: PreTrainedModel) -> dict[int, list[float]]:
    return {
        layer.index: layer.down_proj.detach().double().flatten(1).norm(dim=1).tolist()
        for layer in check_editable(model, LAYERS)
    }


def _sharded_norms(names: list[str]) -> dict[str, dict[int, list[float]]]:
    return {name: norms_of(fsdp2_models.prepared(SHARDED[name])[0], Ranks.current()) for name in names}


def close(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for index, norms in expected.items():
        # sums of a few hundred squares in float64
        assert found[index] == pytest.approx(norms, rel=1e-12)


def test_norms_in_one_process() -> None:
    model = small_edits.model()
    close(norms_of(model, Ranks()), expected_norms(model))
    weight = torch.rand(3, 2, 4, dtype=torch.float16)
    found = expert_norms({7: weight}, Ranks())[7]
    assert found.tolist() == pytest.approx(weight.double().flatten(1).norm(dim=1).tolist(), rel=1e-12)


@pytest.mark.slow
def test_norms_under_fsdp2() -> None:
    for found in run_ranks(_sharded_norms, 2, list(SHARDED)):
        for name, norms in found.items():
            close(norms, expected_norms(fsdp2_models.whole_model(SHARDED[name])))


def measured(model: PreTrainedModel, optimizers: list[Any], ranks: Ranks) -> list[dict[str, Any]]:
    """All measures, each before and after an edit; the second time the forwards follow a commit to shards."""
    held_out = HeldOut([(fact.prompt, fact.target_new) for fact in FACTS[1:]], TEXTS)
    measures = FurtherMeasures(MEASURES, tokenizer(), held_out, token_budget=64)
    evaluation = evaluate(model, tokenizer(), PROBED, ranks=ranks)
    before = measures.measure(model, PROBED, evaluation, LAYERS, ranks=ranks)
    texts = dict(zip(PROMPTS, answers(model, tokenizer(), PROMPTS, 9, 64, ranks), strict=True))
    result = editor().edit(model, tokenizer(), PROBED, TEXTS, optimizers=optimizers, ranks=ranks)
    evaluation = evaluate(model, tokenizer(), PROBED, ranks=ranks)
    after = measures.measure(model, PROBED, evaluation, LAYERS, before, ranks=ranks)
    grown = measures.of_result(result, before, after)
    facts = [{name: sums.tolist() for name, sums in found.by_fact.items()} for found in (before, after)]
    return [{**before.metrics, **texts}, {**after.metrics, **grown}, *facts]


def _under_zero(kinds: list[str]) -> dict[str, list[dict[str, Any]]]:
    return {kind: measured(*small_edits.prepared(kind)[:2], Ranks()) for kind in kinds}


def _under_fsdp2() -> list[dict[str, Any]]:
    model, optimizer = fsdp2_models.prepared(fsdp2_models.Case())
    return measured(model, [optimizer], Ranks.current())


def check(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert {name: one.pop(name) for name in PROMPTS if name in one} == {n: other[n] for n in PROMPTS if n in other}
        other = {name: value for name, value in other.items() if name not in PROMPTS}
        # log-probabilities are summed in another order, and an edit multiplies that
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_measures_under_zero_are_those_of_one_process() -> None:
    kinds = [kind for kind in STAGES if kind in ("replicated", "zero 3")]
    expected = measured(small_edits.model(), [], Ranks())
    # three prompts that the model continues differently, so that a mix-up of rows would be seen
    assert len({expected[0][prompt] for prompt in PROMPTS}) == len(PROMPTS) and expected[0]["fluency"] > 1
    for rank in run_ranks(_under_zero, 2, kinds):
        for kind in kinds:
            check(rank[kind], expected)


@pytest.mark.slow
def test_measures_under_fsdp2_are_those_of_one_process() -> None:
    expected = measured(fsdp2_models.whole_model(fsdp2_models.Case()), [], Ranks())
    for rank in run_ranks(_under_fsdp2, 2):
        check(rank, expected)


def _fails_alone() -> str:
    ranks = Ranks.current()
    measures = FurtherMeasures(MEASURES, tokenizer(), token_budget=64)
    model = small_edits.model()
    evaluation = evaluate(model, tokenizer(), PROBED, ranks=ranks)

    def fail(*args: Any, **settings: Any) -> None:
        raise OSError("no room on this rank")

    with pytest.MonkeyPatch.context() as patch:
        if ranks.rank == 1:
            patch.setattr(further, "copied", fail)
        with pytest.raises((OSError, RankError)) as raised, ranks.together():
            measures.measure(model, PROBED, evaluation, LAYERS, ranks=ranks)
    return f"{raised.type.__name__}: {raised.value}"


def _different_probes() -> str:
    ranks = Ranks.current()
    facts = PROBED if ranks.rank else [replace(fact, probes=fact.probes[:1]) for fact in PROBED]
    model = small_edits.model()
    evaluation = evaluate(model, tokenizer(), facts, ranks=ranks)
    with (
        pytest.raises(ValueError, match="the probes of kind multi_hop must be the same on all ranks"),
        ranks.together(),
    ):
        FurtherMeasures(["multi_hop"], tokenizer()).measure(model, facts, evaluation, ranks=ranks)
    return "refused"


def _fail() -> list[str]:
    return [_fails_alone(), _different_probes()]


@pytest.mark.slow
def test_a_rank_that_fails_alone_or_has_other_probes_ends_all() -> None:
    first, second = run_ranks(_fail, 2)
    assert first[0].startswith("RankError") and "no room on this rank" in first[0]
    assert second[0] == "OSError: no room on this rank" and first[1] == second[1] == "refused"
