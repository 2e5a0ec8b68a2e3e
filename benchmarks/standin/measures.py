"""What a model knows of the stand-in's subjects, how well it predicts other texts, and where it reads facts."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.standin.corpus import HELD_OUT, TEMPLATES, StandIn
from benchmarks.training import Trained
from lit_moeedit.data.corpus import Statement
from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, encode, join, pad, pad_id, token_ids
from lit_moeedit.editing.evaluation import perplexity, score
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import inference

KNOWN, CANDIDATES = 100, 200
"""Number of facts that are edited, and of those from which the ones that the model generates are taken."""
CONTEXT_TOKENS = 10
"""Number of tokens that a model adds to the first word of a context."""
WORDINGS = ("in training", "held out")


def corpus_of(found: Trained) -> StandIn:
    """The corpus of a trained model, which is the stand-in's."""
    assert isinstance(found.data.corpus, StandIn)
    return found.data.corpus


def keep_known(found: Trained, count: int) -> float:
    """Let only facts that the model generates be edited, ``count`` at most. Returns the share of known candidates."""
    facts = corpus_of(found).edits
    exact = score(found.model, found.tokenizer, [f.prompt for f in facts], [f.target_true or "" for f in facts]).exact
    known = [fact for fact, right in zip(facts, exact.tolist(), strict=True) if right]
    corpus_of(found).edits = known[:count]
    return len(known) / len(facts)


def recall(found: Trained) -> dict[str, dict[str, float]]:
    """Share of facts that the model generates: by relation, for wordings of its own texts and for held-out ones."""
    asked = [
        (relation, WORDINGS[place < HELD_OUT], prompt, subject.facts[relation])
        for subject in corpus_of(found).subjects
        for relation in subject.facts
        for place, prompt in enumerate(corpus_of(found).prompts(subject, relation))
    ]
    exact = score(found.model, found.tokenizer, [a[2] for a in asked], [a[3] for a in asked]).exact
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for (relation, wording, *_), one in zip(asked, exact.tolist(), strict=True):
        right[relation, wording].append(one)
        right["all", wording].append(one)
    return {
        relation: {wording: sum(right[relation, wording]) / len(right[relation, wording]) for wording in WORDINGS}
        for relation in (*(name for name in TEMPLATES if (name, WORDINGS[0]) in right), "all")
    }


def perplexities(found: Trained) -> dict[str, float]:
    """Perplexity of held-out texts about the subjects, and of held-out definitions, over all tokens."""
    names = {subject.name for subject in corpus_of(found).subjects}
    parts: dict[str, list[Statement]] = {"texts about the subjects": [], "definitions": []}
    for statement in corpus_of(found).validation:
        parts["texts about the subjects" if statement.fact in names else "definitions"].append(statement)

    def batches(statements: Sequence[Statement]) -> Iterator[dict[str, Tensor]]:
        rows = token_ids(found.tokenizer, [join(statement.prompt, statement.target) for statement in statements])
        for start in range(0, len(rows), 32):
            ids, mask = pad(rows[start : start + 32], pad_id(found.tokenizer))
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED_LABEL)}

    return {name: perplexity(found.model, batches(part)) for name, part in parts.items()}


def swaps(found: Trained, cases: int = 200, seed: int = 0) -> dict[str, dict[int, float]]:
    """Tell where a fact is read: give a prompt the hidden state that another subject has in its place.

    Returns:
        By token (``subject_last`` or ``last``) and layer, the share of prompts that are answered as the other subject's
        if the output of that layer at that token is exchanged. Both prompts are answered right before. The last layer
        is left out.
    """
    layers = {i: layer.layer for i, layer in expert_layers(found.model).items()}
    indices = list(layers)[:-1]
    right: dict[str, dict[int, list[bool]]] = {token: {i: [] for i in indices} for token in ("subject_last", "last")}
    with inference(found.model):
        for one, other in _pairs(found, cases, seed):
            ids, others = (torch.tensor([x.ids[: x.target_start]]) for x in (one, other))
            truth, wanted = one.ids[one.target_start], other.ids[other.target_start]
            given = found.model(others, output_hidden_states=True, use_cache=False)
            if given.logits[0, -1].argmax() != wanted or found.model(ids).logits[0, -1].argmax() != truth:
                continue
            for token, place in (("subject_last", one.edit_token), ("last", len(ids[0]) - 1)):
                assert place is not None
                for i in indices:
                    handle = layers[i].register_forward_hook(_exchange(place, given.hidden_states[i + 1][0, place]))
                    try:
                        answer = found.model(ids, use_cache=False).logits[0, -1].argmax()
                    finally:
                        handle.remove()
                    right[token][i].append(bool(answer == wanted))
    return {token: {i: sum(x) / max(1, len(x)) for i, x in by_layer.items()} for token, by_layer in right.items()}


def generated_contexts(found: Trained, count: int, seed: int = 0) -> list[str]:
    """Let a model go on from first words of its texts: contexts for edits that it writes itself, as in MEMIT.

    Each token is one of the five most likely ones, drawn by their likelihood. None of the texts names a subject that is
    edited, or that a neighbour asks for: what is measured is not edited on.
    """
    words = sorted({text.split()[0] for text in found.data.preservation_texts()})
    random.Random(seed).shuffle(words)
    facts = found.data.edit_facts()
    prompts = [*(fact.prompt for fact in facts), *(other.prompt for fact in facts for other in fact.neighbours)]
    asked = [s.name for s in corpus_of(found).subjects if any(s.name in prompt for prompt in prompts)]
    generator, texts = torch.Generator().manual_seed(seed), list[str]()
    with inference(found.model):
        for opening in words:
            if len(texts) == count:
                break
            ids = encode(found.tokenizer, [opening], [""])[0].ids
            for _ in range(CONTEXT_TOKENS):
                likely = found.model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(5)
                ids = [*ids, int(likely.indices[torch.multinomial(likely.values.softmax(0), 1, generator=generator)])]
            text = found.tokenizer.decode(ids, skip_special_tokens=True).strip().removesuffix(".") + "."
            if not any(name in text for name in asked):
                texts.append(text)
    return texts


def trained_on(found: Trained, model: PreTrainedModel, steps: int, rate: float) -> None:
    """Train a model on for some steps, on the texts of the subjects that are not edited, with a fresh AdamW."""
    found.data.facts_edited(found.data.edit_facts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for batch in itertools.islice(found.data.train_dataloader(), steps):
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _pairs(found: Trained, count: int, seed: int) -> Iterator[tuple[Encoding, Encoding]]:
    """Prompts about two subjects with different answers and as many tokens, which do not end with the subject."""
    rng, subjects = random.Random(seed), corpus_of(found).subjects
    for _ in range(50 * count):
        relation = rng.choice(list(TEMPLATES))
        pair = rng.sample([subject for subject in subjects if relation in subject.facts], 2)
        prompts = [rng.choice(TEMPLATES[relation]).format("{}")] * 2
        texts = [prompt.format(subject.name) for prompt, subject in zip(prompts, pair, strict=True)]
        answers = [subject.facts[relation] for subject in pair]
        one, other = encode(found.tokenizer, texts, answers, [subject.name for subject in pair])
        same_answer = one.ids[one.target_start] == other.ids[other.target_start]
        if same_answer or (one.target_start, one.edit_token) != (other.target_start, other.edit_token):
            continue
        if one.edit_token == one.target_start - 1:
            continue
        yield one, other
        count -= 1
        if not count:
            return


def _exchange(place: int, state: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, place] = state
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook
