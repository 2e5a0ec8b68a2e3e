"""The routing of probe texts, which routing metrics compare."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import encode, pad, pad_id, position_ids
from lit_moeedit.data.lengths import cut_texts
from lit_moeedit.metrics import RoutingDivergence, RoutingSimilarity
from lit_moeedit.models.experts import ExpertLayer, expert_layers
from lit_moeedit.models.keys import Routing, watch_routing
from lit_moeedit.models.padding import longest_padded, unpadded
from lit_moeedit.models.partial_forward import inference
from lit_moeedit.models.token_budget import TokenBudget
from lit_moeedit.sharding.backends import find_backend
from lit_moeedit.sharding.ranks import Ranks

MAX_PROBE_TOKENS = 256
"""Default of the maximum number of tokens of a probe text that are used."""


@dataclass(frozen=True)
class RoutingTrace:
    """Routing of ``N`` tokens, by layer index, on the CPU.

    Attributes:
        experts: chosen experts, int64 ``[N, k]``.
        probabilities: distribution over all experts, float32 ``[N, E]``: softmax of the router's logits if the model
            returns them, otherwise the normalised gates of the chosen experts.
    """

    experts: dict[int, Tensor]
    probabilities: dict[int, Tensor]


def compare_traces(before: RoutingTrace, after: RoutingTrace) -> dict[str, float]:
    """Compare two traces of the same texts.

    Returns:
        ``similarity/mean`` and ``similarity/layer_<index>`` (:class:`~lit_moeedit.metrics.RoutingSimilarity`), and
        likewise the quantities of :class:`~lit_moeedit.metrics.RoutingDivergence`, such as ``kl/mean``, in nats.
    """
    # every rank has the whole trace, so there is nothing to add up
    similarity = RoutingSimilarity(list(after.experts), sync_on_compute=False)
    divergence = RoutingDivergence(list(after.experts), sync_on_compute=False)
    similarity.update(before.experts, after.experts)
    divergence.update(before.probabilities, after.probabilities)
    found = {f"similarity/{name}": float(value) for name, value in similarity.compute().items()}
    return found | {name: float(value) for name, value in divergence.compute().items()}


def trace_routing(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    token_budget: int = 8192,
    max_length: int = MAX_PROBE_TOKENS,
    ranks: Ranks | None = None,
) -> RoutingTrace:
    """Run texts through the model and record the routing of every layer with experts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        texts: the probe texts. The trace has their tokens in the same order.
        token_budget: maximum number of tokens (with padding) in one forward. It is halved if memory runs out. Traces to
            be compared need the same budget, because batches of another shape may break a router's near ties
            differently.
        max_length: maximum number of tokens of a text; longer texts are truncated.
        ranks: the processes that trace the same texts. Each calls this.

    Raises:
        ValueError: if there is no text.
        TooLittleMemoryError: if memory does not suffice for the longest text alone.
    """
    if not texts:
        raise ValueError("there is no probe text whose routing could be traced")
    texts = cut_texts(tokenizer, texts, max_length)
    rows = [encoding.ids[:max_length] for encoding in encode(tokenizer, texts, [""] * len(texts))]
    longest = max(map(len, rows))
    budget = TokenBudget(token_budget, 0.0, model.device, ranks or Ranks.current())

    def run(tokens: int) -> RoutingTrace:
        return _trace(model, rows, max(1, tokens // longest), pad_id(tokenizer))

    return budget.run("routing", run, least=longest, most=longest * len(rows))


def _trace(model: PreTrainedModel, rows: Sequence[Sequence[int]], size: int, pad_token: int) -> RoutingTrace:
    """Trace rows of token ids, at most ``size`` in one forward."""
    layers = expert_layers(model)
    experts: dict[int, list[Tensor]] = {index: [] for index in layers}
    probabilities: dict[int, list[Tensor]] = {index: [] for index in layers}
    caught: dict[int, Routing] = {}

    def observe(layer: ExpertLayer, routing: Routing) -> None:
        caught[layer.index] = routing

    lengths = [len(row) for row in rows]
    together = (range(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
    batches = list(unpadded(together, lengths, longest_padded(model)))
    returns_logits = "output_router_logits" in inspect.signature(model.forward).parameters
    with inference(model), watch_routing(list(layers.values()), observe):
        for batch in batches:
            ids, mask = (x.to(model.device) for x in pad([rows[i] for i in batch], pad_token))
            real = mask.flatten().bool()
            with find_backend(model).forward(model):
                outputs = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=position_ids(mask),
                    use_cache=False,
                    **({"output_router_logits": True} if returns_logits else {}),
                )
            logits = getattr(outputs, "router_logits", None) or ()
            for number, (index, layer) in enumerate(layers.items()):
                routing = caught.pop(index)
                if len(logits) == len(layers):
                    distribution = logits[number].flatten(0, -2).float().softmax(-1)
                else:
                    distribution = torch.zeros(len(real), layer.num_experts, device=real.device)
                    distribution.scatter_(1, routing.experts, routing.gates.float().abs())
                    distribution /= distribution.sum(-1, keepdim=True)
                experts[index].append(routing.experts[real].cpu())
                probabilities[index].append(distribution[real].cpu())
    order = [row for batch in batches for row in batch]
    return RoutingTrace(
        {index: _in_order(parts, order, lengths) for index, parts in experts.items()},
        {index: _in_order(parts, order, lengths) for index, parts in probabilities.items()},
    )


def _in_order(parts: Sequence[Tensor], order: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Concatenate tokens of rows that were run in another order; they are returned in the order of the rows."""
    rows = torch.cat(list(parts)).split([lengths[row] for row in order])
    return torch.cat([row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])])
