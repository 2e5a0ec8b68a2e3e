"""The causal trace: the same as a loop of single forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moeedit.data.facts import Fact
from lit_moeedit.editing import Trace, trace
from lit_moeedit.editing.locating.corruption import TracedFact, corrupt
from lit_moeedit.editing.locating.tracing import NOISE, spread
from lit_moeedit.models.experts import expert_layers

FACTS = [
    Fact("Rome", "The city of Rome lies in", "Spain", "Italy"),
    Fact("Oslo", "People who live in Oslo speak", "Latin", "Norwegian"),
    Fact("Lake Ladoga", "Lake Ladoga is found in", "northern Peru", "Russia"),
    Fact("the Nile", "The longest river, the Nile, flows into the", "Baltic Sea"),
    Fact("Antananarivo on Madagascar", "Antananarivo on Madagascar is in", "Peru"),
]


class Single:
    """One forward at a time, of one row, with hooks put on by hand."""

    def __init__(self, model: PreTrainedModel, facts: Sequence[TracedFact]) -> None:
        self.model, self.facts = model.eval(), facts
        self.experts = [layer.experts for layer in expert_layers(model).values()]
        self.outputs = [self.recorded(fact) for fact in facts]
        embedded = [
            self.model.get_input_embeddings()(torch.tensor(fact.clean.ids))[list(fact.subject)] for fact in facts
        ]
        self.deviation, self.width = torch.cat(embedded).std(), embedded[0].shape[-1]

    def recorded(self, fact: TracedFact) -> list[Tensor]:
        kept: list[Tensor] = []
        handles = [e.register_forward_hook(lambda m, a, out: kept.append(out.clone())) for e in self.experts]
        self.model(torch.tensor([fact.clean.ids]))
        for handle in handles:
            handle.remove()
        return kept

    def probability(self, number: int, ids: list[int], noise: bool, restored: range, place: int) -> float:
        fact, handles = self.facts[number], []
        if noise:
            drawn = torch.randn(len(fact.subject), self.width, generator=torch.Generator().manual_seed(number))

            def shift(module: Any, args: Any, output: Tensor) -> Tensor:
                output = output.clone()
                output[0, list(fact.subject)] += NOISE * self.deviation * drawn
                return output

            handles.append(self.model.get_input_embeddings().register_forward_hook(shift))
        for layer in restored:

            def restore(module: Any, args: Any, output: Tensor, layer: int = layer) -> Tensor:
                output = output.clone()
                output[place] = self.outputs[number][layer][place]
                return output

            handles.append(self.experts[layer].register_forward_hook(restore))
        scores = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        start = fact.clean.target_start
        return float(torch.stack([scores[i - 1, ids[i]] for i in range(start, len(ids))]).mean().exp())

    @torch.no_grad()
    def table(self) -> Tensor:
        count, layers = range(len(self.facts)), len(self.experts)
        clean = sum(self.probability(n, self.facts[n].clean.ids, False, range(0), 0) for n in count)
        rows = [(n, self.facts[n].corrupted.ids, self.facts[n].needs_noise) for n in count]
        corrupted = sum(self.probability(*row, range(0), 0) for row in rows)

        def share(window: int, token: int, layer: int) -> float:
            restored = range(max(0, layer - window // 2), min(layers, layer + window // 2 + 1))
            found = sum(self.probability(*row, restored, self.facts[row[0]].places[token]) for row in rows)
            return (found - corrupted) / (clean - corrupted)

        return torch.tensor([[[share(w, t, i) for i in range(layers)] for t in (0, 1)] for w in (1, 3)])


def answered(model: PreTrainedModel, tokenizer: Any) -> list[TracedFact]:
    """The facts with the model's own answers; a random model generates no truth."""
    found = []
    with torch.no_grad():
        for fact in corrupt(tokenizer, FACTS):
            ids = fact.clean.ids[: fact.clean.target_start]
            found.append(fact.answered(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax())))
    return found


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3_moe",
        "gpt_oss",
        "deepseek_v3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "olmoe")),
    ],
)
def test_it_is_that_of_single_forwards(model_type: str, make_model: Any, tokenizer: Any, unchanged: Any) -> None:
    model = make_model(model_type)
    expected = Single(make_model(model_type), answered(make_model(model_type), tokenizer)).table()
    unchanged(model)
    found = trace(model, tokenizer, FACTS, token_budget=100)
    assert found.own_answers == len(FACTS) and 0 < found.noised < len(FACTS)
    assert found.layers == tuple(expert_layers(model))
    assert expected.abs().max() > 0.05
    # sums of float32 in batches of other shapes
    torch.testing.assert_close(found.restored, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_ends_with_its_subject_has_one_token_for_both_kinds(make_model: Any, tokenizer: Any) -> None:
    facts = [Fact("Rome", "The city of Rome", "Spain"), Fact("Oslo", "The city of Oslo", "Peru")]
    found = trace(make_model("qwen3_moe"), tokenizer, facts)
    torch.testing.assert_close(found.restored[:, 0], found.restored[:, 1], rtol=1e-4, atol=1e-5)


def test_known_truths_are_traced(taught: PreTrainedModel, tokenizer: Any, facts: Any) -> None:
    found = trace(taught, tokenizer, facts)
    # the last fact has no known truth
    assert found.own_answers == 1 and found.clean > 0.5 > found.corrupted
    assert found.to_dict()["restored"]["last"]["1"] == found.restored[0, 1].tolist()


class TestCorruption:
    def test_only_the_subject_changes(self, tokenizer: Any) -> None:
        for fact in corrupt(tokenizer, FACTS):
            changed = [i for i, (a, b) in enumerate(zip(fact.clean.ids, fact.corrupted.ids, strict=True)) if a != b]
            assert set(changed) <= set(fact.subject) and bool(changed) is not fact.needs_noise

    def test_a_subject_alone_is_noised(self, tokenizer: Any) -> None:
        assert [fact.needs_noise for fact in corrupt(tokenizer, FACTS[:1])] == [True]

    def test_subjects_with_the_same_answer_do_not_take_each_others_place(self, tokenizer: Any) -> None:
        facts = [Fact("Rome", "Rome lies in", "Spain", "Italy"), Fact("Oslo", "Oslo lies in", "Peru", "Italy")]
        assert all(fact.needs_noise for fact in corrupt(tokenizer, facts))


def test_no_facts(model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no fact to trace"):
        trace(model, tokenizer, [])


def test_facts_are_spread(make_model: Any, tokenizer: Any) -> None:
    found: Trace = trace(make_model("qwen3_moe"), tokenizer, FACTS, max_facts=2)
    assert found.facts == 2 and spread(100, 4) == [0, 25, 50, 75]
