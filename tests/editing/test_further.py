"""Further measures and intervals: each is what plain forwards and counting find, and leaves the model as it is."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact, Probe
from lit_moeedit.editing import Editor, TargetOptimizer, answers, evaluate
from lit_moeedit.editing.by_fact import intervals
from lit_moeedit.editing.copying import copied
from lit_moeedit.editing.further import MEASURES, FurtherMeasures, HeldOut, check_measures
from lit_moeedit.metrics import bootstrap_interval, ngram_entropy
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.preservation import NullSpace

LAYERS = (0, 1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_moeedit.editing.further.FLUENCY_TOKENS", 12)


@pytest.fixture
def probed(facts: list[Fact]) -> list[Fact]:
    """Facts with probes: what the model says of some is known, because it says the truth of the facts."""
    rome = (
        Probe("portability", facts[0].prompt, ("Portugal", "Italy")),
        Probe("portability", facts[0].prompt, ("Spain",)),
        Probe("reversed", facts[1].prompt, ("Russia",)),
    )
    oslo = (Probe("portability", facts[0].prompt, ("Italy",)), Probe("multi_hop", facts[0].prompt, ("", "Spain")))
    return [replace(facts[0], probes=rome), facts[1], replace(facts[2], probes=oslo), facts[3]]


def further(tokenizer: Any, *names: str, **held_out: Any) -> FurtherMeasures:
    return FurtherMeasures(names or MEASURES, tokenizer, HeldOut(**held_out))


@torch.no_grad()
def likeliest(model: PreTrainedModel, ids: list[int]) -> list[int]:
    """The likeliest token after each one of a text."""
    return copy.deepcopy(model).eval()(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()


def greedy(model: PreTrainedModel, ids: list[int], tokens: int, end: int) -> list[int]:
    """The tokens after a text, one forward for each, up to the end of the text."""
    found: list[int] = []
    while len(found) < tokens and end not in found:
        found.append(likeliest(model, [*ids, *found])[-1])
    return found


def test_all_measures_leave_the_model_and_the_random_state_as_they_are(
    taught, tokenizer, probed, texts, unchanged
) -> None:
    measures = further(tokenizer, statements=[(probed[0].prompt, "Italy")], texts=texts[:2])
    evaluation = evaluate(taught, tokenizer, probed)
    # transformers installs its hooks for router logits once and for all
    measures.measure(taught, probed, evaluation, LAYERS)
    unchanged(taught)
    found = measures.measure(taught, probed, evaluation, LAYERS)
    assert found.metrics.keys() == {
        *("generation_exact", "generation_contained", "fluency", "portability", "multi_hop", "reversed"),
        *("probability_gap", "log_probability_gap", "copy_accuracy", "held_out_accuracy", "other_style_perplexity"),
    }
    whole = found.add_to(evaluation)
    # what there was is as it was
    assert {name: whole.metrics[name] for name in evaluation.metrics} == pytest.approx(evaluation.metrics, nan_ok=True)
    assert whole.metrics.keys() - evaluation.metrics.keys() == found.metrics.keys()
    assert whole.intervals.keys() >= {"efficacy", "fluency", "probability_gap"}


def test_generation_and_fluency(taught, tokenizer, facts) -> None:
    said = answers(taught, tokenizer, [fact.prompt for fact in facts])
    found = further(tokenizer, "generation", "fluency").measure(taught, facts, evaluate(taught, tokenizer, facts))
    # one of four facts is new knowledge, and the model says the truth of the others
    exact = [text == fact.target_new for text, fact in zip(said, facts, strict=True)]
    assert found.metrics["generation_exact"] == sum(exact) / 4
    assert found.by_fact["generation_exact"].tolist() == [[float(x) for x in exact], [1.0] * 4]
    long = answers(taught, tokenizer, [fact.prompt for fact in facts], tokens=12, to_end=False)
    plain = [greedy(taught, tokenizer(fact.prompt)["input_ids"], 12, tokenizer.eos_token_id) for fact in facts]
    assert long == [text.strip() for text in tokenizer.batch_decode(plain, skip_special_tokens=True)]
    # beyond the end of a sentence
    assert any("." in text[:-1] or "\n" in text for text in long)
    assert found.metrics["fluency"] == pytest.approx(float(ngram_entropy(long)["fluency"]), rel=1e-6)
    given = further(tokenizer, "generation").measure(
        taught, facts, evaluate(taught, tokenizer, facts), generated=[fact.target_new for fact in facts]
    )
    assert given.metrics == {"generation_exact": 1.0, "generation_contained": 1.0}


def test_probes(taught, tokenizer, probed) -> None:
    found = further(tokenizer, "portability", "multi_hop", "reversed").measure(
        taught, probed, evaluate(taught, tokenizer, probed)
    )
    # of Rome one of two is answered, of Oslo the only one; nothing is said of an answer without a token
    assert found.metrics == {"portability": 0.75, "multi_hop": 0.0, "reversed": 1.0}
    assert found.by_fact["portability"].tolist() == [[0.5, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]]
    bare = [replace(fact, probes=()) for fact in probed]
    without = further(tokenizer, "reversed").measure(taught, bare, evaluate(taught, tokenizer, bare))
    assert without.metrics["reversed"] != without.metrics["reversed"]


def test_the_gap_is_that_of_the_evaluation(taught, tokenizer, facts) -> None:
    evaluation = evaluate(taught, tokenizer, facts)
    found = further(tokenizer, "probability_gap").measure(taught, facts, evaluation).metrics
    known = ~evaluation.log_true.isnan()
    new, true = evaluation.log_new[known].double(), evaluation.log_true[known].double()
    # the results are float32
    assert found["probability_gap"] == pytest.approx(float((new.exp() - true.exp()).mean()), rel=1e-6)
    assert found["log_probability_gap"] == pytest.approx(float((new - true).mean()), rel=1e-6)


def test_copies_are_what_one_forward_per_sequence_finds(taught, tokenizer) -> None:
    predicted, expected = copied(taught, tokenizer, sequences=3, length=6, token_budget=12)
    assert expected.shape == (3, 5) and not set(tokenizer.all_special_ids) & set(expected.flatten().tolist())
    again, _ = copied(taught, tokenizer, sequences=3, length=6, token_budget=1000)
    assert torch.equal(again, predicted)
    state = torch.get_rng_state()
    drawn = copied(taught, tokenizer, sequences=3, length=6, seed=1)[1]
    assert not torch.equal(drawn, expected) and torch.equal(torch.get_rng_state(), state)
    # the first tokens are not returned, so the sequences are drawn again here
    special = set(tokenizer.all_special_ids)
    vocabulary = min(len(tokenizer), taught.get_input_embeddings().num_embeddings)
    known = torch.tensor([i for i in range(vocabulary) if i not in special])
    rows = known[torch.randint(len(known), (3, 6), generator=torch.Generator().manual_seed(0))].tolist()
    for row, found in zip(rows, predicted.tolist(), strict=True):
        assert likeliest(taught, [tokenizer.bos_token_id, *row, *row])[7:12] == found


def test_held_out_statements_and_other_texts(taught, tokenizer, facts, texts) -> None:
    statements = [(facts[0].prompt, "Italy"), (facts[0].prompt, "Spain"), (facts[1].prompt, "Russia")]
    measures = further(tokenizer, "general_ability", statements=statements, texts=texts[:3])
    found = measures.measure(taught, facts, evaluate(taught, tokenizer, facts))
    assert found.metrics["held_out_accuracy"] == pytest.approx(2 / 3)
    assert found.by_fact["held_out_accuracy"].tolist() == [[1.0, 0.0, 1.0], [1.0] * 3]
    total, count = 0.0, 0
    for text in texts[:3]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            scores = copy.deepcopy(taught).eval()(input_ids=ids).logits[0].double().log_softmax(-1)
        total -= float(scores[:-1].gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    expected = float(torch.tensor(total / count).exp())
    assert found.metrics["other_style_perplexity"] == pytest.approx(expected, rel=1e-4)  # float32
    bare = further(tokenizer, "general_ability").measure(taught, facts, evaluate(taught, tokenizer, facts))
    assert bare.metrics.keys() == {"copy_accuracy"}


def test_what_compares_two_moments(taught, tokenizer, facts, texts) -> None:
    measures = further(tokenizer, "weight_growth", "null_space_rank", "template_routing")
    norms = {i: layer.down_proj.detach().double().norm(dim=(1, 2)) for i, layer in expert_layers(taught).items()}
    before = measures.measure(taught, facts, evaluate(taught, tokenizer, facts), LAYERS)
    same = measures.measure(taught, facts, evaluate(taught, tokenizer, facts), LAYERS, before)
    assert before.metrics == {} and same.metrics == {"template_routing_similarity": 1.0}
    for index in LAYERS:
        torch.testing.assert_close(before.norms[index], norms[index])
    unedited = copy.deepcopy(taught)
    targets = TargetOptimizer(steps=10, learning_rate=0.5, clamp=4.0, weight_decay=0.0)
    editor = Editor(LAYERS, targets=targets, preserve=NullSpace(0.02), ridge=0.01)
    result = editor.edit(taught, tokenizer, facts, texts)
    after = measures.measure(taught, facts, evaluate(taught, tokenizer, facts), LAYERS, before)

    growth = []
    for index in LAYERS:
        weight = expert_layers(taught)[index].down_proj.detach().double()
        experts = result.deltas[index].experts
        growth += [float(weight[j].norm() / norms[index][j]) - 1 for j in experts]
    found = measures.of_result(result, before, after)
    # float32 results of ratios near 1
    assert found["weight_growth_max"] == pytest.approx(max(growth), abs=1e-6) and found["weight_growth_max"] > 0
    assert found["weight_growth_mean"] == pytest.approx(sum(growth) / len(growth), abs=1e-6)
    # the growth of a pruned expert is not defined
    before.norms[LAYERS[0]][result.deltas[LAYERS[0]].experts[0]] = 0.0
    rest = measures.of_result(result, before, after)
    assert rest["weight_growth_mean"] == pytest.approx(sum(growth[1:]) / len(growth[1:]), abs=1e-6)

    pruned = {index: norms.clone() for index, norms in before.norms.items()}
    pruned[0][result.deltas[0].experts[0]] = 0.0
    others = measures.of_result(result, replace(before, norms=pruned), after)
    assert others["weight_growth_mean"] == pytest.approx(sum(growth[1:]) / len(growth[1:]), abs=1e-6)

    assert result.moments is not None
    ranks = []
    for index, by_expert in result.null_ranks.items():
        for j, rank in by_expert.items():
            moment = result.moments[index].mean(torch.tensor([j]))[0].double()
            assert rank == int((torch.linalg.eigvalsh(moment) <= 0.02).sum())
            ranks.append(rank)
    assert len(set(ranks)) > 1 and found["null_space_rank_min"] == min(ranks)
    assert found["null_space_rank_mean"] == sum(ranks) / len(ranks)

    def routed(model: PreTrainedModel) -> list[list[set[int]]]:
        """Experts of the last token of each template, in each layer, by the routers' logits alone."""
        chosen = []
        for fact in facts:
            ids = tokenizer(fact.prompt.replace(fact.subject, "{}"), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                output = copy.deepcopy(model).eval()(input_ids=ids, output_router_logits=True)
            k = model.config.num_experts_per_tok
            chosen.append([set(logits[-1].topk(k).indices.tolist()) for logits in output.router_logits])
        return chosen

    pairs = zip(routed(unedited), routed(taught), strict=True)
    overlaps = [len(a & b) / len(a | b) for one, two in pairs for a, b in zip(one, two, strict=True)]
    similarity = after.metrics["template_routing_similarity"]
    assert similarity == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-6) and similarity < 1


