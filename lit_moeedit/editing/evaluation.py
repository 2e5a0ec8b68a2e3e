"""Evaluation of edits: log-probabilities and exact matches of prompts, paraphrases and neighbours; perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import IGNORED_LABEL, Encoding, encode, pad, pad_id, position_ids, token_batches
from lit_moeedit.data.facts import Fact, validate_facts
from lit_moeedit.editing.by_fact import Interval, intervals, success_by_fact
from lit_moeedit.editing.kv_prefix import logits_at
from lit_moeedit.metrics import EditSuccess
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.padding import longest_padded, unpadded
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
            batches = unpadded(token_batches(lengths, tokens), lengths, longest_padded(model))
            for chosen, mine in ranks.shard(list(batches)):
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
    # nothing is predicted from the last token, but where the length of a row matters, it is that of the whole text
    end = -1 if longest_padded(model) is None else None
    ids, mask = (x.to(model.device) for x in pad([e.ids[:end] for e in batch], pad_token))
    # nothing predicts the first token of a text
    places = [(row, i - 1, e.ids[i]) for row, e in enumerate(batch) for i in range(max(e.target_start, 1), len(e.ids))]
    row, column, label = torch.tensor(places, dtype=torch.long, device=ids.device).view(-1, 3).T
    scores = logits_at(model, ids, mask, position_ids(mask), row, column, weights=weights)
    output = scores.float().log_softmax(-1)
    picked = output.gather(-1, label[:, None]).squeeze(-1)
    counts = torch.bincount(row, minlength=len(batch))
    wrong = torch.zeros_like(counts).index_add(0, row, (output.argmax(-1) != label).long())
    return torch.zeros_like(counts, dtype=picked.dtype).index_add(0, row, picked) / counts, wrong == 0


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        success: the counts from which ``metrics`` are computed.
        neighbours_exact: by fact key, whether the model generates the true answer of each neighbour. A later evaluation
            takes it as its baseline.
        edits_exact: ``[T]``, whether the model generates each fact's new target.
        edits_succeeded: ``[T]``, whether the model prefers each fact's new target to the true one. Of a fact without a
            true one, whether it generates the new target.
        log_new: ``[T]``, mean log-probability of the tokens of each fact's new target, in nats.
        log_true: ``[T]``, the same of the true target; NaN if there is none, or if it is the new one.
        paraphrases_exact: by fact key, whether the model generates the new target after each paraphrase.
        truths: number of known true answers (of facts and neighbours), and number of those that the model generates.
        by_fact: by metric that is a mean over facts, ``[2, T]`` float64: what holds and what counts, fact by fact.
        further: results of further measures by name, see :mod:`lit_moeedit.editing.further`.
    """

    success: EditSuccess
    neighbours_exact: dict[str, list[bool]]
    edits_exact: Tensor
    edits_succeeded: Tensor
    log_new: Tensor
    log_true: Tensor
    paraphrases_exact: dict[str, list[bool]]
    truths: tuple[int, int]
    by_fact: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    further: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """95 % bootstrap intervals of the metrics that are means over facts, where at least two facts count."""
        return intervals(self.by_fact)

    @property
    def metrics(self) -> dict[str, float]:
        """Results of :class:`~lit_moeedit.metrics.EditSuccess` and ``truth_recalled``, the share of true answers given.

        Those of further measures follow. NaN where nothing was counted.
        """
        known, generated = self.truths
        recalled = generated / known if known else float("nan")
        success = {name: float(value) for name, value in self.success.compute().items()}
        return {**success, "truth_recalled": recalled, **self.further}


Tokens = tuple[Tensor, Tensor, Tensor]
"""Ids, mask and labels of a batch, each ``[batch, length]``."""
Query = tuple[str, str, str | None]
"""A prompt, the new target, and the true one; ``None`` if it is not known."""


def _queries(facts: Sequence[Fact]) -> tuple[list[Query], list[Query], list[Query]]:
    """Return the queries of prompts, of paraphrases and of neighbours."""
    edits: list[Query] = [(fact.prompt, fact.target_new, fact.target_true) for fact in facts]
    paraphrases: list[Query] = [
        (text, fact.target_new, fact.target_true) for fact in facts for text in fact.paraphrases
    ]
    neighbours: list[Query] = [(n.prompt, fact.target_new, n.target) for fact in facts for n in fact.neighbours]
    return edits, paraphrases, neighbours


