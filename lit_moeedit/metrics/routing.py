"""Changes of the routing of tokens to experts by an edit.

The metrics take mappings from layer index to tensor. A metric ignores layers that are not among its own, so one
recording of the whole model serves every metric. ``before`` and ``after`` must have the same tokens in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics._layers import by_layer, check_indices, check_layers, check_present
from lit_moeedit.metrics._plots import plot_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lower bound of log-probabilities: the smallest normal float32, so that no logarithm is infinite.
_TINY = torch.finfo(torch.float32).tiny
_LOG_TINY = math.log(_TINY)


def _routing_similarity_update(before: Tensor, after: Tensor, where: str = "") -> tuple[Tensor, int]:
    """Return the sum over tokens of the overlap of ``before`` and ``after``, ``[N, k]`` (float32 scalar), and N.

    Errors are those of :func:`routing_similarity`; ``where`` is the start of their messages, here and below.
    """
    check_indices(before, f"{where}`before`")
    check_indices(after, f"{where}`after`")
    _check_same_shape(before, after, where)
    shared = (before.unsqueeze(2) == after.unsqueeze(1)).sum((1, 2))
    # Explicit float32 here and in the states: half-precision training changes torch's default dtype.
    return (shared.float() / (2 * before.shape[1] - shared)).sum(), before.shape[0]


def routing_similarity(before: Tensor, after: Tensor) -> Tensor:
    r"""Compute the mean Jaccard overlap of a token's top-k expert set before and after an edit.

    .. math:: \frac{1}{N} \sum_n \frac{|A_n \cap B_n|}{|A_n \cup B_n|}

    Args:
        before: Expert indices ``[N, k]``, any integer dtype. The indices of a row must be distinct, as top-k gives
            them; their order does not matter.
        after: Expert indices ``[N, k]`` of the same tokens after the edit.

    Returns:
        Scalar in [0, 1]; NaN when N is 0.

    Raises:
        ValueError: If a tensor is not an integer ``[N, k]`` with k >= 1, or the shapes differ.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import routing_similarity
        >>> routing_similarity(tensor([[0, 1], [2, 3]]), tensor([[1, 0], [2, 5]]))
        tensor(0.6667)

    """
    overlap, tokens = _routing_similarity_update(before, after)
    return overlap / tokens


def _routing_divergence_update(
    before: Tensor, after: Tensor, logits: bool = False, where: str = ""
) -> tuple[Tensor, Tensor, int]:
    """Return the sums over tokens of KL and JS of ``before`` and ``after``, ``[N, E]`` (scalars), and N."""
    log_p = _log_probabilities(before, logits, f"{where}`before`")
    log_q = _log_probabilities(after, logits, f"{where}`after`")
    _check_same_shape(before, after, where)
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
    kl = -(p * log_ratio).sum(1)
    # log(m / p) = log1p(expm1(log(q / p)) / 2) is exactly 0 for p = q and stays accurate for small changes.
    js = -(p * (log_ratio.expm1() / 2).log1p() + q * ((-log_ratio).expm1() / 2).log1p()).sum(1) / 2
    # Both are non-negative but for rounding.
    return kl.clamp_min(0).sum(), js.clamp_min(0).sum(), before.shape[0]


def routing_divergence(before: Tensor, after: Tensor, logits: bool = False) -> tuple[Tensor, Tensor]:
    r"""Compute the mean KL and Jensen-Shannon divergence of the routing distributions before and after an edit.

    .. math::
        \mathrm{KL}(p \| q) = \sum_j p_j \log \frac{p_j}{q_j}, \qquad
        \mathrm{JS}(p, q) = \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \quad m = \tfrac12 (p + q)

    Computed in float32 (in float64 for float64 inputs), and differentiable. Probabilities are clamped from below to the
    smallest normal float32, 1.2e-38: then ``0 log 0`` is 0, and an expert whose probability falls to 0 adds
    ``p (log p + 87.3)`` to KL instead of infinity.

    Args:
        before: Routing probabilities (or logits) ``[N, E]``, floating point. Rows of probabilities are divided by
            their sum, to remove the rounding of half precision and to allow routers with sigmoid scores.
        after: The same for the same tokens after the edit.
        logits: True if both tensors hold logits (``-inf`` is allowed for masked experts).

    Returns:
        KL(before || after) and JS in nats, scalars; JS lies in [0, log 2]. Both are NaN when N is 0.

    Raises:
        ValueError: If a tensor is not a floating point ``[N, E]``, the shapes differ, or a row is no distribution.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import routing_divergence
        >>> routing_divergence(tensor([[0.5, 0.5, 0.0]]), tensor([[0.25, 0.75, 0.0]]))
        (tensor(0.1438), tensor(0.0338))

    """
    kl, js, tokens = _routing_divergence_update(before, after, logits)
    return kl / tokens, js / tokens


class RoutingSimilarity(Metric):
    """Mean Jaccard overlap of a token's top-k expert set before and after an edit, per layer.

    ``compute`` returns ``{"mean", "layer_{index}", ...}``, scalars in [0, 1], where the mean is taken over the layers'
    means. A layer without tokens is NaN, and then so is the mean. See :func:`routing_similarity` for the formula.

    Args:
        layers: Indices of the layers to compare.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``layers`` is empty, repeats an index or holds anything but non-negative integers.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import RoutingSimilarity
        >>> metric = RoutingSimilarity(layers=[3, 5])
        >>> before = {3: tensor([[0, 1], [2, 3]]), 5: tensor([[0, 1], [2, 3]])}
        >>> after = {3: tensor([[1, 0], [2, 5]]), 5: tensor([[1, 0], [3, 2]])}
        >>> metric(before, after)
        {'mean': tensor(0.8333), 'layer_3': tensor(0.6667), 'layer_5': tensor(1.)}

    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    overlap: Tensor
    tokens: Tensor

    def __init__(self, layers: Sequence[int], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.layers = check_layers(layers)
        self.add_state("overlap", torch.zeros(len(self.layers), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(self.layers), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> None:
        """Add tokens.

        Args:
            before: Layer index to expert indices ``[N, k]``, integer, distinct within a row; k may differ by layer.
            after: The same for the same tokens after the edit.

        Raises:
            ValueError: If a layer is missing, a tensor is not an integer ``[N, k]`` with k >= 1, or shapes differ.

        """
        check_present(self.layers, before=before, after=after)
        sums = [_routing_similarity_update(before[i], after[i], f"Layer {i}: ") for i in self.layers]
        for row, (overlap, tokens) in enumerate(sums):
            self.overlap[row] += overlap.to(self.overlap.device)
            self.tokens[row] += tokens

    def compute(self) -> dict[str, Tensor]:
        """Return the mean overlap of each layer and their mean."""
        return by_layer(self.overlap / self.tokens, self.layers)

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot one bar per layer, or lines over time.

        Args:
            val: A result of ``compute`` or ``forward``, or a sequence of them; ``None`` computes now.
            ax: Axes to draw into; ``None`` makes a figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        """
        val = self.compute() if val is None else val
        series = {"Jaccard overlap": ""}
        return plot_layers(val, self.layers, series, "routing similarity", ax, self.plot_upper_bound)


class RoutingDivergence(Metric):
    """Mean KL(before || after) and Jensen-Shannon divergence of the routing distributions in nats, per layer.

    ``compute`` returns ``{"kl/mean", "kl/layer_{index}", ..., "js/mean", "js/layer_{index}", ...}``, where the means
    are taken over the layers' means. A layer without tokens is NaN, and then so are the means. See
    :func:`routing_divergence` for the formulas and for how zeros are treated. The results of ``forward`` can be
    differentiated; those of ``compute`` after it are sums over batches without a graph.

    Args:
        layers: Indices of the layers to compare.
        logits: True if ``update`` receives logits instead of probabilities.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``layers`` is empty, repeats an index or holds anything but non-negative integers.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import RoutingDivergence
        >>> metric = RoutingDivergence(layers=[3])
        >>> metric({3: tensor([[0.5, 0.5]])}, {3: tensor([[0.25, 0.75]])})
        {'kl/mean': tensor(0.1438), 'kl/layer_3': tensor(0.1438), 'js/mean': tensor(0.0338), 'js/layer_3': tensor(0.0338)}

    """  # noqa: E501 - the doctest prints one line

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    kl: Tensor
    js: Tensor
    tokens: Tensor

    def __init__(self, layers: Sequence[int], logits: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.layers = check_layers(layers)
        self.logits = logits
        self.add_state("kl", torch.zeros(len(self.layers), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("js", torch.zeros(len(self.layers), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(self.layers), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> None:
        """Add tokens.

        Args:
            before: Layer index to routing probabilities (logits with ``logits=True``) ``[N, E]``, floating point.
            after: The same for the same tokens after the edit.

        Raises:
            ValueError: If a layer is missing, a tensor is not a floating point ``[N, E]``, shapes differ, or a row is
                no distribution.

        """
        check_present(self.layers, before=before, after=after)
        sums = [_routing_divergence_update(before[i], after[i], self.logits, f"Layer {i}: ") for i in self.layers]
        for row, (kl, js, tokens) in enumerate(sums):
            self.kl[row] += kl.to(self.kl.device)
            self.js[row] += js.to(self.js.device)
            self.tokens[row] += tokens

    def compute(self) -> dict[str, Tensor]:
        """Return the mean divergences of each layer and their means."""
        kl, js = self.kl / self.tokens, self.js / self.tokens
        return by_layer(kl, self.layers, "kl/") | by_layer(js, self.layers, "js/")

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot two bars per layer, or lines over time, as :meth:`RoutingSimilarity.plot` does."""
        val = self.compute() if val is None else val
        series = {"KL(before || after)": "kl/", "Jensen-Shannon": "js/"}
        return plot_layers(val, self.layers, series, "routing divergence (nats)", ax)


def _check_same_shape(before: Tensor, after: Tensor, where: str) -> None:
    if before.shape != after.shape:
        shapes = f"{list(before.shape)} and {list(after.shape)}"
        raise ValueError(f"{where}Expected `before` and `after` of the same shape, got {shapes}.")


def _log_probabilities(scores: Tensor, logits: bool, what: str) -> Tensor:
    """Return the clamped log-probabilities of ``scores [N, E]`` in float32 or float64; ValueError if it has none."""
    if not scores.is_floating_point():
        raise ValueError(f"Expected {what} to be floating point, got {scores.dtype}.")
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"Expected {what} of shape [N, E] with E >= 1, got {list(scores.shape)}.")
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if logits:
        log_probabilities = scores.log_softmax(1)
        if log_probabilities.isnan().any():
            raise ValueError(f"Expected {what} to hold logits, got a row with NaN, +inf or nothing but -inf.")
    else:
        total = scores.sum(1, keepdim=True)
        if not bool(((scores >= 0).all(1, keepdim=True) & (total > 0) & total.isfinite()).all()):
            raise ValueError(
                f"Expected {what} to hold probabilities, got a row with a negative or non-finite value or with sum 0 "
                "(for logits set `logits=True`)."
            )
        # clamped before the logarithm, because the gradient of log at 0 is not finite
        log_probabilities = (scores / total).clamp_min(_TINY).log()
    return log_probabilities.clamp_min(_LOG_TINY)
