"""Further measures of edits, which are made if they are asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import encode, subject_span
from lit_moeedit.data.facts import Fact
from lit_moeedit.data.formats import PLACEHOLDER
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.editing.by_fact import sums_by_fact
from lit_moeedit.editing.copying import copied
from lit_moeedit.editing.evaluation import Evaluation, score
from lit_moeedit.editing.generation import answers
from lit_moeedit.editing.job import EditResult
from lit_moeedit.editing.probe import Probe
from lit_moeedit.editing.routing_trace import MAX_PROBE_TOKENS, trace_routing
from lit_moeedit.metrics import (
    GenerationMatch,
    ProbabilityGap,
    RoutingSimilarity,
    copy_accuracy,
    generation_match,
    ngram_entropy,
    probability_gap,
    probe_accuracy,
    weight_growth,
)
from lit_moeedit.metrics.gap import _probability_gap_update
from lit_moeedit.metrics.generation import _generation_match_update, _ngram_entropy_update
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.sharding.expert_norms import expert_norms
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.text import nearest

Measure = Literal[
    "generation",
    "fluency",
    "portability",
    "multi_hop",
    "reversed",
    "probability_gap",
    "general_ability",
    "weight_growth",
    "null_space_rank",
    "template_routing",
]
MEASURES: tuple[Measure, ...] = get_args(Measure)
FLUENCY_TOKENS = 100
"""Number of tokens generated for the fluency, as in MEMIT; a text may end earlier."""
STATEMENTS = "held_out_accuracy"
"""The metric whose facts are the held-out ones, and not those of the edit."""
MAX_STATEMENTS = 512
"""Maximum number of held-out statements that are asked."""


def check_measures(names: Sequence[str]) -> tuple[Measure, ...]:
    """Return names of measures in their own order, each once.

    Raises:
        ValueError: if a name is unknown.

    Example:
        >>> check_measures(["fluency", "generation"])
        ('generation', 'fluency')
    """
    if isinstance(names, str):
        raise ValueError(f"measure must be a list of names, such as [{names}], got {names!r}")
    for name in names:
        if name not in MEASURES:
            near = nearest(str(name), MEASURES)
            raise ValueError(f"measure has {name!r}{near}; expected some of {', '.join(MEASURES)}")
    return tuple(name for name in MEASURES if name in names)


@dataclass(frozen=True)
class HeldOut:
    """Statements and texts that no edit is about, on which general ability is measured.

    Attributes:
        statements: prompts with their true answers; ``held_out_accuracy`` is the share of those that are generated.
        texts: texts of another style than the preserved one, for ``other_style_perplexity``.
    """

    statements: Sequence[tuple[str, str]] = ()
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Further:
    """Results of further measures with the weights of one moment.

    Attributes:
        metrics: the results by name.
        by_fact: of those that are means over facts, as in :class:`~lit_moeedit.editing.Evaluation`.
        norms: norms of the experts of the edited layers, by layer index, if growth is measured.
        routing: by layer index, experts ``[n, k]`` chosen for the last token of each unfilled template, if their
            routing is measured.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    by_fact: dict[str, Tensor] = field(default_factory=dict)
    norms: Mapping[int, Tensor] = field(default_factory=dict)
    routing: Mapping[int, Tensor] | None = None

    def add_to(self, evaluation: Evaluation) -> Evaluation:
        """Return an evaluation with these results."""
        return replace(
            evaluation,
            by_fact={**evaluation.by_fact, **self.by_fact},
            further={**evaluation.further, **self.metrics},
        )


@dataclass(frozen=True)
class _Moment:
    """The weights and facts of one moment."""

    model: PreTrainedModel
    facts: Sequence[Fact]
    evaluation: Evaluation
    layers: Sequence[int]
    before: Further | None
    generated: Sequence[str] | None
    ranks: Ranks


