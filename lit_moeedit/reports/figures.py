"""Figures of a report as SVG that takes its colours from the page, in light and in dark. Drawing needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lit_moeedit.reports.formats import size, time_span
from lit_moeedit.reports.report import Cost, Report
from lit_moeedit.reports.table import cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"
_SERIES = ("#010211", "#010212", "#010213", "#010214")
_BAD = "#010215"
_COLOURS = {
    _INK: "currentColor",
    _BAD: "var(--bad)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)},
}
"""Placeholders that matplotlib draws with, and the colours of the page that they become."""

_WIDTH = 4.2
"""Inches: at this width, texts of 10 points can still be read on a screen of 400 pixels."""

_MAX_TICKS = 16

_MAX_VALUES = 6
"""Maximum number of layers up to which a heat map has room for values in its cells."""

SIMILARITY = "routing similarity"

_TOO_LARGE = 1e9
"""Values from here on are not those of a measurement, and would break a scale."""

_MAX_PHASES = 30

_MAX_LAYERS = 500

RETAINED = {
    "efficacy_accuracy": "facts that hold",
    "generalization_accuracy": "paraphrases that hold",
    "specificity_retained": "neighbours kept",
    "score": "score",
}
"""Metrics that are shown over time, all of them shares."""


SURVIVED = {
    "efficacy_accuracy": "facts that hold",
    "generalization": "paraphrases (generalization)",
    "specificity_retained": "neighbours kept",
}
"""Metrics of the survival curve that are drawn, all of them shares."""


def has_matplotlib() -> bool:
    """Tell if figures can be drawn."""
    return find_spec("matplotlib") is not None


def layer_values(report: Report) -> dict[str, dict[int, float]]:
    """Return the quantities that a report has by layer, without those that are empty."""
    routing = report.routing
    values = {
        SIMILARITY: {} if routing is None else routing.similarity_by_layer,
        "routing KL (nats)": {} if routing is None else routing.kl_by_layer,
        "relative change": report.relative_change,
    }
    layers = set(sorted({layer for by_layer in values.values() for layer in by_layer})[:_MAX_LAYERS])
    found = {
        name: {k: v for k, v in by_layer.items() if k in layers and abs(v) < _TOO_LARGE}
        for name, by_layer in values.items()
    }
    return {name: by_layer for name, by_layer in found.items() if by_layer}


def timed(report: Report) -> list[Cost]:
    """Return the phases that took time."""
    return [cost for cost in report.costs if 0 < cost.seconds < _TOO_LARGE][:_MAX_PHASES]


def draw_layers(values: Mapping[str, Mapping[int, float]], edited: Sequence[int]) -> str:
    """Draw heat maps, one for each quantity, with a column for each layer.

    Args:
        values: By quantity and layer index; finite.
        edited: Layers to mark.

    Returns:
        An ``<svg>`` element.
    """
    from matplotlib.colors import Normalize

    layers = sorted({layer for by_layer in values.values() for layer in by_layer})
    figure = _figure(0.35 + 0.75 * len(values))
    all_axes = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    step = math.ceil(len(layers) / _MAX_TICKS)
    shown = list(range(0, len(layers), step))
    for axes, (name, by_layer) in zip(all_axes, values.items(), strict=True):
        row = [by_layer.get(layer, math.nan) for layer in layers]
        dark, bright = _scale(name, by_layer)
        is_falling = dark > bright
        axes.pcolormesh(
            [row],
            cmap="cividis_r" if is_falling else "cividis",
            norm=Normalize(min(dark, bright), max(dark, bright)),
            linewidth=0.5 if len(layers) <= 2 * _MAX_TICKS else 0.1,
            edgecolor=_INK,
        )
        axes.set_title(f"{name}: dark {dark:.2g}, bright {bright:.2g}", loc="left", fontsize=10, color=_INK)
        axes.set_ylim(0, 1.35)
        axes.set_yticks([])
        marked = [i + 0.5 for i, layer in enumerate(layers) if layer in edited]
        axes.plot(marked, [1.18] * len(marked), "v", color=_INK, markersize=5)
        if len(layers) <= _MAX_VALUES:
            for i, value in enumerate(row):
                if math.isfinite(value):
                    ink = "#111111" if (value - dark) / (bright - dark) > 0.55 else "#ffffff"
                    axes.text(i + 0.5, 0.5, f"{value:.3g}", ha="center", va="center", color=ink)
        _ink(axes)
        axes.tick_params(length=0)
        axes.set_xticks([i + 0.5 for i in shown], [str(layers[i]) for i in shown] if axes is all_axes[-1] else [])
    all_axes[-1].set_xlabel("layer", color=_INK)
    named = ", ".join(map(str, edited[:20])) or "none"
    return _svg(figure, f"Heat map of {', '.join(values)} by layer; edited layers: {named}", "layers")


def _scale(name: str, by_layer: Mapping[int, float]) -> tuple[float, float]:
    """Return the values of the darkest and the brightest colour; bright is where an edit has moved more."""
    if name == SIMILARITY:
        return 1.0, min(math.floor(min(by_layer.values()) * 10) / 10, 0.9)
    return 0.0, max(by_layer.values()) if max(by_layer.values()) > 0 else 1.0


def retained(report: Report) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of the metrics that can be shown over time."""
    series = {
        label: [(point.step, point.metrics[name]) for point in report.retention if name in point.metrics]
        for name, label in RETAINED.items()
    }
    shares = {label: [(step, v) for step, v in points if 0 <= v <= 1] for label, points in series.items()}
    return {label: points for label, points in shares.items() if len(points) > 1}


