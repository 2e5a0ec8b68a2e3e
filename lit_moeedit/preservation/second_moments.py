"""Second moments of the experts' keys over text that an edit must preserve."""

from __future__ import annotations

import logging
import random
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import pad, pad_id, position_ids, token_batches, token_ids
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.keys import KeyRows, stream_keys
from lit_moeedit.models.partial_forward import hidden_states, inference
from lit_moeedit.models.token_budget import Budget, TokenBudget, forward_cost
from lit_moeedit.precision import full_precision, rounded, tensor_core_precision
from lit_moeedit.preservation.moments_cache import MomentsCache, digest, moment_keys
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers.batches import similar

log = logging.getLogger(__name__)

PADDED = 2**26
"""Numbers of keys that are multiplied at once where all experts' are there: 256 MiB."""


@dataclass
class SecondMoments:
    """Sums over the tokens that were routed to each expert of one layer.

    Attributes:
        total: ``[E, d_hidden, d_hidden]`` float32, ``Σ k kᵀ``, or ``Σ g² k kᵀ`` if ``gated``.
        count: ``[E]`` int64, tokens seen.
        tokens: ``[1]`` int64, tokens of the text, whichever experts they went to.
        gated: whether keys count as much as the layer's output depends on them.
    """

    total: Tensor
    count: Tensor
    tokens: Tensor
    gated: bool = False

    @classmethod
    def zeros(cls, layer: ExpertLayer, device: torch.device | str | None = None, gated: bool = False) -> SecondMoments:
        """Empty sums for a layer, on its device or another."""
        experts, _, d_hidden = layer.shape
        device = layer.down_proj.device if device is None else device
        return cls(
            torch.zeros(experts, d_hidden, d_hidden, device=device),
            torch.zeros(experts, dtype=torch.long, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
            gated,
        )

    @full_precision()
    def add(self, expert: int, keys: Tensor, gates: Tensor) -> None:
        """Add keys ``[n, d_hidden]`` of one expert, with gates ``[n]``; the sums are float32, whatever the keys are."""
        rows, total = self._weighted(keys, gates), self.total[expert]
        if total.device == rows.device:
            total.addmm_(rows.T, rows)
        else:
            total += (rows.T @ rows).to(total.device)
        self.count[expert] += len(rows)

    def add_all(self, rows: KeyRows) -> None:
        """Add keys of several experts at once, in a few products of padded batches.

        Keys of half precision are multiplied on tensor cores, which keep all of their bits. Gated ones have more: they
        are split into what tensor cores keep and the rest, ``R = H + L``, and the sum is ``HᵀH + HᵀL + LᵀH``; what is
        left out is 2⁻²² of it.
        """
        experts, counts = list(rows.counts), list(rows.counts.values())
        keys = self._weighted(rows.key, rows.gate)
        is_half = rows.key.dtype in (torch.bfloat16, torch.float16)
        device = keys.device
        expert, count = torch.tensor([experts, counts], device=device)
        start = count.cumsum(0) - count
        for batch in similar(counts, keys.shape[1], PADDED):
            longest, shortest = counts[batch[0]], counts[batch[-1]]
            chosen = torch.tensor(batch, device=device)
            place = torch.arange(longest, device=device)
            padded = keys[(start[chosen, None] + place).clamp_max(len(keys) - 1)]
            if shortest < longest:
                padded *= (place < count[chosen, None])[..., None]
            with tensor_core_precision() if is_half else full_precision():
                high = rounded(padded) if is_half and self.gated else padded
                products = high.mT @ high
                if high is not padded:
                    mixed = high.mT @ (padded - high)
                    products += mixed
                    products += mixed.mT
            self.total.index_add_(0, expert[chosen].to(self.total.device), products.to(self.total.device))
        self.count.index_add_(0, expert.to(self.count.device), count.to(self.count.device))

    def _weighted(self, keys: Tensor, gates: Tensor) -> Tensor:
        """Keys in float32, times their gates if these count."""
        return keys.float() * gates.float()[:, None] if self.gated else keys.float()

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {"total": self.total, "count": self.count, "tokens": self.tokens}

    def mean(self, experts: Tensor) -> Tensor:
        """``C_j`` of the given experts ``[n]``: ``[n, d_hidden, d_hidden]``; zero for an expert that saw nothing.

        The mean over the tokens that went to the expert or, if ``gated``, over all tokens of the text: a change
        ``ΔW_j`` then moves the layer's output of a token by ``tr(ΔW_j C_j ΔW_jᵀ)`` in the mean square.
        """
        experts = experts.to(self.total.device)
        seen = self.tokens.expand(len(experts)) if self.gated else self.count[experts]
        return self.total[experts] / seen.clamp_min(1)[:, None, None]


def second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[ExpertLayer],
    texts: Sequence[str],
    token_budget: Budget = "auto",
    max_length: int = 512,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
    cache: MomentsCache | None = None,
    device: torch.device | str | None = None,
    gated: bool = False,
    grouped: bool | None = None,
    max_tokens: int | None = None,
) -> dict[int, SecondMoments]:
    """Stream texts through the model and accumulate second moments of every expert in the given layers.

    Layers above the highest of ``layers``, and that one's down-projections, are not run. The texts are dealt to the
    ranks, and the sums added up. With a cache, layers that are in it are not computed, and an unfinished pass goes on
    where it was last saved; the first rank reads and writes it. If memory runs out, the pass begins again (or goes on
    where it was saved) with fewer tokens in a forward; long texts come first, so that this happens early.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        layers: the layers to watch.
        texts: preservation text, one document each.
        token_budget: largest number of tokens (with padding) in one forward, or ``auto``.
        max_length: longer texts are cut.
        progress: called with the texts done and all.
        ranks: the processes that share the work; each calls this with the same texts.
        cache: where to keep the sums.
        device: where to hold the sums, ``E · d_hidden² · 4`` bytes for each layer; ``None`` for the layer's own device,
            ``"cpu"`` to save the memory of a GPU at the price of moving a product for each expert and batch.
        gated: whether to sum gated keys, as ``preserve="output"`` needs them.
        grouped: see :func:`~lit_moeedit.models.keys.stream_keys`.
        max_tokens: take no more texts, drawn evenly (and the same every time), once they have so many tokens; ``None``
            for all.

    Raises:
        ValueError: if there is no text.
        FloatingPointError: if a key is not finite.
        TooLittleMemoryError: if there is no memory for the longest text alone.
    """
    ranks = ranks if ranks is not None else Ranks()
    if not texts:
        raise ValueError("there is no preservation text: second moments need at least one")
    moments = {layer.index: SecondMoments.zeros(layer, device, gated) for layer in layers}
    keys = {} if cache is None else moment_keys(model, tokenizer, layers, texts, max_length, gated, ranks)
    if max_tokens is not None:
        keys = {index: digest(key, max_tokens) for index, key in keys.items()}
    sums = {i: x for i, x in moments.items() if cache is None or not cache.load(keys[i], x.tensors(), ranks)}
    if not sums:
        return moments
    # short to long; a pass begins at the end
    rows = sorted(_sample(list(_token_rows(tokenizer, texts, max_length)), max_tokens), key=len)
    watched = [layer for layer in layers if layer.index in sums]
    unfinished = _Unfinished(sums, cache, digest([keys.get(i) for i in sums], "long texts first"), ranks)

    def run(tokens: int) -> None:
        left = rows[: len(rows) - unfinished.begin()]
        batches = [[left[i] for i in batch] for batch in token_batches([len(row) for row in left], tokens)][::-1]

        def after(count: int) -> None:
            done = len(rows) - len(left) + sum(map(len, batches[:count]))
            if progress is not None:
                progress(done, len(rows))
            if count < len(batches):
                unfinished.save(done)

        _accumulate(model, watched, sums, batches, pad_id(tokenizer), ranks, after, grouped)

    if rows:
        top = max(watched, key=lambda layer: layer.index)
        budget = TokenBudget(token_budget, forward_cost(model, top), model.device, ranks)
        budget.run("statistics", run, least=len(rows[-1]), most=len(rows) * len(rows[-1]))
    for index, summed in sums.items():
        ranks.all_reduce(*summed.tensors().values())
        # a key that is not finite shows in its square
        if not bool(summed.total.diagonal(dim1=1, dim2=2).isfinite().all()):
            raise FloatingPointError(f"the keys of layer {index} are not finite on the preservation text")
        if cache is not None:
            cache.save(keys[index], summed.tensors(), ranks)
    unfinished.drop()
    return moments


