"""Measurements of each fact, and the reasons why new targets are not generated, on models where it happens."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_moeedit.data.encoding import pad_id
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import EditMethod, Editor, EditResult, Evaluation, TargetOptimizer, answers, evaluate, score
from lit_moeedit.editing.edit_tokens import edit_tokens
from lit_moeedit.editing.outcomes import Reason, describe_failure, has_failed, measure, reasons
from lit_moeedit.editing.probe import Probe
from lit_moeedit.models.experts import expert_layers

STRONG = TargetOptimizer(steps=25, learning_rate=0.5, clamp=4.0, weight_decay=0.0)


def edited(
    model: PreTrainedModel, tokenizer: Any, facts: list[Fact], **settings: Any
) -> tuple[EditResult, Evaluation, EditMethod]:
    """Edit facts; return the result, the evaluation afterwards, and the editor."""
    editor = Editor(**{"layers": [0, 1], "targets": STRONG, "preserve": "none", "token": "last", **settings})
    before = evaluate(model, tokenizer, facts)
    result = editor.edit(model, tokenizer, facts)
    return result, evaluate(model, tokenizer, facts, before.neighbours_exact), editor


def found(model: PreTrainedModel, tokenizer: Any, facts: list[Fact], **settings: Any) -> dict[str, Reason]:
    result, after, editor = edited(model, tokenizer, facts, **settings)
    generated = answers(model, tokenizer, [fact.prompt for fact in facts])
    texts = dict(zip((fact.key for fact in facts), generated, strict=True))
    return reasons(result, after, editor, texts)


class TestMeasure:
    def test_each_figure_is_that_of_its_own_fact(self, taught, tokenizer, facts) -> None:
        got = measure(taught, tokenizer, facts)
        assert [one.generated for one in got] == answers(taught, tokenizer, [fact.prompt for fact in facts])
        for fact, one in zip(facts, got, strict=True):
            targets = [fact.target_new, *([fact.target_true] if fact.target_true else [])]
            expected = score(taught, tokenizer, [fact.prompt] * len(targets), targets).log_prob.exp().tolist()
            # batches of other shapes round otherwise
            assert [one.p_new, one.p_true][: len(targets)] == pytest.approx(expected, rel=1e-4)
            assert one.holds == one.generated.startswith(fact.target_new)
            assert (one.p_true is None) == (fact.target_true is None)
            assert one.paraphrases[1] == len(fact.paraphrases)
            assert one.neighbours[0] == one.neighbours[1] <= len(fact.neighbours)  # nothing is lost before an edit
        assert got[0].p_true is not None and got[0].p_true > 0.5 > got[0].p_new

    def test_an_evaluation_is_not_made_twice(self, taught, tokenizer, facts, monkeypatch) -> None:
        known = evaluate(taught, tokenizer, facts)
        expected = measure(taught, tokenizer, facts, known.neighbours_exact)
        monkeypatch.setattr("lit_moeedit.editing.outcomes.evaluate", None)
        assert measure(taught, tokenizer, facts, known.neighbours_exact, evaluation=known) == expected

    def test_only_neighbours_that_were_answered_before_the_edit_count(self, taught, tokenizer, facts) -> None:
        baseline = {fact.key: [False] * len(fact.neighbours) for fact in facts}
        baseline[facts[0].key] = [True, False]
        got = measure(taught, tokenizer, facts, baseline)
        assert [one.neighbours[1] for one in got] == [1, 0, 0, 0]


class TestAnswers:
    def test_end_of_text(self, model, tokenizer, facts) -> None:
        prompt = facts[0].prompt
        (whole,) = answers(model, tokenizer, [prompt], tokens=3)
        (ids,) = tokenizer([prompt], return_tensors="pt")["input_ids"]
        first = int(model.eval()(ids[None]).logits[0, -1].argmax())
        model.generation_config.eos_token_id = [first, 1]
        (cut,) = answers(model, tokenizer, [prompt], tokens=3)
        assert cut == tokenizer.decode([first]).strip()
        assert whole.startswith(cut) and len(cut) < len(whole)

    def test_batches_change_nothing(self, taught, tokenizer, facts) -> None:
        prompts = [fact.prompt for fact in facts]
        assert answers(taught, tokenizer, prompts, token_budget=1) == answers(taught, tokenizer, prompts)
        assert answers(taught, tokenizer, []) == []


class TestReasons:
    def test_target_not_found(self, taught, tokenizer, facts) -> None:
        got = found(taught, tokenizer, facts, targets=TargetOptimizer(steps=2, learning_rate=1e-3))
        assert len(got) == 4 and {reason.code for reason in got.values()} == {"target_not_found"}
        text = str(got[facts[0].key])
        assert "no target vector was found at layer 1: " in text and "nats per token after 2 steps" in text
        assert "more steps" in text

    def test_layers_moved_too_little(self, taught, tokenizer, facts) -> None:
        got = found(taught, tokenizer, facts[:1], ridge=1e5)
        assert [reason.code for reason in got.values()] == ["layers_moved_too_little"]
        assert "the layers moved the output of layer 1 only 0% of the way" in str(got[facts[0].key])

    def test_function_word(self, taught, tokenizer) -> None:
        fact = Fact("The", "The city of Rome lies in", "Spain", "Italy")
        weak = TargetOptimizer(steps=1, learning_rate=1e-3)
        got = found(taught, tokenizer, [fact], token="subject_last", targets=weak)
        assert got[fact.key].code == "function_word" and "'The'" in str(got[fact.key])
        assert found(copy.deepcopy(taught), tokenizer, [fact], targets=weak)[fact.key].code == "target_not_found"

    def test_another_answer(self, taught, tokenizer, facts) -> None:
        """The layers reach half of the way, where the model still prefers the truth."""
        result, after, editor = edited(taught, tokenizer, facts[:1], ridge=1e5)
        result = replace(result, residual=torch.tensor([0.4]))
        got = reasons(result, after, editor, {facts[0].key: "Italy"})[facts[0].key]
        p_new = math.exp(float(after.log_new[0]))
        assert got.code == "another_answer"
        assert f"reached by 60%, but the layers above give 'Italy': p(new) is {p_new:.2f}" in str(got)

    def test_no_reason_for_a_fact_that_is_generated(self, taught, tokenizer, facts) -> None:
        result, after, editor = edited(taught, tokenizer, facts[:1])
        assert after.edits_exact.all() and not has_failed(after)
        assert reasons(result, after, editor) == {}

    def test_a_failure_is_described_by_its_most_frequent_reasons(self, taught, tokenizer, facts) -> None:
        result, after, _ = edited(taught, tokenizer, facts, targets=TargetOptimizer(steps=1, learning_rate=1e-3))
        assert has_failed(after)
        codes = ("target_not_found", "target_not_found", "another_answer", "layers_moved_too_little")
        reason = {
            fact.key: Reason(code, f"figures of {code}", f"advice on {code}")  # type: ignore[arg-type]
            for fact, code in zip(facts, codes, strict=True)
        }
        lines = describe_failure(result, reason).split("\n")
        assert lines[0] == "4 of 4 facts are not generated after the edit:"
        assert lines[1].startswith(f"  2x target not found, such as {facts[0].prompt!r}: figures of target_not_found")
        assert lines[1].endswith("; advice on target_not_found") and len(lines) == 4


def test_the_residual_is_what_the_edit_leaves_of_the_wanted_change(taught, tokenizer, facts) -> None:
    original = copy.deepcopy(taught)
    editor = Editor([0, 1], targets=STRONG, preserve="none", token="last", target_tokens="first", ridge=5.0)
    result = editor.edit(taught, tokenizer, facts)
    prompts = editor.encode(tokenizer, facts).prompts
    hidden = [
        edit_tokens(model, prompts, expert_layers(model)[1], expert_layers(model)[1], pad_id(tokenizer)).hidden
        for model in (original, taught)
    ]
    left = hidden[0] + result.targets.deltas - hidden[1]
    expected = left.norm(dim=-1) / result.targets.deltas.norm(dim=-1)
    assert result.residual is not None and 0.01 < float(expected.max()) < 1
    torch.testing.assert_close(result.residual, expected, rtol=1e-3, atol=1e-4)  # float32, two forwards


class TestProbe:
    def test_an_unchanged_model_is_the_same(self, taught, tokenizer, texts) -> None:
        probe = Probe(tokenizer, texts)
        first, second = probe.measure(taught), probe.measure(taught)
        assert second.perplexity_ratio(first) == 1.0 and second.routing_similarity(first) == 1.0

    def test_another_model_differs(self, taught, tokenizer, texts) -> None:
        probe = Probe(tokenizer, texts)
        before = probe.measure(taught)
        with torch.no_grad():
            for parameter in taught.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        after = probe.measure(taught)
        ratio, similarity = after.perplexity_ratio(before), after.routing_similarity(before)
        assert ratio is not None and ratio > 1.1 and similarity is not None and similarity < 0.95

    def test_only_what_is_asked_for_is_measured(self, taught, tokenizer, texts) -> None:
        state = Probe(tokenizer, texts, perplexity=False).measure(taught)
        assert state.perplexity is None and state.perplexity_ratio(state) is None
        assert Probe(tokenizer, texts, routing=False).measure(taught).routing is None
        with pytest.raises(ValueError, match="there is no probe text"):
            Probe(tokenizer, [])
