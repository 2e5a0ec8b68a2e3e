"""Text that an edit is not about, on which perplexity and routing are compared before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import IGNORED_LABEL, encode, pad, pad_id, token_batches
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.editing.evaluation import perplexity
from lit_moeedit.editing.routing_trace import MAX_PROBE_TOKENS, RoutingTrace, trace_routing
from lit_moeedit.metrics import RoutingSimilarity
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.sharding.ranks import Ranks

MAX_PROBE_TEXTS = 256
"""Maximum number of texts that are used."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ProbeState:
    """Measurements on the probe text with the weights of one moment.

    Attributes:
        perplexity: perplexity of the texts; ``None`` if it was not asked for.
        routing: routing of their tokens; ``None`` if it was not asked for.
    """

    perplexity: float | None = None
    routing: RoutingTrace | None = None

    def perplexity_ratio(self, earlier: Self) -> float | None:
        """Divide this perplexity by that of an earlier moment; ``None`` if one of them is not known."""
        if self.perplexity is None or earlier.perplexity is None:
            return None
        return self.perplexity / earlier.perplexity

    def routing_similarity(self, earlier: Self) -> float | None:
        """Compute the mean over layers of the Jaccard overlap of each token's experts; ``None`` if not known."""
        if self.routing is None or earlier.routing is None:
            return None
        # every rank has the whole trace
        metric = RoutingSimilarity(list(self.routing.experts), sync_on_compute=False)
        metric.update(earlier.routing.experts, self.routing.experts)
        return float(metric.compute()["mean"])


class Probe:
    """Measures a model on texts that must stay as they are.

    Args:
        tokenizer: the model's tokenizer.
        texts: the texts, of which the first 256 are used, cut to 256 tokens each.
        perplexity: whether to measure perplexity.
        routing: whether to trace routing.

    Raises:
        ValueError: if there is no text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], perplexity: bool = True, routing: bool = True
    ) -> None:
        if not texts:
            raise ValueError("there is no probe text on which an edit could be measured")
        self.tokenizer, self.perplexity, self.routing = tokenizer, perplexity, routing
        self.texts = cut_texts(tokenizer, list(texts)[:MAX_PROBE_TEXTS], MAX_PROBE_TOKENS)

    def measure(self, model: PreTrainedModel, ranks: Ranks | None = None) -> ProbeState:
        """Measure the texts with the present weights. Every rank calls this and gets the same result."""
        ranks = ranks or Ranks.current()
        found = perplexity(model, self._batches(model, ranks), ranks) if self.perplexity else None
        return ProbeState(
            found, trace_routing(model, self.tokenizer, self.texts, ranks=ranks) if self.routing else None
        )

    def _batches(self, model: PreTrainedModel, ranks: Ranks) -> Iterator[dict[str, Tensor]]:
        """Make this rank's batches of the texts."""
        rows = [e.ids[:MAX_PROBE_TOKENS] for e in encode(self.tokenizer, self.texts, [""] * len(self.texts))]
        lengths = [len(row) for row in rows]
        batches = list(unpadded(token_batches(lengths, _BATCH_TOKENS), lengths, longest_padded(model)))
        # fewer batches than ranks: each rank runs all of them, which changes no average
        own = batches[ranks.rank :: ranks.size] if len(batches) >= ranks.size else batches
        for batch in own:
            ids, mask = pad([rows[i] for i in batch], pad_id(self.tokenizer))
            labels = torch.where(mask.bool(), ids, IGNORED_LABEL)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}