def _token_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Iterator[array[int]]:
    """Token ids of the texts that have any, small in memory; lists of numbers for some texts at a time."""
    for start in range(0, len(texts), 1024):
        yield from (array("i", ids[:max_length]) for ids in token_ids(tokenizer, texts[start : start + 1024]) if ids)


def _sample(rows: Sequence[array[int]], max_tokens: int | None) -> Sequence[array[int]]:
    """Draw rows, the same every time, until they have so many tokens; take all if they have fewer."""
    if max_tokens is None or sum(map(len, rows)) <= max_tokens:
        return rows
    chosen: list[array[int]] = []
    tokens = 0
    for row in random.Random(0).sample(rows, len(rows)):
        if tokens >= max_tokens:
            break
        chosen.append(row)
        tokens += len(row)
    return chosen


def _accumulate(
    model: PreTrainedModel,
    layers: Sequence[ExpertLayer],
    sums: Mapping[int, SecondMoments],
    batches: Sequence[Sequence[Sequence[int]]],
    pad_token: int,
    ranks: Ranks,
    after: Callable[[int], None],
    grouped: bool | None,
) -> None:
    """Add this rank's batches of token ids to the sums; ``after`` is told how many of all batches are done."""
    top = max(layers, key=lambda layer: layer.index)
    positions = torch.empty(0)

    def observe(layer: ExpertLayer, rows: KeyRows) -> None:
        if len(rows.counts) == 1:
            ((expert, _),) = rows.counts.items()
            sums[layer.index].add(expert, rows.key, rows.gate)
        elif rows.counts:
            sums[layer.index].add_all(rows)

    with inference(model), stream_keys(model, layers, lambda: positions, observe, top, grouped):
        for number, (batch, mine) in enumerate(ranks.shard(batches), 1):
            ids, mask = (x.to(model.device) for x in pad(batch, pad_token))
            # the experts need not be run on padding, nor on what another rank counts
            positions = (mask * mine).flatten().nonzero().squeeze(-1)
            hidden_states(model, top, ids, mask, position_ids(mask))
            for summed in sums.values():
                summed.tokens += len(positions)
            after(min(number * ranks.size, len(batches)))
    ranks.check_errors()