def draw_retention(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw shares over optimizer steps, a line for each metric.

    Returns:
        An ``<svg>`` element.
    """
    figure = _figure(2.6)
    axes = figure.subplots()
    for (label, points), colour, style in zip(series.items(), _SERIES, ("o-", "s--", "^-.", "D:"), strict=False):
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.8)
    _shares_over_steps(axes, 1.03)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=_INK, fontsize=10)
    return _svg(figure, f"Over the steps of the training: {', '.join(series)}", "retention")


def survived(report: Report) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of the survival curve: of one callback several metrics, of several callbacks one."""
    names = list(dict.fromkeys(point.name for point in report.survival))
    lines: list[tuple[str | None, str, str]] = [(None, *item) for item in SURVIVED.items()]
    if len(names) > 1:
        metric, label = next(iter(SURVIVED.items()))
        lines = [(name, metric, f"{label}: {cut(name or 'no name', 24)}") for name in names[: len(_SERIES)]]
    series = {
        label: [
            (point.step, value)
            for point in report.survival
            if (name is None or point.name == name) and 0 <= (value := point.metrics.get(metric, math.nan)) <= 1
        ]
        for name, metric, label in lines
    }
    return {label: points for label, points in series.items() if len(points) > 1}


def draw_survival(report: Report) -> str:
    """Draw the survival curve over optimizer steps, with the moments of edits, renewals and lost facts.

    Returns:
        An ``<svg>`` element; empty if there is no curve.
    """
    series, points = survived(report), report.survival
    if not series:
        return ""
    figure = _figure(3.2)
    axes = figure.subplots()
    for (label, line), colour, style in zip(series.items(), _SERIES, ("o-", "s--", "^-.", "D:"), strict=False):
        axes.plot(*zip(*line, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.8)
    for change, marker, label in (("edit", "v", "edit"), ("renewal", "d", "renewal")):
        steps = sorted({point.step for point in points if point.after == change})
        if steps:
            axes.plot(steps, [1.09] * len(steps), marker, color=_INK, markersize=6, label=label)
    lost = [(p.step, p.metrics["efficacy_accuracy"]) for p in points if p.lost and "efficacy_accuracy" in p.metrics]
    lost = [(step, value) for step, value in lost if 0 <= value <= 1]
    if lost:
        axes.plot(*zip(*lost, strict=True), "x", color=_BAD, markersize=9, markeredgewidth=2, label="facts lost")
    _shares_over_steps(axes, 1.15)
    legend = figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=_INK, fontsize=10)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _svg(figure, f"Survival of the edits over the steps of the training: {', '.join(series)}", "survival")


def draw_costs(costs: Sequence[Cost]) -> str:
    """Draw the seconds of each phase as bars, with the peak of memory beside them.

    Returns:
        An ``<svg>`` element.
    """
    figure = _figure(0.5 + 0.3 * len(costs))
    axes = figure.subplots()
    seconds = [cost.seconds for cost in costs]
    axes.barh(range(len(costs)), seconds, color=_SERIES[0], height=0.65)
    for i, cost in enumerate(costs):
        memory = f" · {size(cost.memory)}" if cost.memory else ""
        label = f"{time_span(cost.seconds)}{memory}"
        axes.annotate(label, (cost.seconds, i), (5, 0), textcoords="offset points", va="center", color=_INK)
    # the font has no other letters
    names = [cut(cost.phase, 24).encode("ascii", "replace").decode() for cost in costs]
    axes.set_yticks(range(len(costs)), names, parse_math=False)
    axes.set_xlim(0, (max(seconds) or 1) * 2)
    axes.set_xticks([])
    axes.invert_yaxis()
    _ink(axes)
    axes.tick_params(length=0)
    return _svg(figure, "Seconds and peak of memory of each phase", "costs")


def _shares_over_steps(axes: Axes, top: float) -> None:
    """Scale and label axes of shares over optimizer steps."""
    axes.set_ylim(-0.03, top)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.grid(axis="y", color=_INK, alpha=0.15)
    axes.set_xlabel("optimizer step", color=_INK)
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.locator_params(axis="x", nbins=6, integer=True)
    _ink(axes)


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _ink(axes: Axes) -> None:
    """Draw the frame of axes in the colour of the page's text, as far as it says anything."""
    axes.tick_params(colors=_INK, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom") and bool(len(axes.get_yticks())))
        spine.set_color(_INK)


def _svg(figure: Figure, title: str, name: str) -> str:
    """Save a figure as an element of a page, with texts as texts and without anything that names a time or place."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # ids of two figures on a page must differ, and be the same whenever the page is written
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    start, end = text.index("<defs>"), text.index("</defs>") + len("</defs>")
    text = text[:start] + text[end:]  # a style for all elements, which would reach those of the page
    for placeholder, colour in _COLOURS.items():
        text = text.replace(placeholder, colour)
    text = text.replace('id="', f'id="{name}-').replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