@pytest.mark.slow
def test_half_precision_gives_numbers(taught, tokenizer, probed, texts) -> None:
    taught = taught.to(torch.bfloat16)
    taught.set_experts_implementation("eager")  # grouped_mm knows no bfloat16 of these sizes
    evaluation = evaluate(taught, tokenizer, probed)
    measures = further(tokenizer, statements=[(probed[0].prompt, "Italy")], texts=texts[:2])
    before = measures.measure(taught, probed, evaluation, LAYERS)
    after = measures.measure(taught, probed, evaluation, LAYERS, before)
    assert all(value == value for value in after.metrics.values())
    assert after.metrics["template_routing_similarity"] == 1.0 and after.metrics["held_out_accuracy"] == 1.0
    for index, norms in after.norms.items():
        weight = expert_layers(taught)[index].down_proj.detach().double()
        torch.testing.assert_close(norms, weight.norm(dim=(1, 2)))


class TestIntervals:
    def test_sums_by_fact_give_the_metrics(self, taught, tokenizer, facts) -> None:
        edited = replace(facts[0], target_new="Italy", target_true="Spain")
        facts = [edited, *facts[1:]]
        baseline = {fact.key: [True] * len(fact.neighbours) for fact in facts}
        evaluation = evaluate(taught, tokenizer, facts, baseline)
        known = {name for name, value in evaluation.metrics.items() if value == value}
        parted = {"efficacy", "generalization", "specificity", "specificity_retained", "specificity_retained_near"}
        parted |= {f"{name}_accuracy" for name in ("efficacy", "generalization", "specificity")}
        assert evaluation.by_fact.keys() >= parted & known >= {"efficacy", "specificity_retained"}
        for name in evaluation.by_fact.keys() & known:
            held, counted = evaluation.by_fact[name].sum(1).tolist()
            assert held / counted == pytest.approx(evaluation.metrics[name], rel=1e-6), name

    def test_they_are_bootstrap_intervals_over_facts(self, taught, tokenizer, facts) -> None:
        evaluation = evaluate(taught, tokenizer, facts)
        for name, bounds in evaluation.intervals.items():
            assert bounds == tuple(bootstrap_interval(*evaluation.by_fact[name]).tolist())
            assert bounds[0] <= evaluation.metrics[name] + 1e-7 and evaluation.metrics[name] - 1e-7 <= bounds[1]
        assert "efficacy" in evaluation.intervals
        broken = {"gap": torch.tensor([[1.0, -math.inf, math.inf], [1.0] * 3], dtype=torch.float64)}
        assert intervals({**evaluation.by_fact, **broken}) == evaluation.intervals
        alone = evaluate(taught, tokenizer, facts[:1])
        assert alone.intervals == {}


def test_names_are_checked_and_ordered() -> None:
    assert check_measures(["reversed", "generation", "reversed"]) == ("generation", "reversed")
    with pytest.raises(
        ValueError, match=r"measure has 'fluncy' \(did you mean 'fluency'\?\); expected some of generation, "
    ):
        check_measures(["fluncy"])
    with pytest.raises(ValueError, match=r"a list of names, such as \[fluency\], got 'fluency'"):
        check_measures("fluency")
