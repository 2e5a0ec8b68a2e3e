"""The settings that an editor may find by itself: layers, token, and how strongly it edits there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from typing_extensions import override

from lit_moeedit.data.encoding import EditToken
from lit_moeedit.editing.method import EditMethod
from lit_moeedit.editing.place import Place, Tune
from lit_moeedit.editing.targets import TargetOptimizer
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.preservation.shaping import CovariancePenalty, Preservation, PreservationName, preservation_of

if TYPE_CHECKING:
    from lit_moeedit.editing.editor import Editor

log = logging.getLogger(__name__)


class PlaceFinding(EditMethod):
    """The settings of an editor that trials may choose; the arguments are those of :class:`Editor`."""

    can_find_layers = True
    targets: TargetOptimizer

    def __init__(
        self,
        layers: Sequence[int] | Literal["auto"],
        token: EditToken | Literal["auto"],
        preserve: Preservation | PreservationName,
        phrasings: int,
        tune: Tune,
        contexts: Sequence[str],
        token_budget: Budget,
        reset_moments: bool,
    ) -> None:
        super().__init__(layers, contexts, token_budget, reset_moments)
        if token not in ("subject_last", "last", "auto"):
            raise ValueError(f"token must be 'subject_last', 'last' or 'auto', got {token!r}")
        if phrasings < 0:
            raise ValueError(f"phrasings must be at least 0, got {phrasings}")
        if tune not in (True, False, "neighbours"):
            raise ValueError(f"tune must be true, false or 'neighbours', got {tune!r}")
        self.token, self.phrasings, self.tune = token, phrasings, tune
        self.preserve = preservation_of(preserve)
        if tune and not self.strength:
            raise ValueError(f"tune needs a preservation with a strength above 0, such as 'output', got {preserve!r}")
        self._given = self.layers, token
        # what was given, once the editor is tuned
        self._untuned: tuple[Preservation | None, int, TargetOptimizer] | None = None

    @property
    @override
    def is_resolved(self) -> bool:
        return self._is_located and (self._untuned is not None or not self.tune)

    @property
    def _is_located(self) -> bool:
        return bool(self.layers) and self.token != "auto"

    @property
    def strength(self) -> float | None:
        """Strength of the preservation; ``None`` of one that has none."""
        return self.preserve.strength if isinstance(self.preserve, CovariancePenalty) else None

    @property
    @override
    def place(self) -> Place | None:
        if not self.is_resolved:
            return None
        place = Place(self.layers, cast("EditToken", self.token))
        return place if self._untuned is None else self.with_settings(place)

    @place.setter
    def place(self, place: Place | None) -> None:
        if not self.finds_place:
            return
        if place is None:
            self.layers, self.token = self._given
            if self._untuned is not None:
                (self.preserve, self.phrasings, self.targets), self._untuned = self._untuned, None
        elif place.token is not None:
            self._take(self._as_own(place))

    def _as_own(self, place: Place) -> Place:
        """Return what this editor takes over of a place, such as that of a checkpoint: nothing that it was given."""
        layers, token = self._given
        if not self.finds_layers and (place.token != token or place.layers not in (layers, layers[-1:])):
            place = Place(layers, cast("EditToken", token))
        if not self.tune:
            return Place(place.layers, place.token)
        given = copy(self)
        given.preserve, given.phrasings, given.targets = self._untuned or (self.preserve, self.phrasings, self.targets)
        own = given.with_settings(place)
        if place.strength is None:
            log.info("the editor is not tuned: it goes on with the settings that it was given")
        elif place.preserve != own.preserve:
            text = "the strength %g of the edits so far is one of %s, this run's editor has %s: its own strength counts"
            log.warning(text, place.strength, place.preserve, own.preserve)
        else:
            own = place
        return own

    def with_settings(self, place: Place) -> Place:
        """Return a place with the settings of this editor there."""
        name = f"{type(self.preserve).__module__}.{type(self.preserve).__qualname__}"
        return replace(place, strength=self.strength, phrasings=self.phrasings, preserve=name, stop=self.targets.stop)

    def _take(self, place: Place) -> None:
        self.layers, self.token = place.layers, place.token or self.token
        if place.strength is not None and isinstance(self.preserve, CovariancePenalty):
            self._untuned = self._untuned or (self.preserve, self.phrasings, self.targets)
            _, phrasings, targets = self._untuned
            self.preserve, self.targets = copy(self.preserve), targets.with_stop(place.stop)
            self.preserve.strength = place.strength
            self.phrasings = phrasings if place.phrasings is None else place.phrasings

    @property
    @override
    def finds_layers(self) -> bool:
        return not self._given[0] or self._given[1] == "auto"

    @property
    @override
    def finds_place(self) -> bool:
        return self.finds_layers or bool(self.tune)

    def at(self, place: Place) -> Self:
        """Return an editor with the same settings at another place, without a memory."""
        other = copy(self)
        other._take(place)
        other.memory = None
        return other

    @override
    def resolve(self, *args: Any, **kwargs: Any) -> None:
        if self.is_resolved:
            return
        from lit_moeedit.editing.locating import locate, tune  # which edit with an Editor

        editor = cast("Editor", self)
        if not self._is_located:
            found = locate(*args, editor=editor, **kwargs)
            self._take(found.place)
            log.info("%s", found)
        if self.tune:
            found = tune(*args, editor=editor, **kwargs)
            self.place = found.place
            log.info("%s", found)
