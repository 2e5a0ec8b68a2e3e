"""Causal tracing: the share of an answer that the experts of each layer restore under a corrupted subject."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import Encoding, pad, pad_id, position_ids, token_batches
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.evaluation import score, score_batch, scoring_cost
from lit_moeedit.editing.kv_prefix import logits_at
from lit_moeedit.editing.locating.corruption import corrupt
from lit_moeedit.editing.phases import Progress
from lit_moeedit.editing.place import TOKENS
from lit_moeedit.interrupts import Undo, held
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.models.partial_forward import hooked, inference
from lit_moeedit.models.token_budget import Budget, TokenBudget
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)

WINDOWS = (1, 3)
"""Numbers of neighbouring layers with experts that are restored together."""
NOISE = 3.0
"""Standard deviation of the noise on a subject's embeddings, in units of theirs (ROME, 2202.05262)."""
MAX_FACTS = 32
"""Maximum number of facts that are traced."""


@dataclass(frozen=True)
class Trace:
    """The effect of each layer's experts on the answers to prompts with a corrupted subject.

    Attributes:
        layers: indices of the ``L`` layers with experts.
        restored: share of the answers' probability that is restored, ``[windows, tokens, L]`` float32 on the CPU, for
            windows of 1 and 3 layers around each layer, and the tokens ``subject_last`` and ``last``. 1 restores the
            probability with the true subject, 0 nothing. NaN if corruption lowers no answer's probability.
        clean: probability of the answers with the true subject, on average over the facts.
        corrupted: the same with the corrupted subject.
        facts: number of facts.
        noised: number of facts whose subject was noised, because no other has the same number of tokens.
        own_answers: number of facts whose answer is the model's own most likely next token, because their truth is not
            known, or the model does not generate it.
        seconds: duration.
    """

    layers: tuple[int, ...]
    restored: Tensor
    clean: float
    corrupted: float
    facts: int
    noised: int
    own_answers: int
    seconds: float

    def table(self) -> Table:
        """Format the shares as a table for the console, with a row for each layer."""
        title = f"Share of the answers' probability that a layer's experts restore ({self.facts} facts)"
        table = Table(title=title, box=SIMPLE, pad_edge=False)
        table.add_column("layer", justify="right")
        for token in TOKENS:
            for window in WINDOWS:
                table.add_column(f"{token}, window {window}", justify="right")
        for number, layer in enumerate(self.layers):
            shares = self.restored[:, :, number].T.flatten().tolist()
            table.add_row(str(layer), *(f"{share:.2f}" for share in shares))
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as JSON types; ``restored`` by token and window."""
        names = ("layers", "clean", "corrupted", "facts", "noised", "own_answers", "seconds")
        shares = {
            token: {
                str(window): [None if value != value else value for value in self.restored[w, t].tolist()]
                for w, window in enumerate(WINDOWS)
            }
            for t, token in enumerate(TOKENS)
        }
        return {name: getattr(self, name) for name in names} | {"restored": shares}


class _Row(NamedTuple):
    """One row of a forward: a corrupted fact in which some layers' experts are restored at a token.

    Attributes:
        fact: index of the fact.
        token: index in ``TOKENS``.
        restored: positions of the layers in the list of layers with experts.
    """

    fact: int
    token: int = 0
    restored: range = range(0)


def spread(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` indices of ``count`` items, evenly spread.

    Example:
        >>> spread(10, 4), spread(3, 4)
        ([0, 2, 5, 7], [0, 1, 2])
    """
    return list(range(count)) if count <= limit else [number * count // limit for number in range(limit)]


def window(centre: int, size: int, count: int) -> range:
    """Return the positions of a window of neighbouring layers; it is smaller at the ends."""
    return range(max(0, centre - size // 2), min(count, centre + size // 2 + 1))


@torch.inference_mode(False)
@torch.no_grad()
def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    ranks: Ranks | None = None,
    token_budget: Budget = "auto",
    progress: Progress | None = None,
    max_facts: int = MAX_FACTS,
) -> Trace:
    """Measure which layers' experts restore answers under a corrupted subject, and at which token.

    Causal tracing (ROME, 2202.05262) of the output of the routed experts: the prompt is run with another fact's
    subject of the same number of tokens, or with noise on the subject's embeddings if there is none. The output of the
    experts of a few neighbouring layers at one token is replaced by that of the run with the true subject. Measured is
    the probability of the answer (geometric mean over its tokens), summed over the facts and as a share of what
    corruption takes. The rows of all layers, tokens and facts are batched, and sharded over the ranks.

    Args:
        model: the model. Its modes and random states are restored afterwards.
        tokenizer: its tokenizer.
        facts: facts to edit.
        ranks: the processes that share the work. Each calls this with the same facts and gets the same result.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        progress: called with ``"trace"``, the number of rows done, and their total number.
        max_facts: maximum number of facts, spread evenly over the given ones.

    Raises:
        UnsupportedModelError: if the model has no routed experts.
        ValueError: if there is no fact, or one cannot be encoded.
        TooLittleMemoryError: if memory does not suffice for the longest prompt alone.
    """
    if not facts:
        raise ValueError("there is no fact to trace")
    start, ranks = perf_counter(), ranks or Ranks.current()
    chosen = [facts[number] for number in spread(len(facts), max_facts)]
    with ranks.together():
        tracer = _Tracer(model, tokenizer, chosen, ranks, token_budget, progress)
        log_prob = tracer.run()
    count, layers = len(chosen), len(tracer.layers)
    probability = log_prob.double().exp()
    before, after = probability[:count].sum(), probability[count : 2 * count].sum()
    by_row = probability[2 * count :].view(len(WINDOWS), len(TOKENS), layers, count).sum(-1)
    taken = before - after
    restored = (by_row - after) / taken if taken > 1e-6 * count else torch.full_like(by_row, torch.nan)
    return Trace(
        tuple(layer.index for layer in tracer.layers),
        restored.float(),
        float(before / count),
        float(after / count),
        count,
        sum(fact.needs_noise for fact in tracer.facts),
        tracer.own_answers,
        perf_counter() - start,
    )


class _Tracer:
    """The forwards of a trace."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        ranks: Ranks,
        token_budget: Budget,
        progress: Progress | None,
    ) -> None:
        self.model, self.ranks, self.progress = model, ranks, progress
        self.pad_token = pad_id(tokenizer)
        self.layers: list[ExpertLayer] = list(expert_layers(model).values())
        self.facts = corrupt(tokenizer, facts)
        known = [number for number, fact in enumerate(facts) if fact.target_true is not None]
        prompts, truths = [facts[n].prompt for n in known], [facts[n].target_true or "" for n in known]
        exact = score(model, tokenizer, prompts, truths, token_budget, ranks).exact.tolist()
        unknown = sorted(set(range(len(facts))) - {n for n, is_exact in zip(known, exact, strict=True) if is_exact})
        self.own_answers = len(unknown)
        lengths = [len(fact.clean.ids) + 1 for fact in self.facts]
        share = max(len(f.clean.ids) + 1 - f.clean.target_start for f in self.facts) / min(lengths)
        self.budget = TokenBudget(token_budget, scoring_cost(model, share), model.device, ranks)
        for number, token in zip(unknown, self._next_tokens(unknown), strict=True):
            self.facts[number] = self.facts[number].answered(token)
        # experts' outputs with the true subject, [facts, tokens, d_model] for each layer
        self.clean: list[Tensor] = [torch.empty(0)] * len(self.layers)
        self.noise: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        """Return the log-probabilities of the answers: clean, corrupted, and with each restoration, ``[n]``."""
        count, layers = len(self.facts), len(self.layers)
        corrupted = [_Row(fact) for fact in range(count)]
        restored = [
            _Row(fact, token, window(centre, size, layers))
            for size in WINDOWS
            for token in range(len(TOKENS))
            for centre in range(layers)
            for fact in range(count)
        ]
        clean = self._run_clean()
        return torch.cat([clean, self._run_rows([*corrupted, *restored])])

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _batched(self, rows: Sequence[int], run: Callable[[list[list[int]]], Any]) -> Any:
        """Call ``run`` with batches of rows, given by the indices of their facts, within the token budget."""
        lengths = [len(self.facts[fact].clean.ids) for fact in rows]

        def work(tokens: int) -> Any:
            batches = unpadded(token_batches(lengths, tokens), lengths, longest_padded(self.model))
            with inference(self.model):
                return run([list(batch) for batch in batches])

        return self.budget.run("trace", work, least=max(lengths), most=max(lengths) * len(lengths))

    def _next_tokens(self, facts: Sequence[int]) -> list[int]:
        """Return the most likely token after the prompt of each fact."""

        def run(batches: list[list[int]]) -> list[int]:
            found = [0] * len(facts)
            for batch in batches:
                rows = [self.facts[facts[i]].clean for i in batch]
                prompts = [row.ids[: row.target_start] for row in rows]
                ids, mask = (x.to(self.model.device) for x in pad(prompts, self.pad_token))
                row, column = torch.arange(len(batch), device=ids.device), mask.sum(1) - 1
                scores = logits_at(self.model, ids, mask, position_ids(mask), row, column)
                for i, token in zip(batch, scores.argmax(-1).tolist(), strict=True):
                    found[i] = token
            return found

        return list(self._batched(facts, run)) if facts else []

    def _run_clean(self) -> Tensor:
        """Run all facts on every rank, and keep the experts' outputs at their tokens."""
        everything = range(len(self.facts))

        def run(batches: list[list[int]]) -> Tensor:
            log_prob = torch.zeros(len(self.facts))
            embedded: list[Tensor] = []
            outputs: list[list[Tensor]] = [[] for _ in self.layers]
            for batch in batches:
                columns = torch.tensor([self.facts[i].places for i in batch], device=self.model.device)

                def keep(module: nn.Module, args: Any, output: Tensor, kept: list[Tensor], at: Tensor) -> None:
                    states = output.view(len(at), -1, output.shape[-1])
                    kept.append(states[torch.arange(len(at), device=at.device)[:, None], at])

                def embed(module: nn.Module, args: Any, output: Tensor, batch: list[int] = batch) -> None:
                    embedded.extend(output[i, list(self.facts[f].subject)].float() for i, f in enumerate(batch))

                with held(Undo()) as undo:
                    undo.enter_context(hooked(_embeddings(self.model), embed))
                    for layer, kept in zip(self.layers, outputs, strict=True):
                        hook = _bound(keep, kept=kept, at=columns)
                        undo.enter_context(hooked(layer.experts, hook))
                    found = score_batch(self.model, [self.facts[i].clean for i in batch], self.pad_token)
                log_prob[batch] = found[0].cpu()
            order = torch.argsort(torch.tensor([i for batch in batches for i in batch], device=self.model.device))
            self.clean = [torch.cat(kept)[order] for kept in outputs]
            self._draw_noise(torch.cat(embedded))
            return log_prob

        return self._batched(everything, run)  # type: ignore[no-any-return]

    def _draw_noise(self, embedded: Tensor) -> None:
        deviation, width = float(embedded.std()), embedded.shape[-1]
        for number, fact in enumerate(self.facts):
            if fact.needs_noise:
                generator = torch.Generator().manual_seed(number)
                self.noise[number] = NOISE * deviation * torch.randn(len(fact.subject), width, generator=generator)

    def _run_rows(self, rows: Sequence[_Row]) -> Tensor:
        """Return the log-probabilities of the answers of corrupted rows; they are sharded over the ranks."""

        def run(batches: list[list[int]]) -> Tensor:
            log_prob, done = torch.zeros(len(rows)), 0
            for batch, mine in self.ranks.shard(batches):
                found = self._scored([rows[i] for i in batch])
                if mine:
                    log_prob[batch] = found.cpu()
                done = min(len(rows), done + len(batch) * self.ranks.size)
                if self.progress is not None:
                    self.progress("trace", done, len(rows))
            self.ranks.check_errors()
            self.ranks.all_reduce(log_prob)
            if self.progress is not None:
                self.progress("trace", len(rows), len(rows))
            return log_prob

        return self._batched([row.fact for row in rows], run)  # type: ignore[no-any-return]

    def _scored(self, batch: Sequence[_Row]) -> Tensor:
        """Score one batch of corrupted rows, with what each of them restores."""
        texts: list[Encoding] = [self.facts[row.fact].corrupted for row in batch]

        def add_noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for i, row in enumerate(batch):
                if row.fact in self.noise:
                    output[i, list(self.facts[row.fact].subject)] += self.noise[row.fact].to(output)
            return output

        def restore(module: nn.Module, args: Any, output: Tensor, number: int) -> Tensor:
            restored = [(i, row) for i, row in enumerate(batch) if number in row.restored]
            places = [self.facts[row.fact].places[row.token] for _, row in restored]
            states = output.view(len(batch), -1, output.shape[-1]).clone()
            values = self.clean[number][[row.fact for _, row in restored], [row.token for _, row in restored]]
            states[[i for i, _ in restored], places] = values.to(states)
            return states.view_as(output)

        with held(Undo()) as undo:
            if any(row.fact in self.noise for row in batch):
                undo.enter_context(hooked(_embeddings(self.model), add_noise))
            for number in sorted({number for row in batch for number in row.restored}):
                undo.enter_context(hooked(self.layers[number].experts, _bound(restore, number=number)))
            return score_batch(self.model, texts, self.pad_token)[0]


def _embeddings(model: PreTrainedModel) -> nn.Module:
    module = model.get_input_embeddings()
    assert isinstance(module, nn.Module)
    return module


def _bound(hook: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """Return a hook with further arguments, as a function of its own for :func:`hooked`."""

    def call(module: nn.Module, args: Any, output: Tensor) -> Any:
        return hook(module, args, output, **fixed)

    return call
