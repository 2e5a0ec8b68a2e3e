"""The base of metrics that are means of named values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics._plots import plot_bars

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def means(names: Sequence[str], sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Divide sums ``[n]`` by counts ``[n]`` to means by name, float32 scalars; NaN where nothing was counted."""
    return dict(zip(names, (sums / counts).float(), strict=True))


class Means(Metric):
    """A metric that is one mean for each of its ``names``.

    Attributes:
        names: Names of the results.
        unit: Label of their axis.
    """

    is_differentiable = False
    higher_is_better: bool | None = True
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    names: ClassVar[tuple[str, ...]]
    unit: ClassVar[str]
    sums: Tensor
    counts: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        # Float64, so that sums over batches and processes keep more digits than the result has.
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.names), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Add sums ``[n]`` and counts ``[n]``."""
        self.sums += sums.detach().to(self.sums)
        self.counts += counts.to(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name, NaN where nothing was counted."""
        return means(self.names, self.sums, self.counts)

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """Plot one bar per result, or lines over time.

        Args:
            val: A result of ``compute`` or ``forward``, or a sequence of them; ``None`` computes now.
            ax: Axes to draw into; ``None`` makes a figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        """
        val = self.compute() if val is None else val
        return plot_bars(val, self.unit, ax, (self.plot_lower_bound, self.plot_upper_bound))


def check_vector(name: str, values: Tensor, expected: str, has_dtype: bool) -> None:
    """Check that an argument is a vector of the expected kind.

    Raises:
        ValueError: If it is not.
    """
    if values.ndim != 1 or not has_dtype:
        raise ValueError(f"Expected `{name}` to be {expected} [N], got {values.dtype} {list(values.shape)}.")
