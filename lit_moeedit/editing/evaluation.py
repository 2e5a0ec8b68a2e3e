"""How well facts are edited: log-probabilities and greedy answers of prompts, paraphrases and neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, encode, pad, pad_id, position_ids, token_batches
from lit_moeedit.data.facts import Fact
from lit_moeedit.metrics import EditSuccess
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import inference, logits
from lit_moeedit.models.token_budget import Budget, TokenBudget, forward_cost, logits_cost
from lit_moeedit.sharding.ranks import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """Scores of ``n`` completions.

    Attributes:
        log_prob: ``[n]`` float32, mean log-probability of the target's tokens, in nats.
        exact: ``[n]`` bool, whether greedy decoding says the whole target. (It does if every token of the target is the
            most likely one after the ones before it, so no decoding is needed.)
    """

    log_prob: Tensor
    exact: Tensor


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
) -> Scores:
    """Score targets as continuations of prompts, ``n`` of both; dealt to the ranks, each gets the result for all.

    Raises:
        TooLittleMemoryError: if there is no memory for the longest prompt alone.
    """
    ranks = ranks if ranks is not None else Ranks()
    encodings = encode(tokenizer, prompts, targets)
    lengths = [len(e.ids) for e in encodings]

    def run(tokens: int) -> Scores:
        with inference(model):
            log_prob, exact = torch.zeros(len(encodings)), torch.zeros(len(encodings), dtype=torch.uint8)
            for chosen, mine in ranks.shard(list(token_batches(lengths, tokens))):
                found = score_batch(model, [encodings[i] for i in chosen], pad_id(tokenizer))
                if mine:
                    log_prob[chosen], exact[chosen] = found[0].cpu(), found[1].byte().cpu()
            ranks.check_errors()
            ranks.all_reduce(log_prob, exact)
        return Scores(log_prob, exact.bool())

    if not encodings:
        return run(1)
    scored = max(length - e.target_start for length, e in zip(lengths, encodings, strict=True))
    budget = TokenBudget(token_budget, scoring_cost(model, scored / min(lengths)), model.device, ranks)
    return budget.run("evaluation", run, least=max(lengths), most=max(lengths) * len(lengths))


def scoring_cost(model: PreTrainedModel, scored: float) -> float:
    """Bytes that a token takes at most in :func:`score`, if so many of its logits are wanted (a share)."""
    return forward_cost(model, list(expert_layers(model).values())[-1]) + scored * logits_cost(model)


def score_batch(
    model: PreTrainedModel, batch: Sequence[Encoding], pad_token: int, weights: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``log_prob`` and ``exact`` of :class:`Scores` for one batch; ``weights`` stand in for the model's parameters."""
    ids, mask = (x.to(model.device) for x in pad([e.ids[:-1] for e in batch], pad_token, side="left"))
    lengths = [len(e.ids) - e.target_start for e in batch]
    keep = max(lengths)
    labels = torch.tensor([[-1] * (keep - n) + e.ids[-n:] for e, n in zip(batch, lengths, strict=True)]).to(ids.device)
    output = logits(model, ids, mask, position_ids(mask), keep, weights=weights).float().log_softmax(-1)
    # a keep longer than the inputs happens with a prompt of one token; the columns that exist are the last ones
    labels = labels[:, -output.shape[1] :]
    counted = labels >= 0
    picked = output.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    right = (output.argmax(-1) == labels) | ~counted
    return (picked * counted).sum(-1) / counted.sum(-1), right.all(-1)


@dataclass(frozen=True)
class Evaluation:
    """How well facts are edited at one moment.

    Attributes:
        success: the counts behind ``metrics``.
        neighbours_exact: by fact key, whether the truth of each of its neighbours is said; the baseline of what is
            retained later.
        edits_exact: ``[T]``, whether each fact's new target is said.
        truths: how many true answers were asked for (of the facts and their neighbours), and how many were said.
    """

    success: EditSuccess
    neighbours_exact: dict[str, list[bool]]
    edits_exact: Tensor
    truths: tuple[int, int]

    @property
    def metrics(self) -> dict[str, float]:
        """Results of :class:`~lit_moeedit.metrics.EditSuccess`, and ``truth_recalled``, the share of true answers said.

        Not a number where nothing was counted.
        """
        asked, said = self.truths
        recalled = said / asked if asked else float("nan")
        return {name: float(value) for name, value in self.success.compute().items()} | {"truth_recalled": recalled}