def _rows(queries: Sequence[Query]) -> list[tuple[str, str]]:
    """Return the prompts with their new targets, then the same prompts with their true targets."""
    # an unknown true target is replaced by the new one, and the score is not used
    rows = [(prompt, new) for prompt, new, _ in queries]
    return rows + [(prompt, new if truth is None else truth) for prompt, new, truth in queries]


def check_queries(tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> None:
    """Check that :func:`evaluate` can tokenize everything that it asks about facts.

    Raises:
        ValueError: if a target has no token of its own after one of the prompts.
    """
    rows = dict.fromkeys(_rows([query for part in _queries(facts) for query in part]))
    encode(tokenizer, [prompt for prompt, _ in rows], [target for _, target in rows])


def neighbour_groups(facts: Sequence[Fact]) -> list[str]:
    """Return the groups of the facts' neighbours, sorted."""
    return sorted({neighbour.group for fact in facts for neighbour in fact.neighbours})


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact | Mapping[str, Any]],
    baseline: dict[str, list[bool]] | None = None,
    groups: Sequence[str] | None = None,
    token_budget: Budget = "auto",
    ranks: Ranks | None = None,
) -> Evaluation:
    """Evaluate edits of ``facts``.

    Facts without ``target_true``, and neighbours whose answer is the new target, count for the ``_accuracy`` metrics
    and the specificity retained only: there is nothing to compare.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        facts: the facts, or objects with the keys of a row of a facts file.
        baseline: ``neighbours_exact`` of these facts before the edit, for the specificity retained.
        groups: groups of neighbours to report separately; ``None`` for those that occur.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        ranks: the processes that share the work. Each calls this with the same facts and gets the same result.
    """
    known_facts = [fact for fact in facts if isinstance(fact, Fact)]
    facts = known_facts if len(known_facts) == len(facts) else validate_facts(facts)
    # every rank counts all facts, so there is nothing to reduce
    metric = EditSuccess(groups=neighbour_groups(facts) if groups is None else groups, sync_on_compute=False)
    edits, paraphrases, neighbours = _queries(facts)
    queries = [*edits, *paraphrases, *neighbours]
    rows = _rows(queries)
    index = {row: i for i, row in enumerate(dict.fromkeys(rows))}
    scores = score(model, tokenizer, [row[0] for row in index], [row[1] for row in index], token_budget, ranks)
    places = torch.tensor([index[row] for row in rows], dtype=torch.long).view(2, -1)
    unknown = torch.tensor([truth is None for _, _, truth in queries], dtype=torch.bool)
    # a text is not compared with itself
    alone = torch.tensor([truth in (None, new) for _, new, truth in queries], dtype=torch.bool)
    (log_new, log_true), (exact_new, exact_true) = scores.log_prob[places], scores.exact[places]
    log_true, exact_true = log_true.masked_fill(alone, torch.nan), exact_true & ~unknown
    edit, paraphrase, neighbour = torch.arange(len(queries)).split([len(edits), len(paraphrases), len(neighbours)])
    metric.update("edit", log_new[edit], log_true[edit], exact_new[edit])
    if len(paraphrase):
        metric.update("paraphrase", log_new[paraphrase], log_true[paraphrase], exact_new[paraphrase])
    before = None
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

    parts = {"efficacy": edit, "generalization": paraphrase, "specificity": neighbour}
    right = {"efficacy": exact_new, "generalization": exact_new, "specificity": exact_true}
    preferred = {rate: (log_true > log_new if rate == "specificity" else log_new > log_true) for rate in parts}
    counts = {
        "efficacy": [1] * len(facts),
        "generalization": [len(fact.paraphrases) for fact in facts],
        "specificity": [len(fact.neighbours) for fact in facts],
    }

    def by_fact(exact: Tensor, counts: list[int]) -> dict[str, list[bool]]:
        return {fact.key: part.tolist() for fact, part in zip(facts, exact.split(counts), strict=True)}

    known = torch.cat([edit, neighbour])
    known = known[~unknown[known]]
    return Evaluation(
        success=metric,
        neighbours_exact=by_fact(exact_true[neighbour], counts["specificity"]),
        edits_exact=exact_new[edit],
        edits_succeeded=torch.where(alone, exact_new, log_new > log_true)[edit],
        log_new=log_new[edit],
        log_true=log_true[edit],
        paraphrases_exact=by_fact(exact_new[paraphrase], counts["generalization"]),
        truths=(len(known), int(exact_true[known].sum())),
        by_fact=success_by_fact(
            counts,
            {rate: preferred[rate][part] for rate, part in parts.items()},
            {rate: ~log_true[part].isnan() for rate, part in parts.items()},
            {rate: right[rate][part] for rate, part in parts.items()},
            before,
            [n.group for fact in facts for n in fact.neighbours],
        ),
    )


