"""A tiny model that has learned the facts, and what a plain forward of transformers says about it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.encoding import Encoding, encode, join
from lit_moeedit.data.facts import Fact


@pytest.fixture(scope="session")
def _taught(make_model, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], texts: list[str]) -> PreTrainedModel:
    sentences = [join(prompt, fact.target_true) for fact in facts if fact.target_true
                 for prompt in (fact.prompt, *fact.paraphrases)]  # fmt: skip
    sentences += [join(n.prompt, n.target) for fact in facts for n in fact.neighbours if n.group == "near"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model("qwen3_moe", initializer_range=0.1)
        model.init_weights()
        batch = tokenizer(sentences + texts[:4], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(60):
            optimizer.zero_grad()
            loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model


@pytest.fixture
def taught(_taught: PreTrainedModel) -> PreTrainedModel:
    """A qwen3_moe that says the truth of the facts with a known one, in training mode; a fresh copy for every test."""
    return copy.deepcopy(_taught)


@pytest.fixture
def encoded(tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> list[Encoding]:
    """The facts' prompts, with the last token of the subject as edit token and without a target."""
    return encode(tokenizer, [f.prompt for f in facts], [""] * len(facts), [f.subject for f in facts])


@pytest.fixture(scope="session")
def plain_hidden() -> Callable[[PreTrainedModel, int, list[int]], Tensor]:
    """``plain_hidden(model, layer, ids)``: output ``[length, d_model]`` of a decoder layer (not the last one, behind
    which transformers applies a norm) for one text, without padding, in evaluation mode."""

    @torch.no_grad()
    def hidden(model: PreTrainedModel, layer: int, ids: list[int]) -> Tensor:
        modes = {module: module.training for module in model.modules()}
        output = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        for module, training in modes.items():
            module.training = training
        return output.hidden_states[layer + 1][0]

    return hidden