def neighbour_groups(facts: Sequence[Fact]) -> list[str]:
    """Groups of the facts' neighbours, sorted."""
    return sorted({neighbour.group for fact in facts for neighbour in fact.neighbours})


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    baseline: dict[str, list[bool]] | None = None,
    groups: Sequence[str] | None = None,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
) -> Evaluation:
    """Evaluate edits of ``facts``.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: the facts.
        baseline: ``neighbours_exact`` of these facts before the edit, for what neighbours retained.
        groups: groups of neighbours to tell apart; ``None`` for those that occur.
        token_budget: largest number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work; each calls this with the same facts and gets the same result.
    """
    # every rank counts all facts, so there is nothing to add up
    metric = EditSuccess(groups=neighbour_groups(facts) if groups is None else groups, sync_on_compute=False)
    edits = [(fact.prompt, fact.target_new, fact.target_true) for fact in facts]
    paraphrases = [(text, fact.target_new, fact.target_true) for fact in facts for text in fact.paraphrases]
    neighbours = [(n.prompt, fact.target_new, n.target) for fact in facts for n in fact.neighbours]
    asked = [*edits, *paraphrases, *neighbours]
    new = [(prompt, target_new) for prompt, target_new, _ in asked]
    # without a known truth the new target stands in, and its score is not used
    true = [(prompt, target_new if truth is None else truth) for prompt, target_new, truth in asked]
    index = {row: i for i, row in enumerate(dict.fromkeys([*new, *true]))}
    prompts, targets = [prompt for prompt, _ in index], [target for _, target in index]
    scores = score(model, tokenizer, prompts, targets, token_budget, ranks)
    at_new = torch.tensor([index[row] for row in new], dtype=torch.long)
    at_true = torch.tensor([index[row] for row in true], dtype=torch.long)
    unknown = torch.tensor([truth is None for _, _, truth in asked], dtype=torch.bool)
    log_new, log_true = scores.log_prob[at_new], scores.log_prob[at_true].masked_fill(unknown, torch.nan)
    exact_new, exact_true = scores.exact[at_new], scores.exact[at_true] & ~unknown
    edit, paraphrase, neighbour = torch.arange(len(asked)).split([len(edits), len(paraphrases), len(neighbours)])
    metric.update("edit", log_new[edit], log_true[edit], exact_new[edit])
    if len(paraphrase):
        metric.update("paraphrase", log_new[paraphrase], log_true[paraphrase], exact_new[paraphrase])
    if len(neighbour):
        before = None if baseline is None else torch.tensor([e for fact in facts for e in baseline[fact.key]])
        metric.update(
            "neighbour",
            log_new[neighbour],
            log_true[neighbour],
            exact_true[neighbour],
            exact_before=before,
            groups=[n.group for fact in facts for n in fact.neighbours],
        )
    said = exact_true[neighbour].split([len(fact.neighbours) for fact in facts])
    known = torch.cat([edit, neighbour])
    known = known[~unknown[known]]
    return Evaluation(
        success=metric,
        neighbours_exact={fact.key: part.tolist() for fact, part in zip(facts, said, strict=True)},
        edits_exact=exact_new[edit],
        truths=(len(known), int(exact_true[known].sum())),
    )


def perplexity(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], ranks: Ranks | None = None) -> float:
    """Perplexity on batches of ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.

    Args:
        model: the model.
        batches: of this rank; as many or fewer than the others have.
        ranks: the processes; each calls this with its own batches and gets the perplexity on all of them.

    Raises:
        ValueError: if a rank of several has no batch at all.
    """
    ranks = ranks if ranks is not None else Ranks()
    with inference(model):
        metric = Perplexity(ignore_index=IGNORED_LABEL).to(model.device)
        for batch, mine in _in_step(batches, ranks):
            ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
            output = logits(model, ids, mask, position_ids(mask), keep=ids.shape[1])
            if mine:
                metric.update(output[:, :-1].float(), labels[:, 1:])
        assert isinstance(metric.total_log_probs, Tensor) and isinstance(metric.count, Tensor)
        totals = torch.stack([metric.total_log_probs, metric.count])
        ranks.all_reduce(totals)
        return float((totals[0] / totals[1]).exp())


def _in_step(batches: Iterable[T], ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """This rank's batches with ``mine`` true, then its last one with ``mine`` false while others still have some.

    Before each the ranks agree that none has failed, as in :meth:`~lit_moeedit.sharding.ranks.Ranks.shard`; here the
    batches differ, and nobody knows how many there are.
    """
    iterator, last = iter(batches), None
    while True:
        batch = next(iterator, None)
        if not ranks.any(batch is not None):
            return
        if last is None and ranks.any(batch is None):
            raise ValueError("a rank has no batch, while others have some")
        last = batch if batch is not None else last
        assert last is not None
        yield last, batch is not None


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int = 6
) -> list[str]:
    """Greedy continuations of the prompts by ``tokens`` tokens each, cut at the first sentence or line end."""
    rows = [encoding.ids for encoding in encode(tokenizer, prompts, [""] * len(prompts))]
    ids, mask = (x.to(model.device) for x in pad(rows, pad_id(tokenizer), side="left"))
    length = ids.shape[1]
    with inference(model):
        for _ in range(tokens):
            chosen = logits(model, ids, mask, position_ids(mask), keep=1).argmax(-1)
            ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    return [text.split("\n")[0].split(".")[0].strip() for text in texts]