def perplexity(model: PreTrainedModel, batches: Iterable[Any], ranks: Ranks | None = None) -> float:
    """Measure perplexity on batches of ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, length]``.

    Args:
        model: the model.
        batches: the batches of this rank. Their number may differ between ranks.
        ranks: the processes that share the work. Each calls this with its own batches and gets the perplexity on all.

    Raises:
        ValueError: if a batch is something else, if one of several ranks has no batch at all, or if no token of any
            batch has a label.
    """
    ranks = ranks or Ranks.current()
    with inference(model):
        metric = Perplexity(ignore_index=IGNORED_LABEL).to(model.device)
        # a batch that cannot be used is found before any rank begins the forward, which may be a collective
        found = _unpadded((_tokens(batch, model) for batch in batches), longest_padded(model))
        for (ids, mask, labels), mine in _in_rounds(found, ranks):
            output = logits(model, ids, mask, position_ids(mask), keep=ids.shape[1])
            if mine:
                metric.update(output[:, :-1].float(), labels[:, 1:])
        assert isinstance(metric.total_log_probs, Tensor) and isinstance(metric.count, Tensor)
        totals = torch.stack([metric.total_log_probs, metric.count])
        ranks.all_reduce(totals)
        if not totals[1]:
            raise ValueError("no token of the batches has a label, so there is no perplexity")
        return float((totals[0] / totals[1]).exp())


def _unpadded(batches: Iterable[Tokens], longest: int | None) -> Iterator[Tokens]:
    """Split batches whose rows are padded on the right so that no row of more than ``longest`` tokens is padded."""
    for batch in batches:
        mask = batch[1]
        lengths = mask.sum(1).tolist() if longest is not None else []
        if longest is None or max(lengths, default=0) <= longest or not _is_padded_right(mask):
            yield batch
            continue
        for rows in unpadded([range(len(lengths))], lengths, longest):
            width = max(lengths[row] for row in rows)
            ids, mask, labels = (value[rows, :width] for value in batch)
            yield ids, mask, labels


def _is_padded_right(mask: Tensor) -> bool:
    return bool(mask[:, 0].all() and (mask.diff() <= 0).all())


def _tokens(batch: Any, model: PreTrainedModel) -> Tokens:
    """Return ids, mask and labels of a batch on the model's device.

    Raises:
        ValueError: if the batch is not of this form, or has ids that the model does not embed.
    """
    names = ("input_ids", "attention_mask", "labels")
    form = f"a batch should be a mapping with the tensors {', '.join(names)}, each [batch, length]"
    if not isinstance(batch, Mapping):
        raise ValueError(f"{form}, but is a {type(batch).__name__}")
    found = [batch.get(name) for name in names]
    tensors = [tensor.to(model.device) for tensor in found if isinstance(tensor, Tensor) and tensor.ndim == 2]
    if len(tensors) < len(names) or len({tensor.shape for tensor in tensors}) > 1 or not tensors[0].numel():
        described = (
            f"{name} {list(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
            for name, value in zip(names, found, strict=True)
        )
        raise ValueError(f"{form}, but has {', '.join(described)}")
    ids, mask, labels = tensors
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if (
        ids.is_floating_point()
        or labels.is_floating_point()
        or (size and not 0 <= int(ids.min()) <= int(ids.max()) < size)
    ):
        raise ValueError(f"{form}, with integer ids below the vocabulary's size {size}")
    return ids, mask, labels


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
