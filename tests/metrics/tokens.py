"""Random routing for the tests of the metrics with one value per layer."""

import math

import torch
from hypothesis import settings
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics import ExpertLoad, RoutingDivergence

LAYERS = (3, 5)
NUM_EXPERTS = 12
few = settings(max_examples=40)


def top_k(tokens: int, k: int, seed: int, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Random distinct expert indices, [tokens, k]."""
    return torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k]


def distributions(tokens: int, seed: int, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Random sparse routing probabilities, [tokens, num_experts], each row with at least one zero and one non-zero."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, num_experts, generator=generator)
    keep = torch.rand(tokens, num_experts, generator=generator) < 0.7
    keep[:, 0], keep[:, 1] = True, False
    return logits.masked_fill(~keep, -math.inf).softmax(1)


def batch(metric: Metric, tokens: int, seed: int) -> tuple[dict[int, Tensor], ...]:
    """Arguments of one update of ``metric``; k differs between the layers."""
    names = 1 if isinstance(metric, ExpertLoad) else 2
    if isinstance(metric, RoutingDivergence):
        return tuple({i: distributions(tokens, seed * 100 + 10 * n + i) for i in LAYERS} for n in range(names))
    return tuple({i: top_k(tokens, i, seed * 100 + 10 * n + i) for i in LAYERS} for n in range(names))
