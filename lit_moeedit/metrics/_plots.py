"""Plots of metrics: bars per layer for one result, lines for several. Only plotting needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_MAX_NAMES = 16  # more layers on an axis, or more lines in a legend, would overlap


def open_axes(ax: Axes | None, width: float = 6.4) -> tuple[Figure, Axes]:
    """Return ``ax`` and its figure, or new ones that are ``width`` inches wide.

    Raises:
        ModuleNotFoundError: If ``matplotlib`` is not installed.

    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ModuleNotFoundError("Plotting needs `matplotlib`: pip install matplotlib") from error
    if ax is None:
        _, ax = plt.subplots(figsize=(width, 4.8), layout="constrained")
    return cast("Figure", ax.get_figure()), ax


def bar_lengths(values: Iterable[float]) -> list[float]:
    """Replace NaN by 0, because a bar of length NaN would remove its place and its label from the axes."""
    return [0.0 if math.isnan(value) else value for value in values]


def plot_bars(
    val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    label: str,
    ax: Axes | None,
    bounds: tuple[float | None, float | None],
) -> tuple[Figure, Axes]:
    """Draw one bar per value, or lines over time for a sequence of results.

    Args:
        val: One result, values by name, or several.
        label: What the values are.
        ax: Axes to draw into; ``None`` makes a figure.
        bounds: Lower and upper bound of the values; no upper bound leaves the limits of the axis to matplotlib.

    Raises:
        ModuleNotFoundError: If ``matplotlib`` is not installed.

    """
    lower, upper = bounds
    if not isinstance(val, Mapping):
        return plot_steps(val, label, ax, upper)
    figure, ax = open_axes(ax)
    values = [float(value) for value in val.values()]
    bars = ax.barh(list(val), bar_lengths(values))
    ax.bar_label(bars, [f"{value:.3f}" for value in values], padding=2)
    ax.invert_yaxis()
    if upper is not None:
        ax.set_xlim(lower, 1.15 * upper)
    ax.set_xlabel(label)
    return figure, ax


def tick_layers(axis: Axis, layers: Sequence[int]) -> None:
    """Label the places 0, 1, … of ``axis`` with the indices of the layers, of all or of every n-th."""
    places = range(0, len(layers), math.ceil(len(layers) / _MAX_NAMES))
    axis.set_ticks(places, [str(layers[place]) for place in places])
    axis.set_label_text("layer")