class FurtherMeasures:
    """The further measures of one run.

    Args:
        names: the measures to make, of :data:`MEASURES`.
        tokenizer: the model's tokenizer.
        held_out: what general ability is measured on.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.

    Raises:
        ValueError: if a name is unknown.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOut | None = None,
        token_budget: Budget = "auto",
    ) -> None:
        self.names, self.tokenizer, self.token_budget = check_measures(names), tokenizer, token_budget
        self.held_out = held_out or HeldOut()

    def measure(
        self,
        model: PreTrainedModel,
        facts: Sequence[Fact],
        evaluation: Evaluation,
        layers: Sequence[int] = (),
        before: Further | None = None,
        generated: Sequence[str] | None = None,
        ranks: Ranks | None = None,
    ) -> Further:
        """Measure facts with the present weights; each rank calls this and gets the same result.

        What compares two moments needs ``layers`` just before an edit, and ``before`` just after it.

        Args:
            model: the model, which is left as it is; no global random state is used.
            facts: the facts.
            evaluation: their evaluation with the present weights.
            layers: indices of the layers of an edit; empty if there is none.
            before: the result just before the edit.
            generated: result of :func:`~lit_moeedit.editing.answers` after the prompts, if it is known.
            ranks: the processes that share the work.

        Raises:
            TooLittleMemoryError: if memory does not suffice for the longest prompt alone.
        """
        moment = _Moment(model, facts, evaluation, layers, before, generated, ranks or Ranks.current())
        found = Further()
        for name in self.names:
            own = _MEASURES[name](self, moment) if name in _MEASURES else self._probes(moment, name)
            found = Further(
                found.metrics | own.metrics,
                found.by_fact | own.by_fact,
                own.norms or found.norms,
                own.routing or found.routing,
            )
        return found

    def _generation(self, moment: _Moment) -> Further:
        texts, targets = moment.generated, [fact.target_new for fact in moment.facts]
        if texts is None:
            texts = self._generate(moment)
        matches = _generation_match_update(texts, targets)
        sums = {name: _each(row) for name, row in zip(GenerationMatch.names, matches, strict=True)}
        return Further(_plain(generation_match(texts, targets)), sums)

    def _fluency(self, moment: _Moment) -> Further:
        texts = self._generate(moment, tokens=FLUENCY_TOKENS, to_end=False)
        return Further(_plain(ngram_entropy(texts)), {"fluency": _each(_ngram_entropy_update(texts))})

    def _probes(self, moment: _Moment, kind: Measure) -> Further:
        """Ask the probes of one kind; an answer that has no tokens of its own after the prompt cannot be generated."""
        probes = [(t, probe) for t, fact in enumerate(moment.facts) for probe in fact.probes if probe.kind == kind]
        rows = dict.fromkeys((probe.prompt, answer) for _, probe in probes for answer in probe.answers)
        asked = _encodable(self.tokenizer, [row for row in rows if row[1].strip()])
        moment.ranks.check_same(f"the probes of kind {kind}", [repr(row) for row in asked])
        prompts, targets = [prompt for prompt, _ in asked], [answer for _, answer in asked]
        exact = score(moment.model, self.tokenizer, prompts, targets, self.token_budget, moment.ranks).exact
        said = {row for row, is_exact in zip(asked, exact.tolist(), strict=True) if is_exact}
        right = [any((probe.prompt, answer) in said for answer in probe.answers) for _, probe in probes]
        held, owner = torch.tensor(right, dtype=torch.bool), torch.tensor([t for t, _ in probes], dtype=torch.long)
        values, counts = sums_by_fact(owner, len(moment.facts), held)
        shares = torch.stack([values / counts.clamp_min(1), (counts > 0).double()])
        return Further({kind: float(probe_accuracy(held, owner))}, {kind: shares})

    def _probability_gap(self, moment: _Moment) -> Further:
        log_new, log_true = moment.evaluation.log_new, moment.evaluation.log_true
        gaps = _probability_gap_update(log_new, log_true)
        sums = {name: _each(row) for name, row in zip(ProbabilityGap.names, gaps, strict=True)}
        return Further(_plain(probability_gap(log_new, log_true)), sums)

    def _general_ability(self, moment: _Moment) -> Further:
        model, ranks, held_out = moment.model, moment.ranks, self.held_out
        found = _plain(copy_accuracy(*copied(model, self.tokenizer, token_budget=self.token_budget, ranks=ranks)))
        sums = {}
        if held_out.statements:
            prompts, answers_ = ([row[side] for row in held_out.statements[:MAX_STATEMENTS]] for side in (0, 1))
            exact = score(model, self.tokenizer, prompts, answers_, self.token_budget, ranks).exact
            found[STATEMENTS], sums[STATEMENTS] = float(exact.float().mean()), _each(exact)
        if held_out.texts:
            probe = Probe(self.tokenizer, held_out.texts, routing=False).measure(model, ranks)
            assert probe.perplexity is not None
            found["other_style_perplexity"] = probe.perplexity
        return Further(found, sums)

    def _norms(self, moment: _Moment) -> Further:
        weights = {i: layer.down_proj for i, layer in expert_layers(moment.model).items() if i in moment.layers}
        return Further(norms=expert_norms(weights, moment.ranks) if weights else {})

    def _template_routing(self, moment: _Moment) -> Further:
        if not moment.layers:
            return Further()
        templates = list(dict.fromkeys(_template(fact) for fact in moment.facts))
        trace = trace_routing(moment.model, self.tokenizer, templates, ranks=moment.ranks)
        texts = cut_texts(self.tokenizer, templates, MAX_PROBE_TOKENS)
        lengths = [min(len(e.ids), MAX_PROBE_TOKENS) for e in encode(self.tokenizer, texts, [""] * len(texts))]
        last = torch.tensor(lengths).cumsum(0) - 1
        experts = {index: chosen[last] for index, chosen in trace.experts.items()}
        if moment.before is None or moment.before.routing is None:
            return Further(routing=experts)
        metric = RoutingSimilarity(list(experts), sync_on_compute=False)
        metric.update(moment.before.routing, experts)
        return Further({"template_routing_similarity": float(metric.compute()["mean"])}, routing=experts)

    def _nothing(self, moment: _Moment) -> Further:
        return Further()

    def _generate(self, moment: _Moment, **settings: Any) -> list[str]:
        prompts = [fact.prompt for fact in moment.facts]
        return answers(
            moment.model,
            self.tokenizer,
            prompts,
            token_budget=self.token_budget,
            ranks=moment.ranks,
            **settings,
        )

    def of_result(self, result: EditResult, before: Further, after: Further) -> dict[str, float]:
        """Return the measures that need to know which experts an edit has changed.

        Args:
            result: the result of the edit.
            before: the further measures just before it.
            after: those with the edit in the weights.
        """
        found: dict[str, float] = {}
        if "weight_growth" in self.names:
            # another place may have been found since
            layers = [index for index in result.deltas if index in before.norms and index in after.norms]
            changed = {index: torch.tensor(result.deltas[index].experts) for index in layers}
            if layers:
                one, two = (torch.cat([norms[i][changed[i]] for i in layers]) for norms in (before.norms, after.norms))
                # an expert that was zero grows without bound
                found |= _plain(weight_growth(one[one > 0], two[one > 0]))
        if "null_space_rank" in self.names:
            ranks = [rank for by_expert in result.null_ranks.values() for rank in by_expert.values()]
            if ranks:
                found |= {"null_space_rank_mean": sum(ranks) / len(ranks), "null_space_rank_min": float(min(ranks))}
        return found


_MEASURES: dict[Measure, Callable[[FurtherMeasures, _Moment], Further]] = {
    "generation": FurtherMeasures._generation,
    "fluency": FurtherMeasures._fluency,
    "probability_gap": FurtherMeasures._probability_gap,
    "general_ability": FurtherMeasures._general_ability,
    "weight_growth": FurtherMeasures._norms,
    "template_routing": FurtherMeasures._template_routing,
    "null_space_rank": FurtherMeasures._nothing,
}
"""The methods that make the measures; those that are not here are kinds of probes."""


def _each(values: Tensor) -> Tensor:
    """Return the sums of :func:`~lit_moeedit.editing.by_fact.sums_by_fact` for one value per fact; NaN counts not."""
    return sums_by_fact(torch.arange(len(values)), len(values), values, ~values.double().isnan())


def _plain(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}


def _template(fact: Fact) -> str:
    """Return the prompt with ``{}`` in the place of the subject, as CounterFact writes it."""
    start, end = subject_span(fact.prompt, fact.subject)
    return f"{fact.prompt[:start]}{PLACEHOLDER}{fact.prompt[end:]}"


def _encodable(tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the prompts with answers that have tokens of their own."""

    def works(part: Sequence[tuple[str, str]]) -> bool:
        try:
            encode(tokenizer, [prompt for prompt, _ in part], [answer for _, answer in part])
        except ValueError:
            return False
        return True

    return list(rows) if works(rows) else [row for row in rows if works([row])]
