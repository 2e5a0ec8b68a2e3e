"""Everything that a report on edits shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self, cast

from lit_moeedit.reports.autopsy import LossByPart, MissingAutopsy
from lit_moeedit.reports.held import Held
from lit_moeedit.reports.plain import from_plain, to_plain
from lit_moeedit.reports.replay import Replayed
from lit_moeedit.reports.rows import FactRow, Moment
from lit_moeedit.reports.survival import SurvivalPoint, Survivors

State = Literal["running", "finished", "stopped"]
"""State of the run when the report was written. The page of a killed run is that of its last moment, ``running``."""


@dataclass(frozen=True)
class Model:
    """The edited model.

    Attributes:
        name: name or folder.
        family: model type of transformers.
        parameters: number of parameters.
    """

    name: str | None = None
    family: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Routing:
    """Routing after an edit compared with before, on texts that are not edited.

    Attributes:
        similarity: average Jaccard overlap of a token's top-k sets of experts, in [0, 1].
        kl: average divergence of the routers' distributions, in nats.
        similarity_by_layer: the same by layer index.
        kl_by_layer: the same by layer index.
    """

    similarity: float | None = None
    kl: float | None = None
    similarity_by_layer: dict[int, float] = field(default_factory=dict)
    kl_by_layer: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Retention:
    """Metrics of all edited facts at one moment of the training after an edit.

    Attributes:
        epoch: the epoch.
        step: the optimizer step.
        metrics: metrics by name.
    """

    epoch: int
    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Cost:
    """The cost of one phase.

    Attributes:
        phase: name of the phase.
        seconds: its duration.
        memory: peak of the memory allocated on one GPU in bytes, with what was allocated before the phase; ``None`` if
            it was not measured.
    """

    phase: str
    seconds: float
    memory: int | None = None


@dataclass(frozen=True)
class Guard:
    """A limit that edits had to meet.

    Attributes:
        name: its setting, such as ``min_efficacy``.
        limit: value of the setting.
        value: the measured value; ``None`` if it was not measured.
        undone: whether the edit was undone because of it.
        edit: number of the edit in the run, from 1.
        meaning: the measured quantity in plain words.
    """

    name: str
    limit: float
    value: float | None = None
    undone: bool = False
    edit: int | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Place:
    """A place that was tried when layers and token were located automatically.

    Attributes:
        layers: indices of the layers.
        token: the edit token.
        scores: what the trial measured, by name.
        chosen: whether the edit was made there.
    """

    layers: tuple[int, ...]
    token: str
    scores: dict[str, float] = field(default_factory=dict)
    chosen: bool = False


@dataclass(frozen=True)
class Report:
    """A report on the edits of a run.

    Attributes:
        title: title of the report.
        model: the edited model.
        state: state of the run.
        started: start of the run, with a time zone.
        ended: its end, or the time of the last measurement, with a time zone.
        rows: what was measured of each fact.
        metrics: metrics of all facts by moment and name.
        intervals: 95 % intervals over the facts of those that are means over them, by moment and name.
        edited_layers: indices of the edited layers.
        relative_change: ``‖ΔW‖_F / ‖W‖_F`` by layer index.
        routing: routing after the last edit compared with before; ``None`` if it was not measured.
        retention: metrics at the validations after the edit.
        survival: points of the survival curve.
        survivors: the edits that were left at the end, by the name of their callback.
        replay: the statements of edited facts that were trained on, by the name of the callback.
        hold: the edited facts that were held, by the name of the callback.
        autopsy: the loss of the edits by part of the model; ``None`` if it was not examined.
        missing_autopsy: the reason why an autopsy that was asked for could not be made; ``None`` otherwise.
        costs: cost by phase.
        guards: limits that the edits had to meet.
        places: places that were tried to choose layers and token; empty if they were given.
        warnings: what the user should know.
        settings: settings of the edit, nested plain values.
        versions: versions by package.

    Raises:
        ValueError: if a time has no time zone.
    """

    title: str = "Edited facts"
    model: Model = Model()
    state: State = "running"
    started: datetime | None = None
    ended: datetime | None = None
    rows: tuple[FactRow, ...] = ()
    metrics: dict[Moment, dict[str, float]] = field(default_factory=dict)
    intervals: dict[Moment, dict[str, tuple[float, float]]] = field(default_factory=dict)
    edited_layers: tuple[int, ...] = ()
    relative_change: dict[int, float] = field(default_factory=dict)
    routing: Routing | None = None
    retention: tuple[Retention, ...] = ()
    survival: tuple[SurvivalPoint, ...] = ()
    survivors: dict[str, Survivors] = field(default_factory=dict)
    replay: dict[str, Replayed] = field(default_factory=dict)
    hold: dict[str, Held] = field(default_factory=dict)
    autopsy: LossByPart | None = None
    missing_autopsy: MissingAutopsy | None = None
    costs: tuple[Cost, ...] = ()
    guards: tuple[Guard, ...] = ()
    places: tuple[Place, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, time in (("started", self.started), ("ended", self.ended)):
            if time is not None and time.utcoffset() is None:
                raise ValueError(f"the field {name!r} of a report should have a time zone, got {time}")

    @property
    def seconds(self) -> float | None:
        """Duration in seconds; ``None`` if it is not known."""
        return None if self.started is None or self.ended is None else (self.ended - self.started).total_seconds()

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to JSON types; numbers that are not finite become ``None``."""
        return cast("dict[str, Any]", to_plain(self))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Make a report from the result of :meth:`to_dict`.

        Raises:
            ValueError: if a field is missing, unknown or of another type. The message names it.
        """
        return cast(Self, from_plain(cls, value, "report"))
