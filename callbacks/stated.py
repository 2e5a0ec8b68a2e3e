"""The facts that are stated in a run: those of edit files, and those that its callbacks have edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L

from lit_moeedit.callbacks.conflicts import ConflictWatch
from lit_moeedit.callbacks.edit_state import EditState
from lit_moeedit.callbacks.named import callbacks_of
from lit_moeedit.callbacks.resources import from_datamodule
from lit_moeedit.data.facts import Fact
from lit_moeedit.replay import Statements


def contexts_of(trainer: L.Trainer) -> list[str]:
    """Return the contexts of all editors in the trainer, without repetition; the empty one if there are none."""
    known = (getattr(editing.editor, "contexts", ("",)) for editing in callbacks_of(trainer, EditState))
    return list(dict.fromkeys(text for own in known for text in own)) or [""]


class StatedFacts:
    """The facts that are stated now, which are the same on all ranks.

    Args:
        statements: the statements of facts that are stated from the start, and whatever else is edited.

    Attributes:
        statements: the statements of all facts that are stated now.
        protected: the facts whose edit is in the weights, with those that were given up.
    """

    def __init__(self, statements: Statements) -> None:
        self.statements = statements
        self.protected: tuple[Fact, ...] = ()
        self._filed = statements.facts
        self._applied: Sequence[Mapping[str, Any]] | None = None  # of each callback, as they were last taken

    def update(self, trainer: L.Trainer, watch: ConflictWatch) -> bool:
        """Take the facts that are edited now, without those given up; every rank calls this.

        The watch is told of other facts, and looks at the training texts for them.

        Returns:
            ``True`` if something has changed.
        """
        editings = callbacks_of(trainer, EditState)
        applied = [editing.neighbours_before for editing in editings]
        known = self._applied
        is_same = known is not None and len(applied) == len(known) and all(map(_is, applied, known))
        if is_same and not watch.given_up & self.statements.keys():
            return False
        if not is_same:
            self._applied = applied
            recorded = (fact for editing in editings for fact in editing.recorded_facts)
            # an edit from a file may have been replaced
            self.protected = tuple({fact.prompt: fact for fact in (*self._filed, *recorded)}.values())
            watch.protect(self.protected, self.statements.tokenizer)
            texts = from_datamodule(trainer, "training_texts") if self.protected else None
            if texts is not None:
                watch.look_ahead(texts)
        self.statements = self.statements.of(fact for fact in self.protected if fact.key not in watch.given_up)
        return True


def _is(one: object, other: object) -> bool:
    return one is other
