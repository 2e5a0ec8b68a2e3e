"""Check the numbers of the demo: ``python .ci/check_demo.py runs/atlas/summary.json``.

Prints a table of every value with its threshold, and exits with 1 if one is out of bounds, missing, no number or not
finite. The thresholds stand here and nowhere else; what is not in the summary does not pass.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EDITED = {
    "efficacy": 0.95,
    "efficacy_accuracy": 0.90,
    "generalization": 0.80,
    "specificity_retained": 0.90,
    "specificity_retained_same_subject": 0.87,
    "specificity_retained_same_relation": 0.87,
}
"""Thresholds right after the edit, and again at the end of training."""


@dataclass(frozen=True)
class Check:
    """A number that must not be below (``at_least``) or above the threshold; ``None`` if it could not be had."""

    name: str
    value: float | None
    at_least: bool
    threshold: float
    lowest: float = 0.0
    highest: float = math.inf

    @property
    def passed(self) -> bool:
        """True if there is a possible value on the right side of the threshold."""
        if self.value is None or not math.isfinite(self.value) or not self.lowest <= self.value <= self.highest:
            return False
        return self.value >= self.threshold if self.at_least else self.value <= self.threshold

    def row(self) -> str:
        """A line of the table."""
        value = "missing" if self.value is None else f"{self.value:.4g}"
        bound = f"{'>=' if self.at_least else '<='} {self.threshold:g}"
        return f"{self.name:<58} {value:>10} {bound:>9}  {'ok' if self.passed else 'FAILED'}"


def number(summary: Any, path: str) -> float | None:
    """The number at a dotted path, ``None`` if there is none; a truth value is no number."""
    value = summary
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def similarity_above(summary: Any) -> float | None:
    """Lowest routing similarity of the layers above the first edited one (at it and below, routing cannot change)."""
    first = number(summary, "routing.first_edited_layer")
    if first is None or first < 0 or not first.is_integer():
        return None
    layers = summary["routing"].get("per_layer")
    if not isinstance(layers, Mapping) or not all(str(index).isdecimal() for index in layers):
        return None
    indices = sorted(int(index) for index in layers)
    values = {int(index): number(layers, index) for index in layers}
    if indices != list(range(len(indices))) or any(value is None or not 0 <= value <= 1 for value in values.values()):
        return None
    above = [value for index, value in values.items() if index > first and value is not None]
    return min(above, default=None)


def ratio(summary: Any, above: str, below: str) -> float | None:
    """Quotient of two positive numbers, ``None`` if there are none such."""
    values = number(summary, above), number(summary, below)
    if values[0] is None or values[1] is None or not all(math.isfinite(value) and value > 0 for value in values):
        return None
    return values[0] / values[1]


def checks(summary: Any) -> Iterator[Check]:
    """Yield every check; their number does not depend on what the summary holds."""

    def check(path: str, threshold: float, *, at_least: bool = True, highest: float = 1.0) -> Check:
        return Check(path, number(summary, path), at_least, threshold, highest=highest)

    yield check("edits", 30, highest=math.inf)
    yield check("before.truth_recalled", 0.95)
    for moment in ("after", "after_training"):
        for name, threshold in EDITED.items():
            yield check(f"{moment}.{name}", threshold)
    yield Check(
        "routing.per_layer, lowest above routing.first_edited_layer", similarity_above(summary), True, 0.85, highest=1.0
    )
    yield Check(
        "perplexity.after_training / perplexity.before",
        ratio(summary, "perplexity.after_training", "perplexity.before"),
        False,
        1.02,
    )
    yield check("seconds.fit", 300, at_least=False, highest=math.inf)


def main(arguments: list[str], show: Callable[[str], object] = print) -> int:
    """Print the table; 0 if everything passed."""
    if len(arguments) != 1:
        show("usage: check_demo.py SUMMARY_JSON")
        return 1
    path = Path(arguments[0])
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        show(f"{path} cannot be read: {error}")
        return 1
    done = list(checks(summary))
    for check in done:
        show(check.row())
    failed = sum(not check.passed for check in done)
    show(f"{failed} of {len(done)} checks failed" if failed else f"all {len(done)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
