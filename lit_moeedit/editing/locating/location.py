"""The result of locating: the place that was chosen, with everything that it was chosen by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE
from rich.table import Table
from typing_extensions import override

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.editing.locating.tracing import WINDOWS, Trace
from lit_moeedit.editing.locating.trials import Trial
from lit_moeedit.editing.place import TOKENS, Place

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Location:
    """The place to edit, and how it was found.

    Attributes:
        trials: the places that were tried.
        chosen: index of the best one.
        trace: the causal trace; ``None`` if the layers were given.
        seconds: duration of each step: ``trace``, ``targets``, ``statistics``, ``edits``.
        targets: settings of the :class:`~lit_moeedit.editing.TargetOptimizer` other than the given ones, with which
            target vectors were found; empty for the given ones.
    """

    trials: tuple[Trial, ...]
    chosen: int
    trace: Trace | None
    seconds: Mapping[str, float]
    targets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Trial:
        """The trial of the chosen place."""
        return self.trials[self.chosen]

    @property
    def place(self) -> Place:
        """The chosen place."""
        return self.best.place

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the chosen layers, ascending."""
        return self.place.layers

    @property
    def token(self) -> EditToken:
        """The chosen token."""
        token = self.place.token
        assert token is not None, "every trial has a token"
        return token

    @override
    def __str__(self) -> str:
        if not self.best.facts:
            return f"{self.place}, without trials"
        measured = f"target loss {self.best.nll:.2f} nats"
        if self.best.score is not None:
            measured = f"score {self.best.score:.2f}, {measured}"
        return f"{self.place} chosen of {len(self.trials)} places in {sum(self.seconds.values()):.1f} s ({measured})"

    def yaml(self) -> str:
        """Return the settings of the editor as YAML, for the ``init_args`` of an editor in a config.

        Its ``targets`` has only what is other than what was given, and belongs to what a config has there.
        """
        settings: dict[str, Any] = self.place.to_dict()
        stop = settings.pop("stop", None)
        targets = {**self.targets} if stop == self.trials[0].place.stop else {**self.targets, "stop": stop}
        if self.place.preserve is not None:
            class_path = settings.pop("preserve")
            settings["preserve"] = {"class_path": class_path, "init_args": {"strength": settings.pop("strength")}}
        if targets:
            settings["targets"] = {"class_path": "lit_moeedit.editing.TargetOptimizer", "init_args": targets}
        text: str = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
        return text

    def table(self) -> Table:
        """Format the trials as a table for the console; the chosen place is marked."""
        few, many = (pick(trial.facts for trial in self.trials) for pick in (min, max))
        again = f"; * those with {many} facts" if many > few else ""
        is_tuned = any(trial.place.strength is not None for trial in self.trials)
        nats = "stop of the targets" if is_tuned else "loss of the targets"
        title = f"Trial edits of {few} facts, undone (> chosen; {nats} in nats{again})"
        table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))  # fits into 80 columns
        table.add_column("", width=1)
        table.add_column("layers", no_wrap=True)
        for name in ("strength", "further\nprompts") if is_tuned else ("token",):
            table.add_column(name, no_wrap=True)
        loss = "stop" if is_tuned else "loss"
        for name in (loss, "effi-\ncacy", "para-\nphrases", "neigh-\nbours", "score", "change"):
            table.add_column(name, justify="right")
        for number, trial in enumerate(self.trials):
            is_chosen, place = number == self.chosen, trial.place
            shares = [trial.efficacy, trial.generalization, trial.specificity_retained, trial.score]
            found = place.stop if is_tuned else trial.nll
            table.add_row(
                ">" if is_chosen else "*" if trial.facts > few else "",
                ", ".join(map(str, place.layers)),
                *((f"{place.strength:g}", str(place.phrasings)) if is_tuned else (place.token,)),
                _share(found),
                *(_share(value) for value in shares),
                "-" if trial.change is None else f"{trial.change:.3f}",
                style="bold" if is_chosen else None,
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            **self.place.to_dict(),
            "targets": dict(self.targets),
            "trials": [trial.to_dict() for trial in self.trials],
            "trace": None if self.trace is None else self.trace.to_dict(),
            "seconds": dict(self.seconds),
        }

    def figure(self) -> Figure:
        """Draw the trace as heat maps of layers and tokens, with the chosen place marked.

        Raises:
            ValueError: if there is no trace, because the layers were given.
            ModuleNotFoundError: if matplotlib is not installed.
        """
        if self.trace is None:
            raise ValueError("there is no trace to draw: the layers were given")
        try:
            from matplotlib.figure import Figure as NewFigure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise ModuleNotFoundError("the figure needs matplotlib: pip install matplotlib") from error
        trace, layers = self.trace, self.trace.layers
        figure = NewFigure(figsize=(max(6.4, 0.22 * len(layers) + 3), 4.2), layout="constrained")
        axes = figure.subplots(len(WINDOWS), 1, sharex=True)
        known = trace.restored[~trace.restored.isnan()]
        limit = max(1e-3, float(known.abs().max())) if len(known) else 1.0
        step = math.ceil(len(layers) / 24)
        for ax, window, shares in zip(axes, WINDOWS, trace.restored, strict=True):
            image = ax.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
            ax.set_yticks(range(len(TOKENS)), TOKENS)
            ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            ax.set_ylabel("token")
            ax.set_title("experts of one layer" if window == 1 else f"experts of {window} layers", fontsize="medium")
            for layer in self.layers:
                corner = layers.index(layer) - 0.5, TOKENS.index(self.token) - 0.5
                ax.add_patch(Rectangle(corner, 1, 1, fill=False, linewidth=2, edgecolor="black"))
        axes[-1].set_xlabel("layer (middle of the restored ones)")
        figure.colorbar(image, ax=axes, label="share of the answers'\nprobability restored")
        figure.suptitle(f"Causal trace of {trace.facts} facts; outlined: {self.place}")
        return figure


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"
