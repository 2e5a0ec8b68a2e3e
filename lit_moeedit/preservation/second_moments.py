"""Second moments of the experts' keys over preservation text."""

from __future__ import annotations

import logging
import random
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import pad, pad_id, position_ids, token_batches, token_ids
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.keys import KeyRows, stream_keys
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.models.partial_forward import inference, layer_output
from lit_moeedit.models.token_budget import Budget, TokenBudget, forward_cost, most_tokens
from lit_moeedit.precision import full_precision, round_to_tf32, tensor_core_precision
from lit_moeedit.preservation.moments_cache import MomentsCache, digest, moment_keys
from lit_moeedit.sharding.backends import refuse_parallelism
from lit_moeedit.sharding.device_memory import free_memory
from lit_moeedit.sharding.owners import Part
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers.batches import similar

log = logging.getLogger(__name__)

MAX_TEXT_TOKENS = 512
"""Default of the maximum number of tokens of a preservation text that are used."""
PADDED = 2**26
"""Maximum number of elements in a padded batch of keys (256 MiB)."""
LEAST_SHARE, CPU_LEAST_SHARE = 0.5, 0.8
"""Least number of keys of an expert as a share of the most in its padded batch. On a GPU, starting the kernels of a
batch takes longer than products of padding."""


@dataclass
class SecondMoments:
    """Sums over the tokens that were routed to each expert of one layer.

    Attributes:
        total: ``[n, d_hidden, d_hidden]`` float32, ``Σ k kᵀ``, or ``Σ g² k kᵀ`` if ``gated``. Under expert parallelism
            these are the rank's own ``n = E / owners`` experts, otherwise all of them.
        count: ``[n]`` int64, number of tokens routed to each expert.
        tokens: ``[1]`` int64, number of tokens of the text.
        gated: whether keys are multiplied by their gates.
        key: key under which they are in a cache; ``None`` if they are in none.
        part: the experts that the sums are of. Methods take the index of an expert in the layer.
    """

    total: Tensor
    count: Tensor
    tokens: Tensor
    gated: bool = False
    key: str | None = None
    part: Part = field(default_factory=Part)

    @classmethod
    def zeros(cls, layer: ExpertLayer, device: torch.device | str | None = None, gated: bool = False) -> SecondMoments:
        """Make sums of zero for a layer, on its device or another."""
        experts, _, d_hidden = layer.shape
        device = layer.down_proj.device if device is None else device
        part = Part.of(layer.experts)
        own = experts // part.owners
        return cls(
            torch.zeros(own, d_hidden, d_hidden, device=device),
            torch.zeros(own, dtype=torch.long, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
            gated,
            part=part,
        )

    @full_precision()
    def add(self, expert: int, keys: Tensor, gates: Tensor) -> None:
        """Add keys ``[n, d_hidden]`` of any dtype of one expert, with gates ``[n]``."""
        rows, total = self._weighted(keys, gates), self.total[expert - self.part.first]
        if total.device == rows.device:
            total.addmm_(rows.T, rows)
        else:
            total += (rows.T @ rows).to(total.device)
        self.count[expert - self.part.first] += len(rows)

    def add_all(self, rows: KeyRows) -> None:
        """Add keys of several experts at once, in a few products of padded batches.

        Keys of half precision are multiplied on tensor cores, which keep all of their bits. Gated keys have more bits.
        They are split into a part ``H`` that tensor cores represent exactly and a rest ``L``, and the product is
        computed as ``HᵀH + HᵀL + LᵀH``. The omitted term is 2⁻²² of it.
        """
        experts, counts = [expert - self.part.first for expert in rows.counts], list(rows.counts.values())
        keys = self._weighted(rows.key, rows.gate)
        is_half = rows.key.dtype in (torch.bfloat16, torch.float16)
        device, width = keys.device, keys.shape[1]
        high = round_to_tf32(keys) if is_half and self.gated else keys
        parts = (high,) if high is keys else (high, keys - high)
        batches = list(similar(counts, width, PADDED, LEAST_SHARE if device.type == "cuda" else CPU_LEAST_SHARE))
        order, begins = list(chain.from_iterable(batches)), list(accumulate(counts, initial=0))
        # in one copy to the device, because a GPU waits for each
        table = torch.tensor([[numbers[i] for i in order] for numbers in (experts, counts, begins)], device=device)
        for batch, columns in zip(batches, table.split([len(batch) for batch in batches], dim=1), strict=True):
            expert, count, begin = columns
            longest, shortest = counts[batch[0]], counts[batch[-1]]
            place = torch.arange(longest, device=device)
            chosen = (begin[:, None] + place).clamp_max(len(keys) - 1)
            padded = [part[chosen] for part in parts]
            if shortest < longest:
                is_own = (place < count[:, None])[..., None]
                for part in padded:
                    part *= is_own
            with tensor_core_precision() if is_half else full_precision():
                products = padded[0].mT @ padded[0]
                for low in padded[1:]:
                    mixed = padded[0].mT @ low
                    products += mixed
                    products += mixed.mT
            self.total.index_add_(0, expert.to(self.total.device), products.to(self.total.device))
        self.count.index_add_(0, *table[:2].to(self.count.device))

    def _weighted(self, keys: Tensor, gates: Tensor) -> Tensor:
        """Convert keys to float32, and multiply them by their gates if the moments are gated."""
        return keys.float() * gates.float()[:, None] if self.gated else keys.float()

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {"total": self.total, "count": self.count, "tokens": self.tokens}

    def parts(self) -> dict[str, Part]:
        """Return the part of the experts that the sums are of, by the names of those that have an entry for each."""
        return {"total": self.part, "count": self.part}

    def all_reduce(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, each of which keeps those of its own experts. All ranks call this together."""
        parts = self.parts()
        for name, tensor in self.tensors().items():
            parts.get(name, Part()).all_reduce(tensor, ranks)

    def mean(self, experts: Tensor) -> Tensor:
        """Compute ``C_j [n, d_hidden, d_hidden]`` of some experts ``[n]`` of the part; zero for one without tokens.

        It is the mean over the tokens that were routed to the expert or, if ``gated``, over all tokens of the text.
        With gates, a change ``ΔW_j`` changes the layer's output by ``tr(ΔW_j C_j ΔW_jᵀ)`` in mean square.
        """
        experts = experts.to(self.total.device) - self.part.first
        tokens = self.tokens.expand(len(experts)) if self.gated else self.count[experts]
        return self.total[experts] / tokens.clamp_min(1)[:, None, None]


def second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[ExpertLayer],
    texts: Sequence[str],
    token_budget: Budget = "auto",
    max_length: int = MAX_TEXT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
    cache: MomentsCache | None = None,
    device: torch.device | str | None = None,
    gated: bool = False,
    grouped: bool | None = None,
    max_tokens: int | None = None,
) -> dict[int, SecondMoments]:
    """Run texts through the model and accumulate second moments of every expert in the given layers.

    Layers above the highest of ``layers``, and its down-projections, are not run. The texts are sharded over the ranks,
    and the sums all-reduced. With a cache, layers that are in it are not computed again, and an interrupted pass
    resumes where it was last saved. If memory runs out, the pass starts again (or resumes) with fewer tokens in a
    forward. Long texts come first, so that this happens early.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        layers: the layers to watch.
        texts: preservation text, one document each.
        token_budget: maximum number of tokens (with padding) in one forward, or ``auto``.
        max_length: maximum number of tokens of a text; longer texts are truncated, very long ones before they are
            tokenized.
        progress: called with the number of texts done, and the number of all texts.
        ranks: the processes that share the work. Each calls this with the same texts.
        cache: a cache of the sums.
        device: device of the sums, which take ``E · d_hidden² · 4`` bytes for each layer, of which a rank has its share
            under expert parallelism; ``None`` for the model's device, or for the CPU if they do not fit on a GPU (see
            :func:`sums_fit`), to which products are then moved.
        gated: whether to sum gated keys, as :class:`~lit_moeedit.preservation.shaping.OutputPenalty` needs them.
        grouped: see :func:`~lit_moeedit.models.keys.stream_keys`.
        max_tokens: texts are sampled, with a fixed seed, until they have this many tokens; ``None`` for all texts.

    Raises:
        ValueError: if there is no text.
        FloatingPointError: if a key is not finite.
        TooLittleMemoryError: if memory does not suffice for the longest text alone.
    """
    refuse_parallelism(model)
    ranks = ranks or Ranks.current()
    if not texts:
        raise ValueError("there is no preservation text: second moments need at least one")
    texts = cut_texts(tokenizer, texts, max_length)
    device = sums_device(model, layers, ranks) if device is None else device
    moments = {layer.index: SecondMoments.zeros(layer, device, gated) for layer in layers}
    keys = {} if cache is None else moment_keys(model, tokenizer, layers, texts, max_length, gated, ranks)
    if max_tokens is not None:
        keys = {index: digest(key, max_tokens) for index, key in keys.items()}
    for index, key in keys.items():
        moments[index].key = key
    sums = {i: x for i, x in moments.items() if cache is None or not cache.load(keys[i], x.tensors(), ranks, x.parts())}
    if not sums:
        return moments
    # from short to long; a pass begins at the end
    rows = sorted(_sample(list(_token_rows(tokenizer, texts, max_length)), max_tokens), key=len)
    watched = [layer for layer in layers if layer.index in sums]
    unfinished = _Unfinished(sums, cache, digest([keys.get(i) for i in sums], "long texts first"), ranks)

    def run(tokens: int) -> None:
        left = rows[: len(rows) - unfinished.begin()]
        lengths = [len(row) for row in left]
        together = unpadded(token_batches(lengths, tokens), lengths, longest_padded(model))
        batches = [[left[i] for i in batch] for batch in together][::-1]

        def after(count: int) -> None:
            done = len(rows) - len(left) + sum(map(len, batches[:count]))
            if progress is not None:
                progress(done, len(rows))
            if count < len(batches):
                unfinished.save(done)

        _accumulate(model, watched, sums, batches, pad_id(tokenizer), ranks, after, grouped)

    if rows:
        top = max(watched, key=lambda layer: layer.index)
        cost, maximum = forward_cost(model, top), most_tokens(model.device)
        budget = TokenBudget(token_budget, cost, model.device, ranks, maximum)
        budget.run("statistics", run, least=len(rows[-1]), most=len(rows) * len(rows[-1]))
    for index, summed in sums.items():
        summed.all_reduce(ranks)
        # a key that is not finite shows in its square
        if ranks.any(not bool(summed.total.diagonal(dim1=1, dim2=2).isfinite().all())):
            raise FloatingPointError(f"the keys of layer {index} are not finite on the preservation text")
        if cache is not None:
            cache.save(keys[index], summed.tensors(), ranks, summed.parts())
    unfinished.drop()
    return moments


def sums_device(model: PreTrainedModel, layers: Sequence[ExpertLayer], ranks: Ranks) -> str | None:
    """Choose the device of the sums: ``None`` for the model's, ``cpu`` if they do not fit on a rank's GPU."""
    if model.device.type == "cpu":
        return None
    return "cpu" if ranks.any(not sums_fit(layers, free_memory(model.device))) else None


def sums_fit(layers: Sequence[ExpertLayer], free: float) -> bool:
    """Tell whether the sums of the layers leave at least half of ``free`` bytes to the forward passes."""
    own = [layer.num_experts // Part.of(layer.experts).owners for layer in layers]
    return sum(4 * n * layer.shape[2] ** 2 for n, layer in zip(own, layers, strict=True)) <= free / 2


def _token_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Iterator[array[int]]:
    """Yield the token ids of texts as compact arrays, without empty ones, tokenizing some texts at a time."""
    for start in range(0, len(texts), 1024):
        yield from (array("i", ids[:max_length]) for ids in token_ids(tokenizer, texts[start : start + 1024]) if ids)


def _sample(rows: Sequence[array[int]], max_tokens: int | None) -> Sequence[array[int]]:
    """Sample rows, with a fixed seed, until they have ``max_tokens`` tokens; take all rows if they have fewer."""
    if max_tokens is None or sum(map(len, rows)) <= max_tokens:
        return rows
    order = random.Random(0).sample(rows, len(rows))
    before = accumulate(map(len, order), initial=0)
    return [row for row, tokens in zip(order, before, strict=False) if tokens < max_tokens]


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
    """Add this rank's batches of token ids to the sums; call ``after`` with the number of batches done on all ranks."""
    top = max(layers, key=lambda layer: layer.index)
    positions = torch.empty(0)

    def observe(layer: ExpertLayer, rows: KeyRows) -> None:
        if len(rows.counts) == 1:
            ((expert, _),) = rows.counts.items()
            sums[layer.index].add(expert, rows.key, rows.gate)
        elif rows.counts:
            sums[layer.index].add_all(rows)

    with inference(model), stream_keys(layers, lambda: positions, observe, top, grouped):
        for number, (batch, mine) in enumerate(ranks.shard(batches), 1):
            ids, mask = (x.to(model.device) for x in pad(batch, pad_token))
            # experts need not be run on padding, nor on a batch that another rank adds
            positions = (mask * mine).flatten().nonzero().squeeze(-1)
            layer_output(model, top, ids, mask, position_ids(mask))
            for summed in sums.values():
                summed.tokens += len(positions)
            after(min(number * ranks.size, len(batches)))
    ranks.check_errors()


class _Unfinished:
    """The sums of an unfinished pass, saved from time to time."""

    def __init__(self, sums: Mapping[int, SecondMoments], cache: MomentsCache | None, key: str, ranks: Ranks) -> None:
        self.sums, self.cache, self.key, self.ranks = sums, cache, key, ranks
        self._texts = torch.zeros(1, dtype=torch.long)
        self._saved = time.monotonic()

    def begin(self) -> int:
        """Restore the saved sums, or set them to zero; return the number of texts that they contain."""
        self._texts.zero_()
        self._clear(everywhere=True)
        if self.cache is not None and self.cache.load(self.key, self._tensors(), self.ranks, self._parts()):
            self._clear()
            log.info("second moments: resuming an interrupted pass after %d texts", int(self._texts))
        return int(self._texts)

    def save(self, texts: int) -> None:
        """Save the sums of the longest ``texts`` texts, if the time since the last save is long enough."""
        if self.cache is None or not self.ranks.any(time.monotonic() - self._saved >= self.cache.save_every):
            return
        for summed in self.sums.values():
            summed.all_reduce(self.ranks)
        self._texts.fill_(texts)
        self.cache.save(self.key, self._tensors(), self.ranks, self._parts())
        self._clear()
        self._saved = time.monotonic()

    def drop(self) -> None:
        """Remove the saved sums after the pass."""
        if self.cache is not None:
            self.cache.drop(self.key, self.ranks)

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"{index}.{name}": x for index, part in self.sums.items() for name, x in part.tensors().items()}
        return {**named, "texts": self._texts}

    def _parts(self) -> dict[str, Part]:
        return {f"{index}.{name}": part for index, x in self.sums.items() for name, part in x.parts().items()}

    def _clear(self, everywhere: bool = False) -> None:
        # after an all-reduce the ranks hold the total, which the next all-reduce must count once
        parts = self._parts()
        for name, tensor in self._tensors().items():
            if name != "texts" and (everywhere or not parts.get(name, Part()).is_counted(self.ranks)):
                tensor.zero_()
