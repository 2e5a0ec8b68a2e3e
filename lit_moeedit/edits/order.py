"""Edits in order: which were made on which, and the state of a layer after the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lit_moeedit.edits.edit import Edit, LayerChange
from lit_moeedit.edits.states import State
from lit_moeedit.text import first_few


class EditConflictError(ValueError):
    """Edits that do not fit together, or weights that are not those of the edits; nothing has changed."""


def linked(edits: Sequence[Edit]) -> list[Edit]:
    """Return edits, each with all those that it was made on, also if its file does not name them.

    A run that begins with edited weights does not know their edits. The states tell: the weights before it are those
    that the edits before it have left.

    Args:
        edits: the edits in their order.
    """
    found: list[Edit] = []
    known = dict(edits[0].made_on) if edits else {}
    bases: dict[str, State] = {}
    left: dict[str, State] = {}
    for edit in edits:
        shared = [change for change in edit.layers if change.parameter in left]
        follows = shared and all(change.before == left[change.parameter] for change in shared)
        if follows and known.keys() > edit.made_on.keys():
            layers = tuple(replace(c, base=bases.get(c.parameter, c.base)) for c in edit.layers)
            edit = replace(edit, made_on=dict(known), order=len(known) + 1, layers=layers)
        placed = {} if edit.placement is None else edit.placement.states
        for change in edit.layers:
            bases.setdefault(change.parameter, change.base)
            left[change.parameter] = placed.get(change.parameter, change.after)
        known[edit.id] = edit.name
        found.append(edit)
    return found


def left_by(edits: Sequence[Edit]) -> dict[str, State]:
    """Return the states in which edits have left their parameters, in the weights to which they were applied last."""
    left: dict[str, State] = {}
    for edit in edits:
        placed = {} if edit.placement is None else edit.placement.states
        left |= {name: placed.get(name, change.after) for name, change in edit.changes.items()}
    return left


def check_order(edits: Sequence[Edit], allow_siblings: bool = False) -> None:
    """Check that edits can be applied one after the other.

    Edits that the first one was made on may be in the weights already: they need not be given.

    Args:
        edits: the edits in their order, at least one.
        allow_siblings: whether to accept edits that were made without each other.

    Raises:
        EditConflictError: if one is given twice, was made on another that is missing or comes later, or was made
            without an earlier one. The message names both.
    """
    if not edits:
        raise EditConflictError("no edit was given")
    for number, edit in enumerate(edits):
        same = next((other for other in edits[:number] if edit.id == other.id or edit.name == other.name), None)
        if same is not None and edit.id == same.id:
            raise EditConflictError(f"edit {edit.name!r} is given twice (id {edit.id[:12]}…); give it once")
        if same is not None:
            raise EditConflictError(f"two edits have the name {edit.name!r}; give the folder of one another name")
    before = dict(edits[0].made_on)
    late = next((edit for edit in edits if edit.id in before), None)
    if late is not None:
        first, other = edits[0].name, late.name
        raise EditConflictError(f"edit {first!r} was made on top of {other!r}: apply {other!r} before it")
    for number, edit in enumerate(edits):
        for key, name in edit.made_on.items():
            if key in before:
                continue
            if any(later.id == key for later in edits[number + 1 :]):
                raise EditConflictError(f"edit {edit.name!r} was made on top of {name!r}: apply {name!r} before it")
            raise EditConflictError(
                f"edit {edit.name!r} was made on top of {name!r} (id {key[:12]}…), which is missing: give it, too, "
                "before the other"
            )
        others = [name for key, name in before.items() if key not in edit.made_on]
        if others and not allow_siblings:
            Sequel.of(edits)  # those of different bases are none
            raise EditConflictError(
                f"edit {edit.name!r} was made without {first_few(map(repr, others))}: they are siblings, which were "
                "not solved jointly, so one may undo facts of the other. Edit the facts of both together, or add up "
                "the changes all the same with allow_siblings"
            )
        before[edit.id] = edit.name


@dataclass(frozen=True)
class Sequel:
    """The edits that change one parameter, in order.

    Attributes:
        parameter: its name.
        edits: the edits that change it, at least one.
        start: ids of edits that the first of all given edits was made on, and that are not given.
        given: ids of all given edits.
    """

    parameter: str
    edits: tuple[Edit, ...]
    start: frozenset[str]
    given: frozenset[str]

    @classmethod
    def of(cls, edits: Sequence[Edit]) -> dict[str, Sequel]:
        """Return the sequels of all parameters that edits change, by the parameter.

        Raises:
            EditConflictError: if two edits of a parameter were made on different bases.
        """
        given = frozenset(edit.id for edit in edits)
        start = frozenset(edits[0].made_on if edits else ()) - given
        found = {}
        for name in dict.fromkeys(name for edit in edits for name in edit.changes):
            own = tuple(edit for edit in edits if name in edit.changes)
            for edit in own[1:]:
                if edit.changes[name].base.rounded != own[0].changes[name].base.rounded:
                    raise EditConflictError(
                        f"edits {own[0].name!r} and {edit.name!r} were made on different bases: {name} was not the same"
                    )
            found[name] = cls(name, own, start, given)
        return found

    @property
    def changes(self) -> list[LayerChange]:
        """The changes of the parameter."""
        return [edit.changes[self.parameter] for edit in self.edits]

    @property
    def base(self) -> State:
        """The state before the first edit of the parameter, given or not."""
        return self.changes[0].base

    def state(self, count: int) -> State | None:
        """Return the state of the parameter after the first ``count`` edits; ``None`` if no file has it."""
        concerned = {*self.start, *(edit.id for edit in self.edits)}
        before = {*self.start, *(edit.id for edit in self.edits[: max(count - 1, 0)])}
        edit = self.edits[max(count - 1, 0)]
        was_made_here = concerned & edit.made_on.keys() == before
        if count == 0:
            return self.base if not self.start else edit.changes[self.parameter].before if was_made_here else None
        placement = edit.placement
        if (
            placement is not None
            and self.start | self.given >= {*placement.on}
            and concerned & {*placement.on} == before
        ):
            return placement.states.get(self.parameter)
        return edit.changes[self.parameter].after if was_made_here else None

    def position(self, now: State) -> tuple[int, bool] | None:
        """Find the number of edits that are in a parameter.

        Args:
            now: the state of the parameter.

        Returns:
            The number, and whether the state is that of the files exactly and not only after rounding to bfloat16.
            ``None`` if the parameter is in no state that the files have.
        """
        counts = range(len(self.edits), -1, -1)
        for is_exact in (True, False):
            for count in counts:
                state = self.state(count)
                if state is not None and (state.exact == now.exact if is_exact else state.rounded == now.rounded):
                    return count, is_exact
        return None
