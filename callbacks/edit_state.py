"""The facts of an editing callback, and what is known of those that are edited in a model's weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from torch import nn
from typing_extensions import override

from lit_moeedit.callbacks.belonging import StateOfWeights, are_left, expert_weights
from lit_moeedit.callbacks.kept import Kept
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.survival import Survival
from lit_moeedit.checkpoint_fields import CheckpointError, check_fields
from lit_moeedit.data.facts import CheckedFacts, Fact
from lit_moeedit.editing import EditMethod, Evaluation, Place
from lit_moeedit.interrupts import Undo
from lit_moeedit.models.experts import find_model
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


class EditState(StateOfWeights):
    """A callback with an editor, facts, and a state that tells which of them are edited in a model's weights.

    The memory of the editor follows the state.

    Args:
        editor: the editing method.
        name: as for :class:`~lit_moeedit.callbacks.named.NamedCallback`.
        settings: likewise.
    """

    state_names = (
        "_applied",
        "_undone",
        "_edits_made",
        "_last_step",
        "_remembered",
        "renewals",
        "_words",
        "_written",
        "_place",
        "survival",
        "_kept",
    )

    def __init__(self, editor: EditMethod, name: str | None = None, **settings: Any) -> None:
        self.editor = editor
        self.facts = CheckedFacts(())
        """All facts of the run; empty before it starts."""
        super().__init__(name, **settings)

    def evaluate(self, pl_module: L.LightningModule, facts: Sequence[Fact] | None = None) -> Evaluation:
        """Evaluate facts (by default those edited so far)."""
        raise NotImplementedError

    @property
    def _place(self) -> Place | None:
        """The place that the editor edits, given or found; ``None`` before it is known."""
        return self.editor.place

    @_place.setter
    def _place(self, place: Place | None) -> None:
        self.editor.place = place

    @property
    def place(self) -> dict[str, Any]:
        """The place that the editor edits, as plain values: ``layers``, ``token``, and whether the editor ``found`` it.

        An editor that has tuned itself adds ``strength``, ``phrasings``, ``preserve`` and ``stop``.

        Before it is known, the layers are empty. The token is ``None`` for a method that edits no single token.
        """
        place = self._place
        known = {"layers": [], "token": None} if place is None else place.to_dict()
        return {**known, "found": self.editor.finds_place}

    @property
    def applied_facts(self) -> CheckedFacts:
        """The facts edited so far."""
        return self.facts.select(lambda fact: fact.key in self._applied)

    @property
    def recorded_facts(self) -> list[Fact]:
        """The facts edited so far, in the order of their edits, with those that are no longer among the facts."""
        known = {fact.key: fact for fact in self.facts}
        words = {key: Fact.from_dict(row) for key, row in self._words.items() if key not in known}
        return [fact for key in self._applied if (fact := known.get(key) or words.get(key)) is not None]

    @property
    def neighbours_before(self) -> dict[str, list[bool]]:
        """By key of a fact edited so far, whether the true answer of each neighbour was generated before its edit."""
        return self._applied

    @property
    def undone_facts(self) -> CheckedFacts:
        """The facts of edits that were undone."""
        return self.facts.select(lambda fact: fact.key in self._undone and fact.key not in self._applied)

    @property
    def edited_facts(self) -> CheckedFacts:
        """The facts of all edits, those that were undone included."""
        return self.facts.select(lambda fact: fact.key in self._applied or fact.key in self._undone)

    @property
    def pending_facts(self) -> CheckedFacts:
        """The facts still to be edited."""
        return self.facts.select(lambda fact: fact.key not in self._applied and fact.key not in self._undone)

    @override
    def begin_state(self) -> None:
        # facts that were edited, with the neighbours whose truth was generated before
        self._applied: dict[str, list[bool]] = {}
        self._undone: set[str] = set()
        self._words: dict[str, dict[str, Any]] = {}  # the facts that were edited, as rows of a facts file
        self._written: list[str] = []  # the folders of edit files
        self._edits_made = 0
        self._last_step = 0
        self._place = None
        self._remembered: Mapping[int, Any] = {}
        self.renewals = 0
        """Number of renewals."""
        self.survival = Survival()
        """The curve of what training has left of the edits so far."""
        self._kept = Kept()

    def forget_replaced(self, facts: Sequence[Fact], undo: Undo) -> None:
        """Forget earlier edits of the prompts of ``facts``, which are edited to other targets, by any callback."""
        now = {fact.prompt: fact.key for fact in facts}
        gone = {fact.key for fact in self.recorded_facts if now.get(fact.prompt, fact.key) != fact.key}
        if gone:
            self._change_state(
                undo,
                applied={key: before for key, before in self._applied.items() if key not in gone},
                words={key: words for key, words in self._words.items() if key not in gone},
                kept=self._kept.without(gone),
            )
            undo.by(setattr, self, "survival", self.survival)
            self.survival = self.survival.without(gone)

    def _change_state(self, undo: Undo, **changes: Any) -> None:
        for name, value in changes.items():
            undo.by(setattr, self, f"_{name}", getattr(self, f"_{name}"))
            setattr(self, f"_{name}", value)

    @override
    def take_up(self, model: nn.Module) -> None:
        memory, is_other = self.editor.memory, self._models.model is not model
        super().take_up(model)
        if memory is not None:
            memory.switch(model)
            # a new object with the weights of another one, whose edits were remembered
            if is_other and not memory.content:
                memory.restore(self._remembered)

    @override
    def _state(self) -> dict[str, Any]:
        memory, state = self.editor.memory, super()._state()
        # another callback with the same memory may have turned to the next model already
        if memory is not None and memory.model is self._models.model:
            state["_remembered"] = memory.content
        return state

    @override
    def let_go(self) -> None:
        super().let_go()
        if self.editor.memory is not None:
            self.editor.memory.switch(None)

    @override
    def state_dict(self) -> dict[str, Any]:
        model = self._models.model
        if self.editor.memory is not None and model is not None:
            self.editor.memory.switch(model)
        return {
            "applied": self._applied,
            "undone": sorted(self._undone),
            "edits_made": self._edits_made,
            "last_step": self._last_step,
            "renewals": self.renewals,
            "facts": self._words,
            "edit_files": self._written,
            "place": None if self._place is None else self._place.to_dict(),
            "survival": self.survival.state(),
            "kept": self._kept.state(),
            "memory": None if self.editor.memory is None else self.editor.memory.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        where, counts = "the state of KnowledgeEditing in the checkpoint", ("edits_made", "last_step", "renewals")
        shapes = {"applied": {str: [bool]}, "undone": [str], "memory": dict, **dict.fromkeys(counts, int)}
        # states of earlier versions have none of these
        shapes |= {"facts": {str: dict}, "edit_files": [str], "place": dict, "survival": dict, "kept": dict}
        optional = ("memory", "facts", "edit_files", "place", "survival", "kept")
        check_fields(where, state_dict, optional, **shapes)
        for count in counts:
            if state_dict[count] < 0:
                raise CheckpointError(f"{where}: field {count!r} should be at least 0, but is {state_dict[count]}")
        survival = Survival.of_state(where, state_dict.get("survival") or {})
        kept = Kept.of_state(where, state_dict.get("kept"))
        if self.editor.memory is not None:
            # a checkpoint of a run without a memory has none
            self.editor.memory.load_state_dict(state_dict.get("memory") or {})
        self._applied, self._undone = dict(state_dict["applied"]), set(state_dict["undone"])
        self._words = dict(state_dict.get("facts") or {})
        self._written = list(state_dict.get("edit_files") or ())
        self.survival, self._kept = survival, kept
        self._edits_made, self._last_step, self.renewals = (state_dict[count] for count in counts)
        try:
            place = None if state_dict.get("place") is None else Place.from_dict(state_dict["place"])
        except ValueError as error:
            raise CheckpointError(f"{where}: field 'place': {error}") from error
        if place is not None and place.strength is None and self.editor.tune and not self._applied:
            place = None  # nothing has been edited yet, so the editor is still to be tuned
        self._place = place
        own = self._place
        if self._applied and place and own and (own.layers, own.token) != (place.layers, place.token):
            log.warning(
                "%sthe edits in the checkpoint were made at %s, this run's editor is set to %s: they stay where they "
                "are, and this run edits and renews at its own place",
                self.heading,
                Place(place.layers, place.token),
                Place(own.layers, own.token),
            )

    def recognise(self, pl_module: L.LightningModule) -> bool:
        """Begin a new state, and return ``False``, if the model's weights were replaced since the last run.

        They are taken to be those that were edited if at least one edited fact is generated. Every rank calls this.
        """
        left, self.left = self.left, {}
        facts = self.applied_facts
        if not left or not facts or are_left(left, find_model(pl_module)):
            return True
        held = int(self.evaluate(pl_module, facts).edits_exact.sum())
        changed = "%sthe edited weights were changed since the last run; of %d edited facts %d are generated: %s"
        if held:
            log.warning(changed, self.heading, len(facts), held, "taken to be edited still")
            self._kept = replace(self._kept, changes=())  # what they have of these is not known
            return True
        log.warning(changed, self.heading, len(facts), held, "these are other weights, which are edited anew")
        self.begin_state()
        if self.editor.memory is not None:
            self.editor.memory.switch(None)
            self.editor.memory.switch(find_model(pl_module))
        return False

    def take_leave(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let all callbacks know the weights that the run leaves, once; every rank calls this."""
        editings = callbacks_of(trainer, EditState)
        if self is not editings[0] or not any(editing._applied for editing in editings):
            return
        layers = {index for editing in editings for index in editing.editor.layers}
        left = fingerprints(expert_weights(find_model(pl_module), layers), Ranks.current())
        for callback in callbacks_of(trainer, StateOfWeights):
            callback.left = left
