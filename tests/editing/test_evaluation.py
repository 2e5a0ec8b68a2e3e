"""Scores against plain forwards of single texts, exactness against generation, metrics against counting by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import encode
from lit_moeedit.data.facts import Fact, Neighbour
from lit_moeedit.editing.evaluation import evaluate, neighbour_groups, perplexity, score
from lit_moeedit.editing.generation import answers
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.sharding.ranks import Ranks


def questions(facts: list[Fact]) -> list[tuple[str, str]]:
    """Prompts with right and wrong targets of several lengths."""
    pairs = [(fact.prompt, target) for fact in facts for target in (fact.target_new, fact.target_true) if target]
    pairs += [(text, fact.target_true) for fact in facts for text in fact.paraphrases if fact.target_true]
    pairs += [(n.prompt, n.target) for fact in facts for n in fact.neighbours]
    return [*pairs, ("Milan", "lies in Italy, a country in the south of the north")]


def generated(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    """Greedy continuation by transformers itself."""
    output = model.eval().generate(
        torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return output[0, len(ids) :].tolist()


@torch.no_grad()
def plain_score(model: PreTrainedModel, tokenizer: Any, prompt: str, target: str) -> float:
    (encoding,) = encode(tokenizer, [prompt], [target])
    output = model.eval()(input_ids=torch.tensor([encoding.ids])).logits[0].log_softmax(-1)
    places = range(encoding.target_start, len(encoding.ids))
    return sum(float(output[i - 1, encoding.ids[i]]) for i in places) / len(places)


class TestScore:
    @pytest.mark.parametrize("token_budget", [1, 60, 16384])
    def test_log_prob_equals_plain_forwards(self, taught, tokenizer, facts, unchanged, token_budget: int) -> None:
        pairs = questions(facts)
        expected = torch.tensor([plain_score(taught, tokenizer, *pair) for pair in pairs])
        taught.train()
        unchanged(taught)
        got = score(taught, tokenizer, [p for p, _ in pairs], [t for _, t in pairs], token_budget)
        assert len(set(map(len, tokenizer([t for _, t in pairs])["input_ids"]))) > 2  # targets of several lengths
        torch.testing.assert_close(got.log_prob, expected, rtol=1e-4, atol=1e-4)  # float32, with and without padding

    @pytest.mark.parametrize("token_budget", [1, 60, 16384])
    def test_exact_is_what_generation_says(self, taught, tokenizer, facts, token_budget: int) -> None:
        pairs = questions(facts)
        got = score(taught, tokenizer, [p for p, _ in pairs], [t for _, t in pairs], token_budget)
        expected = []
        for encoding in encode(tokenizer, *zip(*pairs, strict=True)):
            prompt, target = encoding.ids[: encoding.target_start], encoding.ids[encoding.target_start :]
            expected.append(generated(taught, prompt, len(target)) == target)
        assert got.exact.tolist() == expected
        assert set(expected) == {True, False}

    @pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral", "olmoe", "deepseek_v3"])
    def test_other_families(self, make_model, tokenizer, facts, model_type: str) -> None:
        model, pairs = make_model(model_type), questions(facts)
        expected = torch.tensor([plain_score(model, tokenizer, *pair) for pair in pairs])
        got = score(model, tokenizer, [p for p, _ in pairs], [t for _, t in pairs])
        torch.testing.assert_close(got.log_prob, expected, rtol=1e-4, atol=1e-4)

    def test_nothing_to_score(self, model, tokenizer) -> None:
        got = score(model, tokenizer, [], [])
        assert got.log_prob.shape == got.exact.shape == (0,)


class TestEvaluate:
    def by_hand(self, model: PreTrainedModel, tokenizer: Any, facts: list[Fact]) -> dict[str, float]:
        """Every rate counted one prompt at a time, with plain forwards and greedy generation."""

        def says(prompt: str, target: str) -> bool:
            (encoding,) = encode(tokenizer, [prompt], [target])
            start = encoding.target_start
            return generated(model, encoding.ids[:start], len(encoding.ids) - start) == encoding.ids[start:]

        def prefers(prompt: str, right: str, wrong: str) -> bool:
            return plain_score(model, tokenizer, prompt, right) > plain_score(model, tokenizer, prompt, wrong)

        def share(values: list[bool]) -> float:
            return sum(values) / len(values) if values else math.nan

        known = [fact for fact in facts if fact.target_true is not None]
        paraphrased = [(text, fact) for fact in facts for text in fact.paraphrases]
        neighbours = [(neighbour, fact) for fact in facts for neighbour in fact.neighbours]
        truths = [(fact.prompt, fact.target_true) for fact in known] + [(n.prompt, n.target) for n, _ in neighbours]
        return {
            "efficacy": share([prefers(f.prompt, f.target_new, f.target_true) for f in known]),
            "efficacy_accuracy": share([says(f.prompt, f.target_new) for f in facts]),
            "generalization": share([prefers(x, f.target_new, f.target_true) for x, f in paraphrased if f.target_true]),
            "generalization_accuracy": share([says(x, f.target_new) for x, f in paraphrased]),
            "specificity": share([prefers(n.prompt, n.target, f.target_new) for n, f in neighbours]),
            "specificity_accuracy": share([says(n.prompt, n.target) for n, _ in neighbours]),
            "truth_recalled": share([says(*pair) for pair in truths]),
        }

    def test_metrics_equal_counting(self, taught, tokenizer, facts) -> None:
        # facts whose new target is what the model says already, so that no rate is all or nothing
        mixed = [
            *facts,
            Fact("Bergen", "People who live in Bergen speak", "Norwegian", "Latin", ("In Oslo one hears",)),
        ]
        expected = self.by_hand(taught, tokenizer, mixed)
        taught.train()
        result = evaluate(taught, tokenizer, mixed)
        for name, value in expected.items():
            assert result.metrics[name] == pytest.approx(value, abs=1e-6), name  # float32 rates
            assert 0 < value < 1, name
        utility = sum(expected[name] for name in ("efficacy", "generalization", "specificity")) / 3
        assert result.metrics["utility"] == pytest.approx(utility, abs=1e-6)
        assert math.isnan(result.metrics["specificity_retained"])  # there is no baseline

    def test_what_is_said_is_listed_by_fact(self, taught, tokenizer, facts) -> None:
        result = evaluate(taught, tokenizer, facts)
        assert (
            result.edits_exact.tolist()
            == score(taught, tokenizer, [f.prompt for f in facts], [f.target_new for f in facts]).exact.tolist()
        )
        assert list(result.neighbours_exact) == [fact.key for fact in facts]
        for fact in facts:
            prompts, targets = [n.prompt for n in fact.neighbours], [n.target for n in fact.neighbours]
            assert result.neighbours_exact[fact.key] == score(taught, tokenizer, prompts, targets).exact.tolist()
        asked, said = result.truths
        assert (asked, result.metrics["truth_recalled"]) == (6, said / 6)

    def test_retained_compares_with_the_baseline(self, taught, tokenizer, facts) -> None:
        before = evaluate(taught, tokenizer, facts)
        assert before.neighbours_exact[facts[0].key] == [True, False]
        assert before.neighbours_exact[facts[2].key] == [True]
        same = evaluate(taught, tokenizer, facts, before.neighbours_exact)
        assert same.metrics["specificity_retained"] == 1.0
        assert same.metrics["specificity_retained_near"] == 1.0
        assert math.isnan(same.metrics["specificity_retained_far"])  # none was said before
        with torch.no_grad():
            for layer in expert_layers(taught).values():
                layer.down_proj.zero_()
        after = evaluate(taught, tokenizer, facts, before.neighbours_exact)
        still = [after.neighbours_exact[facts[0].key][0], after.neighbours_exact[facts[2].key][0]]
        assert not all(still)
        assert after.metrics["specificity_retained"] == sum(still) / 2

    def test_order_of_facts_does_not_matter(self, taught, tokenizer, facts) -> None:
        baseline = evaluate(taught, tokenizer, facts).neighbours_exact
        one = evaluate(taught, tokenizer, facts, baseline).metrics
        two = evaluate(taught, tokenizer, facts[::-1], baseline).metrics
        assert one.keys() == two.keys()
        assert all(two[name] == value or (math.isnan(value) and math.isnan(two[name])) for name, value in one.items())

    def test_facts_without_a_known_truth(self, taught, tokenizer) -> None:
        unknown = [Fact("Oslo", "People who live in Oslo speak", "Norwegian", None, ("In Oslo one hears",))]
        result = evaluate(taught, tokenizer, unknown)
        for name in ("efficacy", "generalization", "specificity", "specificity_accuracy", "truth_recalled"):
            assert math.isnan(result.metrics[name]), name
        assert result.metrics["efficacy_accuracy"] == 1.0  # it is what the model says
        assert result.edits_exact.tolist() == result.edits_succeeded.tolist() == [True]
        assert result.truths == (0, 0)
        objects = [{"subject": "Oslo", "prompt": unknown[0].prompt, "target_new": "Norwegian"}]
        assert evaluate(taught, tokenizer, objects).metrics["efficacy_accuracy"] == 1.0

    def test_facts_without_a_truth_beside_others(self, taught, tokenizer, facts) -> None:
        """They do not enter the comparisons, whatever the order."""
        alone = evaluate(taught, tokenizer, facts)
        unknown = Fact("Oslo", "People who live in Oslo speak", "Norwegian")
        same = Fact("Oslo", "People who live in Oslo speak", "Norwegian", "Norwegian")
        for more in (unknown, same):
            both = evaluate(taught, tokenizer, [more, *facts])
            assert both.metrics["efficacy"] == alone.metrics["efficacy"]
            assert both.edits_succeeded.tolist() == [True, *alone.edits_succeeded.tolist()]
        assert alone.edits_succeeded.float().mean() == alone.metrics["efficacy"]

    def test_a_neighbour_whose_answer_is_the_new_target_is_not_compared(self, taught, tokenizer, facts) -> None:
        neighbour = Neighbour(facts[0].prompt, facts[0].target_true, "near")
        fact = Fact("Rome", "Rome belongs to", facts[0].target_true, None, (), (neighbour,))
        result = evaluate(taught, tokenizer, [fact], {fact.key: [True]})
        assert math.isnan(result.metrics["specificity"])
        assert result.metrics["specificity_accuracy"] == result.metrics["specificity_retained"] == 1.0

    def test_groups(self, taught, tokenizer, facts) -> None:
        assert neighbour_groups(facts) == ["far", "near"]
        baseline = {fact.key: [True] * len(fact.neighbours) for fact in facts}
        given = evaluate(taught, tokenizer, facts, baseline, groups=["far", "near", "other"]).metrics
        assert given["specificity_retained_near"] == 1.0
        assert given["specificity_retained_far"] == 0.0
        assert math.isnan(given["specificity_retained_other"])

    def test_neighbour_that_is_another_fact_s_prompt(self, taught, tokenizer, facts) -> None:
        """The same prompt and target are scored once, and counted wherever they stand."""
        shared = Fact("Rome", facts[0].prompt, "Spain", "Italy", (), (Neighbour(facts[0].prompt, "Italy", "near"),))
        result = evaluate(taught, tokenizer, [shared])
        assert result.neighbours_exact[shared.key] == [True]
        assert result.truths == (2, 2)
        assert result.metrics["specificity"] == 1.0
        assert result.metrics["efficacy"] == 0.0


def test_perplexity_equals_single_texts(taught, tokenizer, texts, unchanged) -> None:
    total, count = 0.0, 0
    taught.eval()
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            output = taught(input_ids=ids).logits[0].double().log_softmax(-1)
            total -= float(output[:-1].gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    taught.train()
    unchanged(taught)
    batches = []
    for part in (texts[:4], texts[4:]):
        batch = dict(tokenizer(part, return_tensors="pt", padding=True))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    assert perplexity(taught, batches) == pytest.approx(math.exp(total / count), rel=1e-4)  # float32


def test_answers_are_what_generation_says(taught, tokenizer, facts, unchanged) -> None:
    prompts = [fact.prompt for fact in facts] + ["Rome"]
    expected = []
    for ids in tokenizer(prompts)["input_ids"]:
        text = tokenizer.decode(generated(taught, ids, 5), skip_special_tokens=True)
        expected.append(text.split("\n")[0].split(".")[0].strip())
    taught.train()
    unchanged(taught)
    got = answers(taught, tokenizer, prompts, tokens=5)
    assert got == expected
    assert got[0].startswith("Italy")


def test_a_rank_with_fewer_batches_runs_its_last_one_again_and_does_not_count_it(model, input_ids) -> None:
    class Others(Ranks):
        """Says that another rank has three batches."""

        def __init__(self) -> None:
            super().__init__()
            self.said = iter((True, False, True, True, False))

        def any(self, flag: bool) -> bool:
            return next(self.said)

    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}
    found = perplexity(model, [batch], Others())
    handle.remove()
    assert len(forwards) == 3
    assert found == perplexity(model, [batch])


def test_a_rank_without_a_batch_is_refused(model) -> None:
    class Others(Ranks):
        def any(self, flag: bool) -> bool:
            return True

    with pytest.raises(ValueError, match="a rank has no batch, while others have some"):
        perplexity(model, [], Others())
