"""Evaluation of edits: log-probabilities and greedy answers of prompts, paraphrases and neighbours."""

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
        exact: ``[n]`` bool, whether greedy decoding generates the whole target. It does if every token of the target is
            the most likely one after those before it, so nothing has to be decoded.
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
    """Score targets as continuations of prompts, one target for each prompt.

    The prompts are sharded over the ranks, and the scores all-reduced.

    Raises:
        TooLittleMemoryError: if memory does not suffice for the longest prompt alone.
    """
    ranks = ranks or Ranks.current()
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
    """Return the maximum number of bytes per token in :func:`score`, where logits of a share of the tokens are used."""
    return forward_cost(model, list(expert_layers(model).values())[-1]) + scored * logits_cost(model)


def score_batch(
    model: PreTrainedModel, batch: Sequence[Encoding], pad_token: int, weights: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``log_prob`` and ``exact`` of :class:`Scores` for one batch.

    Args:
        model: the model.
        batch: prompts with targets.
        pad_token: id to pad with.
        weights: tensors by name that replace parameters of the model.
    """
    ids, mask = (x.to(model.device) for x in pad([e.ids[:-1] for e in batch], pad_token, side="left"))
    lengths = [len(e.ids) - e.target_start for e in batch]
    keep = max(lengths)
    labels = torch.tensor([[-1] * (keep - n) + e.ids[-n:] for e, n in zip(batch, lengths, strict=True)]).to(ids.device)
    output = logits(model, ids, mask, position_ids(mask), keep, weights=weights).float().log_softmax(-1)
    # `keep` is longer than the inputs after a prompt of one token; the columns that exist are the last ones
    labels = labels[:, -output.shape[1] :]
    counted = labels >= 0
    picked = output.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    exact = ((output.argmax(-1) == labels) | ~counted).all(-1)
    return (picked * counted).sum(-1) / counted.sum(-1), exact


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        success: the counts from which ``metrics`` are computed.
        neighbours_exact: by fact key, whether the model generates the true answer of each neighbour. A later evaluation
            takes it as its baseline.
        edits_exact: ``[T]``, whether the model generates each fact's new target.
        truths: number of known true answers (of facts and neighbours), and number of those that the model generates.
    """

    success: EditSuccess
    neighbours_exact: dict[str, list[bool]]
    edits_exact: Tensor
    truths: tuple[int, int]

    @property
    def metrics(self) -> dict[str, float]:
        """Results of :class:`~lit_moeedit.metrics.EditSuccess` and ``truth_recalled``, the share of true answers given.

        NaN where nothing was counted.
        """
        known, generated = self.truths
        recalled = generated / known if known else float("nan")
        return {name: float(value) for name, value in self.success.compute().items()} | {"truth_recalled": recalled}


def neighbour_groups(facts: Sequence[Fact]) -> list[str]:
    """Return the groups of the facts' neighbours, sorted."""
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
        baseline: ``neighbours_exact`` of these facts before the edit, for the specificity retained.
        groups: groups of neighbours to report separately; ``None`` for those that occur.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work. Each calls this with the same facts and gets the same result.
    """
    # every rank counts all facts, so there is nothing to reduce
    metric = EditSuccess(groups=neighbour_groups(facts) if groups is None else groups, sync_on_compute=False)
    edits = [(fact.prompt, fact.target_new, fact.target_true) for fact in facts]
    paraphrases = [(text, fact.target_new, fact.target_true) for fact in facts for text in fact.paraphrases]
    neighbours = [(n.prompt, fact.target_new, n.target) for fact in facts for n in fact.neighbours]
    queries = [*edits, *paraphrases, *neighbours]
    # an unknown true target is replaced by the new one, and the score is not used
    rows = [(prompt, new) for prompt, new, _ in queries]
    rows += [(prompt, new if truth is None else truth) for prompt, new, truth in queries]
    index = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    scores = score(model, tokenizer, [row[0] for row in index], [row[1] for row in index], token_budget, ranks)
    places = torch.tensor([index[row] for row in rows], dtype=torch.long).view(2, -1)
    unknown = torch.tensor([truth is None for _, _, truth in queries], dtype=torch.bool)
    (log_new, log_true), (exact_new, exact_true) = scores.log_prob[places], scores.exact[places]
    log_true, exact_true = log_true.masked_fill(unknown, torch.nan), exact_true & ~unknown
    edit, paraphrase, neighbour = torch.arange(len(queries)).split([len(edits), len(paraphrases), len(neighbours)])
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
    neighbours_exact = exact_true[neighbour].split([len(fact.neighbours) for fact in facts])
    known = torch.cat([edit, neighbour])
    known = known[~unknown[known]]
    return Evaluation(
        success=metric,
        neighbours_exact={fact.key: part.tolist() for fact, part in zip(facts, neighbours_exact, strict=True)},
        edits_exact=exact_new[edit],
        truths=(len(known), int(exact_true[known].sum())),
    )


def perplexity(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], ranks: Ranks | None = None) -> float:
    """Measure perplexity on batches of ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.

    Args:
        model: the model.
        batches: the batches of this rank. Their number may differ between ranks.
        ranks: the processes that share the work. Each calls this with its own batches and gets the perplexity on all.

    Raises:
        ValueError: if one of several ranks has no batch at all.
    """
    ranks = ranks or Ranks.current()
    with inference(model):
        metric = Perplexity(ignore_index=IGNORED_LABEL).to(model.device)
        for batch, mine in _in_rounds(batches, ranks):
            ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
            output = logits(model, ids, mask, position_ids(mask), keep=ids.shape[1])
            if mine:
                metric.update(output[:, :-1].float(), labels[:, 1:])
        assert isinstance(metric.total_log_probs, Tensor) and isinstance(metric.count, Tensor)
        totals = torch.stack([metric.total_log_probs, metric.count])
        ranks.all_reduce(totals)
        return float((totals[0] / totals[1]).exp())


def _in_rounds(batches: Iterable[T], ranks: Ranks) -> Iterator[tuple[T, bool]]:
    """Yield this rank's batches, the same number on every rank.

    Unlike in :meth:`~lit_moeedit.sharding.ranks.Ranks.shard`, each rank has batches of its own, and their number is not
    known. A rank that has no more gets its last one again, with ``mine`` false, until all ranks have finished.
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
    """Generate ``tokens`` tokens after each prompt greedily; cut the texts at the end of the first sentence or line."""
    rows = [encoding.ids for encoding in encode(tokenizer, prompts, [""] * len(prompts))]
    ids, mask = (x.to(model.device) for x in pad(rows, pad_id(tokenizer), side="left"))
    length = ids.shape[1]
    with inference(model):
        for _ in range(tokens):
            chosen = logits(model, ids, mask, position_ids(mask), keep=1).argmax(-1)
            ids, mask = torch.cat([ids, chosen], 1), torch.cat([mask, torch.ones_like(chosen)], 1)
    texts = tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
    return [text.split("\n")[0].split(".")[0].strip() for text in texts]
