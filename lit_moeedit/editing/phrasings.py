"""Further prompts about the subject of a fact, in the words of other facts: those that ask for it, and the others."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken, encode, subject_span
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.evaluation import score
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.sharding.ranks import Ranks

CANDIDATES = 4
"""Number of prompts that are tried for each one that may be taken."""


def candidate_prompts(facts: Sequence[Fact], count: int, measured: Sequence[Fact] = ()) -> list[list[str]]:
    """Put the subject of each fact into the prompts of other facts, ``count`` of them at most, drawn by its key.

    No candidate is a prompt, a paraphrase, a neighbour or a probe of any of the facts, or of others that are measured:
    prompts have their own targets, neighbours must stay as they are, and paraphrases and probes are left to measure.

    Example:
        >>> facts = [Fact("Rome", "Rome lies in", "Spain"), Fact("Oslo", "People in Oslo speak", "Thai")]
        >>> candidate_prompts(facts, 3)
        [['People in Rome speak'], ['Oslo lies in']]
    """
    # a prompt is whole, with what may be in front of its sentence, such as the header of a chat template
    phrasings = sorted({_around(fact) for fact in facts if fact.subject in fact.prompt})
    known = set()
    for fact in (*facts, *measured):
        known |= {fact.prompt, *fact.paraphrases}
        known |= {one.prompt for one in fact.neighbours} | {probe.prompt for probe in fact.probes}
    found = []
    for fact in facts:
        # a few more than are needed, because some are known
        drawn = random.Random(fact.key).sample(phrasings, min(len(phrasings), 2 * count + 1))
        texts = (before + fact.subject + after for before, after in drawn)
        # a phrasing that names this subject already asks for something between it and itself
        found.append([text for text in texts if text not in known and text.count(fact.subject) == 1][:count])
    return found


def _around(fact: Fact) -> tuple[str, str]:
    """Return what is before and after the subject in a fact's prompt."""
    start, end = subject_span(fact.prompt, fact.subject)
    return fact.prompt[:start], fact.prompt[end:]


def further_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    count: int,
    token: EditToken = "subject_last",
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
    measured: Sequence[Fact] = (),
) -> list[list[str]]:
    """Find up to ``count`` further prompts of each fact: those of its candidates whose answer is the fact's truth.

    The model itself decides which prompts ask for a fact: those that it answers with ``target_true``, the most certain
    ones first. A fact without a truth has none.

    Args:
        model: the model, before the edit.
        tokenizer: its tokenizer.
        facts: the facts.
        count: maximum number of prompts of each fact.
        token: the edit token, which a prompt must have.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work. Each calls this with the same facts and gets the same prompts.
        measured: other facts of which no text is a candidate.
    """
    candidates = candidate_prompts(facts, CANDIDATES * count, measured)
    by_fact = _answers(model, tokenizer, facts, candidates, token, token_budget, ranks)
    answered = [sorted((-log_prob, text) for log_prob, text, is_exact in own if is_exact) for own in by_fact]
    return [[text for _, text in own[:count]] for own in answered]


def neutral_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    count: int,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
    measured: Sequence[Fact] = (),
) -> list[list[str]]:
    """Find up to ``count`` prompts that ask for something else about each fact's subject.

    They are those of its candidates that the model answers otherwise than with ``target_true``, the one that makes this
    answer the least likely first. This tells something only where the model answers the fact's own prompt with it, so
    other facts, and those without a truth, have none. The arguments are those of :func:`further_prompts`; each prompt
    has a last token of the subject.
    """
    candidates = candidate_prompts(facts, CANDIDATES * count, measured)
    texts = [[fact.prompt, *own] for fact, own in zip(facts, candidates, strict=True)]
    by_fact = _answers(model, tokenizer, facts, texts, "subject_last", token_budget, ranks)
    said = [{text for _, text, is_exact in own if is_exact} for own in by_fact]
    others = [sorted((log_prob, text) for log_prob, text, is_exact in own if not is_exact) for own in by_fact]
    return [
        [text for _, text in own[:count]] if fact.prompt in exact else []
        for fact, own, exact in zip(facts, others, said, strict=True)
    ]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    by_fact: Sequence[Sequence[str]],
    token: EditToken,
    token_budget: Budget,
    ranks: Ranks | None,
) -> list[list[tuple[float, str, bool]]]:
    """Ask a model: the log-probability of a fact's truth after each of its texts, the text, and whether it says it."""
    pairs = [(index, text) for index, texts in enumerate(by_fact) if facts[index].target_true for text in texts]
    if not _can_be_encoded(tokenizer, facts, pairs, token):
        pairs = [pair for pair in pairs if _can_be_encoded(tokenizer, facts, [pair], token)]
    truths = [facts[index].target_true or "" for index, _ in pairs]
    scores = score(model, tokenizer, [text for _, text in pairs], truths, token_budget, ranks)
    found: list[list[tuple[float, str, bool]]] = [[] for _ in facts]
    for (index, text), log_prob, is_exact in zip(pairs, scores.log_prob.tolist(), scores.exact.tolist(), strict=True):
        found[index].append((log_prob, text, is_exact))
    return found


def _can_be_encoded(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], pairs: Sequence[tuple[int, str]], token: EditToken
) -> bool:
    """Tell if all pairs of a fact's index and a prompt have an edit token, and tokens of both targets."""
    texts, subjects = [text for _, text in pairs], [facts[index].subject for index, _ in pairs]
    try:
        for targets in (
            [facts[index].target_new for index, _ in pairs],
            [facts[index].target_true or "" for index, _ in pairs],
        ):
            encode(tokenizer, texts, targets, subjects, token)
    except ValueError:  # a prompt that nobody wrote is no error
        return False
    return True