def tick_integers(axis: Axis, label: str) -> None:
    """Label ``axis`` and tick it at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_label_text(label)


def plot_layers(
    val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    layers: Sequence[int],
    series: Mapping[str, str],
    label: str,
    ax: Axes | None,
    top: float | None = None,
) -> tuple[Figure, Axes]:
    """Draw one group of bars per layer, or lines over time.

    Args:
        val: A result with the entries ``{prefix}mean`` and ``{prefix}layer_{index}``, or a sequence of results.
        layers: The L layer indices.
        series: Label to prefix; each layer has a bar for each entry.
        label: Label of the value axis, with the unit.
        ax: Axes to draw into; ``None`` makes a figure.
        top: Upper bound of all values, if there is one; the lower bound is 0.

    Returns:
        The figure and the axes.

    """
    if not isinstance(val, Mapping):
        return plot_steps(val, label, ax, top)
    figure, ax = open_axes(ax)
    width = 0.8 / len(series)
    for position, (name, prefix) in enumerate(series.items()):
        heights = [float(val[f"{prefix}layer_{layer}"]) for layer in layers]
        places = [place + (position + 0.5) * width - 0.4 for place in range(len(layers))]
        mean = float(val[f"{prefix}mean"])
        bars = ax.bar(places, bar_lengths(heights), width, label=f"{name}, mean {mean:.3g}")
        ax.bar_label(bars, ["nan" if math.isnan(height) else "" for height in heights], rotation=90, padding=2)
        ax.axhline(mean, linestyle="--", linewidth=1, color=bars.patches[0].get_facecolor())
    tick_layers(ax.xaxis, layers)
    ax.set_ylabel(label)
    ax.set_ylim(bottom=0, top=top)
    _legend(ax, "lower left", (0, 1))
    return figure, ax


def plot_steps(
    val: Sequence[Mapping[str, Tensor]], label: str, ax: Axes | None, top: float | None = None
) -> tuple[Figure, Axes]:
    """Draw a line over time for each entry of the results; arguments as in :func:`plot_layers`.

    If there are too many lines, those of single layers are thin and have no entry in the legend.
    """
    figure, ax = open_axes(ax, width=9.0)
    thin = [name for name in val[0] if "layer_" in name] if len(val[0]) > _MAX_NAMES else []
    styles = cycle(["-"] * 10 + ["--"] * 10 + [":"] * 10)  # the colours repeat after ten lines
    color = None
    for name in val[0]:
        values = [float(result[name]) for result in val]
        if name in thin:
            ax.plot(values, color=color, linewidth=0.8, alpha=0.25)
        else:
            color = ax.plot(values, next(styles), marker=".", label=name)[0].get_color()
    tick_integers(ax.xaxis, "step")
    ax.set_ylabel(label)
    top = ax.get_ylim()[1] if top is None else top
    ax.set_ylim(-0.03 * top, 1.03 * top)
    ax.grid(True)
    _legend(ax, "upper left", (1, 1), title="thin: single layers" if thin else None)
    return figure, ax


def _legend(
    ax: Axes, corner: Literal["lower left", "upper left"], anchor: tuple[float, float], title: str | None = None
) -> None:
    """Put the ``corner`` of the legend at ``anchor``, outside the axes.

    Only a figure with a layout engine has room for it there. In any other figure it goes where it hides least.
    """
    room = cast("Figure", ax.get_figure()).get_layout_engine() is not None
    ax.legend(
        title=title,
        loc=corner if room else "best",
        bbox_to_anchor=anchor if room else None,
        frameon=not room,
        fontsize="small",
        title_fontsize="small",
    )


def plot_heat_map(
    values: Sequence[Sequence[float]],
    layers: Sequence[int],
    steps: Sequence[int],
    title: str,
    label: str,
    edited: Collection[int] = (),
    span: tuple[float, float] | None = None,
) -> Figure:
    """Draw a value by layer (upwards) and optimizer step (to the right).

    Args:
        values: S rows of L values.
        layers: The L layer indices; those in ``edited`` are marked.
        steps: The S steps.
        title: Title of the figure.
        label: Name of the value, with the unit.
        edited: Indices of edited layers.
        span: The least and the greatest possible value, if they are known.

    Returns:
        The figure, which no window of matplotlib keeps.

    Raises:
        ModuleNotFoundError: If ``matplotlib`` is not installed.

    """
    try:
        from matplotlib.figure import Figure as NewFigure
    except ImportError as error:
        raise ModuleNotFoundError("Plotting needs `matplotlib`: pip install matplotlib") from error
    height = min(10.0, max(3.4, 0.8 + 0.22 * len(layers)))
    figure = NewFigure(figsize=(min(12.0, max(6.4, 3 + 0.3 * len(steps))), height), layout="constrained")
    ax = figure.subplots()
    low, high = span if span is not None else (None, None)
    by_layer = [[row[place] for row in values] for place in range(len(layers))]
    image = ax.imshow(by_layer, aspect="auto", origin="lower", vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=ax, label=label)
    every = math.ceil(len(layers) / _MAX_NAMES)
    places = [i for i, layer in enumerate(layers) if layer in edited or i % every == 0]
    marks = [f"edited ▸ {layers[i]}" if layers[i] in edited else str(layers[i]) for i in places]
    ax.set_yticks(places, marks)
    columns = range(0, len(steps), math.ceil(len(steps) / _MAX_NAMES))
    ax.set_xticks(list(columns), [str(steps[i]) for i in columns])
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("layer")
    ax.set_title(title)
    return figure
