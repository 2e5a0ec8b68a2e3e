"""The load of the experts of each layer under the routing of tokens.

As in :mod:`lit_moeedit.metrics.routing`, a metric ignores layers that are not among its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics._layers import by_layer, check_indices, check_layers, check_present
from lit_moeedit.metrics._plots import open_axes, plot_layers, tick_integers, tick_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _expert_load_update(indices: Tensor, num_experts: int, where: str = "") -> Tensor:
    """Count the occurrences of each expert in the indices ``[N, k]``, as ``[E]`` long.

    Errors are those of :func:`expert_load` except for ``num_experts``; ``where`` is the start of their messages.
    """
    check_indices(indices, f"{where}`experts`")
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= num_experts:
            raise ValueError(f"{where}Expected expert indices in [0, {num_experts}), got [{low}, {high}].")
    return torch.bincount(indices.reshape(-1), minlength=num_experts)


def _expert_load_compute(counts: Tensor) -> Tensor:
    """Turn counts ``[..., E]`` into shares of the same shape that sum to 1 over the last axis; NaN without tokens."""
    return counts.float() / counts.sum(-1, keepdim=True)


def expert_load(indices: Tensor, num_experts: int) -> Tensor:
    """Compute the share of the routed (token, expert) pairs that each expert receives.

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


class ExpertLoad(Metric):
    r"""Balance of the routed (token, expert) pairs of each layer over its experts.

    With ``s_j`` the share of expert j, ``compute`` returns scalars per layer and their means over layers:

    - ``"entropy/mean"``, ``"entropy/layer_{index}"``: :math:`-\sum_j s_j \log s_j / \log E`, in [0, 1], 1 = balanced;
    - ``"max_share/..."``: :math:`E \max_j s_j`, in [1, E], 1 = balanced;
    - ``"dead/..."``: share of the experts to which no token is routed, in [0, 1).

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
        self.layers = check_layers(layers)
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
        check_present(self.layers, experts=experts)
        counts = [_expert_load_update(experts[i], self.num_experts, f"Layer {i}: ") for i in self.layers]
        self.counts += torch.stack([count.to(self.counts.device) for count in counts])

    def compute(self) -> dict[str, Tensor]:
        """Return the entropy, the largest share and the share of dead experts of each layer, and their means."""
        shares = _expert_load_compute(self.counts)
        # Rounding may lift the entropy of a balanced layer above 1.
        entropy = (torch.special.entr(shares).sum(1) / math.log(self.num_experts)).clamp_max(1)
        dead = (shares == 0).to(shares.dtype).mean(1).where(self.counts.sum(1) > 0, math.nan)
        return (
            by_layer(entropy, self.layers, "entropy/")
            | by_layer(shares.amax(1) * self.num_experts, self.layers, "max_share/")
            | by_layer(dead, self.layers, "dead/")
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
            series = {
                "entropy (1 = balanced)": "entropy/",
                "largest share x E (1 = balanced)": "max_share/",
                "share of dead experts": "dead/",
            }
            return plot_layers(val, self.layers, series, "expert load (no unit)", ax)
        if val.shape != self.counts.shape:
            raise ValueError(f"Expected `val` of shape {list(self.counts.shape)} [L, E], got {list(val.shape)}.")
        figure, ax = open_axes(ax)
        top = float(val.nan_to_num().max()) or 1.0
        image = ax.imshow(val.detach().cpu().numpy(), aspect="auto", interpolation="nearest", vmin=0.0, vmax=top)
        figure.colorbar(image, ax=ax, label="share of the layer's routed (token, expert) pairs")
        tick_layers(ax.yaxis, self.layers)
        tick_integers(ax.xaxis, "expert")
        return figure, ax


def _check_num_experts(num_experts: int) -> None:
    if num_experts < 2:
        raise ValueError(f"Expected `num_experts` >= 2, got {num_experts}.")