class _Unfinished:
    """The sums of a pass, saved from time to time."""

    def __init__(self, sums: Mapping[int, SecondMoments], cache: MomentsCache | None, key: str, ranks: Ranks) -> None:
        self.sums, self.cache, self.key, self.ranks = sums, cache, key, ranks
        self._texts = torch.zeros(1, dtype=torch.long)
        self._saved = time.monotonic()

    def begin(self) -> int:
        """Set the sums to those that were saved, or to zero; give the number of texts that are in them."""
        self._texts.zero_()
        _clear(self.sums.values())
        if self.cache is not None and self.cache.load(self.key, self._tensors(), self.ranks):
            self._leave_to_first_rank()
            log.info("second moments: going on where a pass was broken off, after %d texts", int(self._texts))
        return int(self._texts)

    def save(self, texts: int) -> None:
        """Save the sums of so many texts, the longest, if it is time to."""
        if self.cache is None or not self.ranks.any(time.monotonic() - self._saved >= self.cache.save_every):
            return
        for summed in self.sums.values():
            self.ranks.all_reduce(*summed.tensors().values())
        self._leave_to_first_rank()
        self._texts.fill_(texts)
        self.cache.save(self.key, self._tensors(), self.ranks)
        self._saved = time.monotonic()

    def drop(self) -> None:
        """The pass is finished."""
        if self.cache is not None:
            self.cache.drop(self.key, self.ranks)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"{index}.{name}": x for index, part in self.sums.items() for name, x in part.tensors().items()}
        return {**named, "texts": self._texts}

    def _leave_to_first_rank(self) -> None:
        # all hold the sums of all; the next sum over the ranks shall count them once
        if self.ranks.rank:
            _clear(self.sums.values())


def _clear(sums: Iterable[SecondMoments]) -> None:
    for summed in sums:
        for tensor in summed.tensors().values():
            tensor.zero_()
