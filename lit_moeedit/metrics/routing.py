"""How much the routing of tokens to experts changed, and how evenly it uses the experts.

All metrics take mappings from layer index to tensor. Layers that a metric was not built for are ignored, so one
capture of the whole model serves every metric. ``before`` and ``after`` must hold the same tokens in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Probabilities below the smallest normal float32 count as that number, so that no logarithm is infinite.
_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def _routing_similarity_update(before: Tensor, after: Tensor, where: str = "") -> tuple[Tensor, int]:
    """Return the sum over tokens of the overlap of ``before`` and ``after``, ``[N, k]`` (float32 scalar), and N.

    Errors are those of :func:`routing_similarity`; ``where`` starts their messages, here and below.
    """
    _check_indices(before, f"{where}`before`")
    _check_indices(after, f"{where}`after`")
    _check_same_shape(before, after, where)
    shared = (before.unsqueeze(2) == after.unsqueeze(1)).sum((1, 2))
    # Explicit float32 here and in the states: half-precision training changes torch's default dtype.
    return (shared.float() / (2 * before.shape[1] - shared)).sum(), before.shape[0]


def _routing_similarity_compute(overlap: Tensor, tokens: Tensor | int) -> Tensor:
    """Divide summed overlaps by numbers of tokens, both of one shape; NaN where there were no tokens."""
    return overlap / tokens


def routing_similarity(before: Tensor, after: Tensor) -> Tensor:
    r"""Mean Jaccard overlap of a token's top-k expert set before and after an edit.

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
    return _routing_similarity_compute(*_routing_similarity_update(before, after))


def _routing_divergence_update(
    before: Tensor, after: Tensor, logits: bool = False, where: str = ""
) -> tuple[Tensor, Tensor, int]:
    """Return the sums over tokens of KL and JS of ``before`` and ``after``, ``[N, E]`` (float32 scalars), and N."""
    log_p = _log_probabilities(before, logits, f"{where}`before`")
    log_q = _log_probabilities(after, logits, f"{where}`after`")
    _check_same_shape(before, after, where)
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
    kl = -(p * log_ratio).sum(1)
    # log(m / p) = log1p(expm1(log(q / p)) / 2) is exactly 0 for p = q and stays accurate for small changes.
    js = -(p * (log_ratio.expm1() / 2).log1p() + q * ((-log_ratio).expm1() / 2).log1p()).sum(1) / 2
    # Both are non-negative; only rounding can say otherwise.
    return kl.clamp_min(0).sum(), js.clamp_min(0).sum(), before.shape[0]


def _routing_divergence_compute(kl: Tensor, js: Tensor, tokens: Tensor | int) -> tuple[Tensor, Tensor]:
    """Divide summed divergences by numbers of tokens, all of one shape; NaN where there were no tokens."""
    return kl / tokens, js / tokens


