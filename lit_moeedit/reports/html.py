"""``report.html``: one page that needs nothing but itself."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.interrupts import uninterrupted
from lit_moeedit.reports import figures, formats
from lit_moeedit.reports.meanings import MEANINGS, UNSHOWN, is_share, label_of, meaning_of
from lit_moeedit.reports.outcomes import MARKS, ORDER, WORDS, Totals, latest, outcome_of, worst_first
from lit_moeedit.reports.report import Report
from lit_moeedit.reports.rows import Moment
from lit_moeedit.reports.survival import SurvivalPoint
from lit_moeedit.reports.table import cut
from lit_moeedit.text import count, printable

FILE = "report.html"
MAX_ROWS = 2000
"""Maximum number of facts on the page; the failed ones come first, and ``edits.jsonl`` has all of them."""

MAX_REASONS = 10
"""Maximum number of failed facts that are listed before the table."""

_MAX_TEXT = 400
_MAX_COMMAND = 5000
_MAX_ITEMS = 500
"""Maximum number of rows of any other table."""

_SURVIVAL = (*figures.SURVIVED, "margin_median", "margin_min")

_MOMENTS: dict[Moment, str] = {"before": "before", "after": "after the edit", "end": "at the end"}


def write_html(report: Report, folder: str | Path) -> Path:
    """Write ``report.html`` into a folder; the file appears complete or not at all.

    Returns:
        The path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(folder, FILE)
    with atomic_file(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """Make the page of a report.

    Every text is escaped: control characters as in Python, and the rest for HTML. Texts longer than 400 characters are
    cut.
    """
    page = _environment().get_template("page.html")
    script, style = (_asset(name) for name in ("page.js", "page.css"))
    return page.render(
        report=report,
        totals=Totals.of(report.rows),
        facts=worst_first(report.rows)[:MAX_ROWS],
        failed=[row for row in worst_first(report.rows) if outcome_of(row) not in ("holds", "unmeasured", "replaced")],
        max_reasons=MAX_REASONS,
        outcome_of=outcome_of,
        latest=latest,
        marks=MARKS,
        order=ORDER,
        words=WORDS,
        moments=[moment for moment in _MOMENTS if any(moment in row.measured for row in report.rows)],
        moment_names=_MOMENTS,
        metrics=_metrics(report),
        metric_moments=_moments_of_metrics(report),
        figures=_figures(report),
        layers=_layers(report),
        retention=_retention(report),
        survival=_survival(report),
        costs=figures.timed(report),
        guards=report.guards[:_MAX_ITEMS],
        places=report.places[:_MAX_ITEMS],
        scores=list(dict.fromkeys(name for place in report.places for name in place.scores))[:20],
        settings=list(_flat(report.settings))[:_MAX_ITEMS],
        command=escape(printable(report.missing_autopsy.command[:_MAX_COMMAND])) if report.missing_autopsy else "",
        script=script,
        style=style,
        script_hash=Markup(base64.b64encode(sha256(script.encode()).digest()).decode()),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lit_moeedit.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_safe,
    )
    for form in (formats.percent, formats.number, formats.size, formats.time_span, count, formats.moment):
        environment.filters[form.__name__] = form
    return environment


@cache
def _asset(name: str) -> Markup:
    """Read a file beside the template, which goes into the page as it is."""
    return Markup(resources.files("lit_moeedit.reports").joinpath("templates", name).read_text(encoding="utf-8"))


def _safe(value: Any) -> Any:
    """Escape and cut every text that a template shows, except what the templates themselves have made."""
    return cut(value, _MAX_TEXT) if isinstance(value, str) and not isinstance(value, Markup) else value


def _metrics(report: Report) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Label, meaning, and value with interval at each moment of every metric that was measured."""
    names = dict.fromkeys((*MEANINGS, *(name for found in report.metrics.values() for name in found)))
    rows = []
    for name in names:
        values = [report.metrics.get(moment, {}).get(name, math.nan) for moment in _moments_of_metrics(report)]
        if name not in UNSHOWN and any(map(math.isfinite, values)):
            show = formats.percent if is_share(name) else formats.number
            bounds = [report.intervals.get(moment, {}).get(name, ()) for moment in _moments_of_metrics(report)]
            intervals = [" to ".join(map(show, pair)) for pair in bounds]
            rows.append((label_of(name), meaning_of(name), list(zip(map(show, values), intervals, strict=True))))
    return rows[:_MAX_ITEMS]


def _moments_of_metrics(report: Report) -> list[Moment]:
    return [moment for moment in _MOMENTS if any(map(math.isfinite, report.metrics.get(moment, {}).values()))]


def _figures(report: Report) -> dict[str, Markup]:
    """Draw what there is to draw; nothing without matplotlib."""
    if not figures.has_matplotlib():
        return {}
    layers, series, costs = figures.layer_values(report), figures.retained(report), figures.timed(report)
    with uninterrupted():  # which matplotlib's compiled functions would lose, or raise as a TypeError
        drawn = {
            "layers": figures.draw_layers(layers, report.edited_layers) if layers else "",
            "retention": figures.draw_retention(series) if series and not report.survival else "",
            "survival": figures.draw_survival(report),
            "costs": figures.draw_costs(costs) if costs else "",
        }
    return {name: Markup(svg) for name, svg in drawn.items() if svg}


def _layers(report: Report) -> tuple[list[str], list[tuple[int, bool, list[str]]]]:
    values = figures.layer_values(report)
    layers = sorted({layer for by_layer in values.values() for layer in by_layer})
    rows = [
        (layer, layer in report.edited_layers, [formats.number(v.get(layer)) for v in values.values()])
        for layer in layers
    ]
    return list(values), rows


def _retention(report: Report) -> tuple[list[str], list[tuple[int, int, list[str]]]]:
    names = [
        name
        for name in (*figures.RETAINED, "perplexity")
        if any(math.isfinite(point.metrics.get(name, math.nan)) for point in report.retention)
    ]
    rows = [
        (
            point.epoch,
            point.step,
            [(formats.percent if is_share(name) else formats.number)(point.metrics.get(name)) for name in names],
        )
        for point in report.retention[-_MAX_ITEMS:]
    ]
    return [label_of(name) for name in names], rows if names else []


def _survival(report: Report) -> tuple[list[str], list[tuple[SurvivalPoint, list[str]]]]:
    names = [name for name in _SURVIVAL if any(name in point.metrics for point in report.survival)]
    rows = [
        (point, [(formats.percent if is_share(name) else formats.number)(point.metrics.get(name)) for name in names])
        for point in report.survival[-_MAX_ITEMS:]
    ]
    return [label_of(name) for name in names], rows


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
