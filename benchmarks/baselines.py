"""What editors are compared with besides fine-tuning: the new fact in the prompt, and adapters trained on the facts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.training import QUALITY, Trained, shares_by_fact
from lit_moeedit.data import Fact
from lit_moeedit.data.encoding import join, pad_id
from lit_moeedit.editing import Evaluation, FineTuning, evaluate
from lit_moeedit.editing.evaluation import score_batch
from lit_moeedit.editing.target_rows import EncodedFacts

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def in_context(found: Trained) -> dict[str, Any]:
    """Measure the unedited model with each fact stated before its prompt, paraphrases and neighbours' prompts.

    What is measured on other texts is ``None``, because nothing is stated there and no weight changes.
    """
    before = evaluate(found.model, found.tokenizer, found.data.edit_facts())
    told, evaluation = asked_in_context(found, before)
    unknown = dict.fromkeys(QUALITY)
    return {
        **unknown,
        **evaluation.metrics,
        "by_fact": shares_by_fact(evaluation, told),
        "recalled_before": before.metrics["truth_recalled"],
        "seconds": {},
    }


def asked_in_context(found: Trained, before: Evaluation) -> tuple[list[Fact], Evaluation]:
    """Ask the unedited model with each fact stated before everything; returns the facts as they are asked, too."""
    facts = found.data.edit_facts()
    told = [stated(fact) for fact in facts]
    # a neighbour counts as retained if its answer was right without the statement
    baseline = {new.key: before.neighbours_exact[fact.key] for new, fact in zip(told, facts, strict=True)}
    return told, evaluate(found.model, found.tokenizer, told, baseline)


def stated(fact: Fact) -> Fact:
    """Return the fact with its statement before everything that is asked about it."""
    statement = f"{join(fact.prompt, fact.target_new)}."

    def after(prompt: str) -> str:
        return f"{statement} {prompt}"

    neighbours = tuple(replace(neighbour, prompt=after(neighbour.prompt)) for neighbour in fact.neighbours)
    paraphrases = tuple(map(after, fact.paraphrases))
    probes = tuple(replace(probe, prompt=after(probe.prompt)) for probe in fact.probes)
    return replace(fact, prompt=after(fact.prompt), paraphrases=paraphrases, neighbours=neighbours, probes=probes)


def train_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    settings: FineTuning,
    rank: int = 8,
) -> dict[str, float]:
    """Train LoRA adapters of all attention projections until the model says the targets, and merge them.

    The adapters' first weights are the same whenever they are drawn.

    Args:
        model: the model, whose weights have the merged adapters at the end.
        tokenizer: its tokenizer.
        facts: what to train on, all in one batch.
        settings: contexts, steps, learning rate and the loss at which training ends.
        rank: rank of the adapters.
    """
    start = time.perf_counter()
    rows = EncodedFacts.of(tokenizer, facts, settings.contexts, neutral="", token="last").rows
    texts = [row.encoding for row in rows]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ATTENTION)))
    adapters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(adapters, settings.learning_rate)
    model.eval()
    for step in range(settings.steps + 1):
        nll = -score_batch(model, texts, pad_id(tokenizer))[0].mean()
        if step == settings.steps or float(nll.detach()) <= settings.stop:
            break
        optimizer.zero_grad()
        nll.backward()
        optimizer.step()
    trained = time.perf_counter()
    adapted.merge_and_unload()
    end = time.perf_counter()
    return {"solve": trained - start, "commit": end - trained, "edit": end - start}