def routing_divergence(before: Tensor, after: Tensor, logits: bool = False) -> tuple[Tensor, Tensor]:
    r"""Mean Kullback-Leibler and Jensen-Shannon divergence of the routing distributions before and after an edit.

    .. math::
        \mathrm{KL}(p \| q) = \sum_j p_j \log \frac{p_j}{q_j}, \qquad
        \mathrm{JS}(p, q) = \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \quad m = \tfrac12 (p + q)

    Computed in float32. Probabilities are clamped from below to the smallest normal float32, 1.2e-38: then
    ``0 log 0`` is 0, and an expert that lost all its probability adds ``p (log p + 87.3)`` to KL instead of infinity.

    Args:
        before: Routing probabilities (or logits) ``[N, E]``, floating point. Rows of probabilities are divided by
            their sum, which removes the rounding of half precision and admits routers with sigmoid scores.
        after: The same for the same tokens after the edit.
        logits: Whether both tensors hold logits (``-inf`` is allowed for masked experts).

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
    return _routing_divergence_compute(*_routing_divergence_update(before, after, logits))


def _expert_load_update(indices: Tensor, num_experts: int, where: str = "") -> Tensor:
    """Return how many of the indices ``[N, k]`` name each expert, ``[E]`` long."""
    _check_indices(indices, f"{where}`experts`")
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"{where}Expected expert indices in [0, {num_experts}), got [{low}, {high}].")
    return torch.bincount(indices.reshape(-1), minlength=num_experts)


def _expert_load_compute(counts: Tensor) -> Tensor:
    """Turn counts ``[..., E]`` into shares of the same shape that sum to 1 over the last axis; NaN without tokens."""
    return counts.float() / counts.sum(-1, keepdim=True)


def expert_load(indices: Tensor, num_experts: int) -> Tensor:
    """Share of the routed (token, expert) pairs that each expert receives.

    Args:
        indices: Expert indices ``[N, k]``, any integer dtype.
        num_experts: Number of experts E of the layer, at least 2.

    Returns:
        Shares ``[E]`` that sum to 1; NaN when N is 0.

    Raises:
        ValueError: If ``indices`` is not an integer ``[N, k]`` with k >= 1, an index lies outside [0, E), or
            ``num_experts`` is below 2.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import expert_load
        >>> expert_load(tensor([[0, 1], [1, 2]]), num_experts=4)
        tensor([0.2500, 0.5000, 0.2500, 0.0000])

    """
    _check_num_experts(num_experts)
    return _expert_load_compute(_expert_load_update(indices, num_experts))


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
        self.layers = _check_layers(layers)
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
        _check_present(self.layers, before=before, after=after)
        sums = [_routing_similarity_update(before[i], after[i], f"Layer {i}: ") for i in self.layers]
        for row, (overlap, tokens) in enumerate(sums):
            self.overlap[row] += overlap.to(self.overlap.device)
            self.tokens[row] += tokens

    def compute(self) -> dict[str, Tensor]:
        """Return the mean overlap of each layer and their mean."""
        return _by_layer(_routing_similarity_compute(self.overlap, self.tokens), self.layers)

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
        return _plot_layers(self, self.compute() if val is None else val, {"routing similarity": ""}, ax)


class RoutingDivergence(Metric):
    """Mean KL(before || after) and Jensen-Shannon divergence of the routing distributions in nats, per layer.

    ``compute`` returns ``{"kl/mean", "kl/layer_{index}", ..., "js/mean", "js/layer_{index}", ...}``, where the means
    are taken over the layers' means. A layer without tokens is NaN, and then so are the means. See
    :func:`routing_divergence` for the formulas and for how zeros are treated.

    Args:
        layers: Indices of the layers to compare.
        logits: Whether ``update`` receives logits instead of probabilities.
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

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    kl: Tensor
    js: Tensor
    tokens: Tensor

    def __init__(self, layers: Sequence[int], logits: bool = False, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.layers = _check_layers(layers)
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
        _check_present(self.layers, before=before, after=after)
        sums = [_routing_divergence_update(before[i], after[i], self.logits, f"Layer {i}: ") for i in self.layers]
        for row, (kl, js, tokens) in enumerate(sums):
            self.kl[row] += kl.to(self.kl.device)
            self.js[row] += js.to(self.js.device)
            self.tokens[row] += tokens

    def compute(self) -> dict[str, Tensor]:
        """Return the mean divergences of each layer and their means."""
        kl, js = _routing_divergence_compute(self.kl, self.js, self.tokens)
        return _by_layer(kl, self.layers, "kl/") | _by_layer(js, self.layers, "js/")

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot two bars per layer, or lines over time, as :meth:`RoutingSimilarity.plot` does."""
        return _plot_layers(self, self.compute() if val is None else val, {"KL (nats)": "kl/", "JS (nats)": "js/"}, ax)


class ExpertLoad(Metric):
    r"""How evenly the routed (token, expert) pairs of each layer spread over its experts.

    With ``s_j`` the share of expert j, ``compute`` returns scalars per layer and their means over layers:

    - ``"entropy/mean"``, ``"entropy/layer_{index}"``: :math:`-\sum_j s_j \log s_j / \log E`, in [0, 1], 1 = balanced;
    - ``"max_share/..."``: :math:`E \max_j s_j`, in [1, E], 1 = balanced;
    - ``"dead/..."``: share of the experts that no token reached, in [0, 1).

    A layer without tokens is NaN, and then so are the means.

    Args:
        num_experts: Number of experts E of each layer, at least 2.
        layers: Indices of the layers to watch.
        kwargs: Keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``num_experts`` is below 2, or ``layers`` is empty, repeats an index or holds anything but
            non-negative integers.

    Example:
        >>> from torch import tensor
        >>> from lit_moeedit.metrics import ExpertLoad
        >>> metric = ExpertLoad(num_experts=4, layers=[3])
        >>> metric.update({3: tensor([[0, 1], [1, 2]])})
        >>> metric.load()
        tensor([[0.2500, 0.5000, 0.2500, 0.0000]])
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items() if name.endswith("mean")}
        {'entropy/mean': 0.75, 'max_share/mean': 2.0, 'dead/mean': 0.25}

    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_lower_bound = 0.0

    counts: Tensor

    def __init__(self, num_experts: int, layers: Sequence[int], **kwargs: object) -> None:
        super().__init__(**kwargs)
        _check_num_experts(num_experts)
        self.num_experts = num_experts
        self.layers = _check_layers(layers)
        counts = torch.zeros(len(self.layers), num_experts, dtype=torch.long)
        self.add_state("counts", counts, dist_reduce_fx="sum")

    def update(self, experts: Mapping[int, Tensor]) -> None:
        """Add tokens.

        Args:
            experts: Layer index to expert indices ``[N, k]``, integer; k may differ by layer.

        Raises:
            ValueError: If a layer is missing, a tensor is not an integer ``[N, k]`` with k >= 1, or an index lies
                outside [0, E).

        """
        _check_present(self.layers, experts=experts)
        counts = [_expert_load_update(experts[i], self.num_experts, f"Layer {i}: ") for i in self.layers]
        self.counts += torch.stack([count.to(self.counts.device) for count in counts])

    def compute(self) -> dict[str, Tensor]:
        """Return the entropy, the largest share and the share of dead experts of each layer, and their means."""
        shares = _expert_load_compute(self.counts)
        # Rounding may lift the entropy of a balanced layer above 1.
        entropy = (torch.special.entr(shares).sum(1) / math.log(self.num_experts)).clamp_max(1)
        dead = (shares == 0).to(shares.dtype).mean(1).where(self.counts.sum(1) > 0, math.nan)
        return (
            _by_layer(entropy, self.layers, "entropy/")
            | _by_layer(shares.amax(1) * self.num_experts, self.layers, "max_share/")
            | _by_layer(dead, self.layers, "dead/")
        )

    def load(self) -> Tensor:
        """Return the share of each expert per layer, ``[L, E]`` in the order of ``layers``; NaN without tokens.

        Like ``compute``, this sums over processes when ``torch.distributed`` runs, so every process must call it.
        """
        sync = self._to_sync and not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=sync, should_unsync=sync):
            return _expert_load_compute(self.counts)

    def plot(
        self, val: Tensor | dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot a heat map of the shares, layers by experts, or the values of ``compute``, or lines over time.

        Args:
            val: Shares ``[L, E]`` from ``load``, a result of ``compute`` or ``forward``, or a sequence of results;
                ``None`` calls ``load``.
            ax: Axes to draw into; ``None`` makes a figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.
            ValueError: If ``val`` is a tensor of another shape.

        """
        val = self.load() if val is None else val
        if not isinstance(val, Tensor):
            series = {"entropy": "entropy/", "largest share x E": "max_share/", "dead experts": "dead/"}
            return _plot_layers(self, val, series, ax)
        if val.shape != self.counts.shape:
            raise ValueError(f"Expected `val` of shape {list(self.counts.shape)} [L, E], got {list(val.shape)}.")
        figure, ax = _axes(ax)
        image = ax.imshow(val.detach().cpu().numpy(), aspect="auto", interpolation="nearest", vmin=0.0)
        figure.colorbar(image, ax=ax, label="share of routed tokens")
        ax.set_yticks(range(len(self.layers)), [str(layer) for layer in self.layers])
        ax.set_xlabel("expert")
        ax.set_ylabel("layer")
        return figure, ax


def _check_layers(layers: Sequence[int]) -> tuple[int, ...]:
    layers = tuple(layers)
    valid = all(isinstance(layer, int) and layer >= 0 for layer in layers)
    if not layers or not valid or len(set(layers)) != len(layers):
        raise ValueError(f"Expected `layers` to hold at least one layer index, each >= 0 and once, got {layers}.")
    return layers


def _check_num_experts(num_experts: int) -> None:
    if num_experts < 2:
        raise ValueError(f"Expected `num_experts` >= 2, got {num_experts}.")


def _check_present(layers: tuple[int, ...], **arguments: Mapping[int, Tensor]) -> None:
    for name, mapping in arguments.items():
        missing = [layer for layer in layers if layer not in mapping]
        if missing:
            raise ValueError(f"Expected `{name}` to hold layers {list(layers)}, got {list(mapping)}: no {missing}.")


def _check_indices(indices: Tensor, what: str) -> None:
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"Expected {what} to hold integer expert indices, got {indices.dtype}.")
    if indices.ndim != 2 or indices.shape[1] < 1:
        raise ValueError(f"Expected {what} of shape [N, k] with k >= 1, got {list(indices.shape)}.")


def _check_same_shape(before: Tensor, after: Tensor, where: str) -> None:
    if before.shape != after.shape:
        shapes = f"{list(before.shape)} and {list(after.shape)}"
        raise ValueError(f"{where}Expected `before` and `after` of the same shape, got {shapes}.")


def _log_probabilities(scores: Tensor, logits: bool, what: str) -> Tensor:
    """Return the clamped log-probabilities ``[N, E]``, float32, of ``scores [N, E]``; ValueError if it has none."""
    if not scores.is_floating_point():
        raise ValueError(f"Expected {what} to be floating point, got {scores.dtype}.")
    if scores.ndim != 2 or scores.shape[1] < 1:
        raise ValueError(f"Expected {what} of shape [N, E] with E >= 1, got {list(scores.shape)}.")
    scores = scores.float()
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
        log_probabilities = (scores / total).log()
    return log_probabilities.clamp_min(_LOG_TINY)


def _by_layer(values: Tensor, layers: tuple[int, ...], prefix: str = "") -> dict[str, Tensor]:
    """Name the entries of ``values [L]`` by layer and put their mean in front."""
    names = (f"{prefix}layer_{layer}" for layer in layers)
    return {f"{prefix}mean": values.mean(), **dict(zip(names, values, strict=True))}


def _axes(ax: Axes | None) -> tuple[Any, Axes]:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ModuleNotFoundError("Plotting needs `matplotlib`: pip install matplotlib") from error
    return plt.subplots() if ax is None else (ax.get_figure(), ax)


def _plot_layers(
    metric: RoutingSimilarity | RoutingDivergence | ExpertLoad,
    val: dict[str, Tensor] | Sequence[dict[str, Tensor]],
    series: dict[str, str],
    ax: Axes | None,
) -> tuple[Figure, Axes]:
    """Draw one group of bars per layer, a bar for each entry ``label: key prefix`` of ``series``."""
    figure, ax = _axes(ax)
    if not isinstance(val, Mapping):
        metric._plot(val, ax)
        return figure, ax
    width = 0.8 / len(series)
    for position, (label, prefix) in enumerate(series.items()):
        heights = [float(val[f"{prefix}layer_{layer}"]) for layer in metric.layers]
        places = [place + (position + 0.5) * width - 0.4 for place in range(len(heights))]
        mean = float(val[f"{prefix}mean"])
        bars = ax.bar(places, heights, width, label=f"{label}, mean {mean:.3g}")
        ax.axhline(mean, linestyle="--", linewidth=1, color=bars.patches[0].get_facecolor())
    ax.set_xticks(range(len(metric.layers)), [str(layer) for layer in metric.layers])
    ax.set_xlabel("layer")
    ax.set_ylim(bottom=metric.plot_lower_bound, top=metric.plot_upper_bound)
    ax.legend()
    return figure, ax
