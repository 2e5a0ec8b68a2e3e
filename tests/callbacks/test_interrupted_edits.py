"""Ctrl-C at any line of an edit in a run: weights, states, memory and data module tell of the edit, or none does."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.data import Fact
from lit_moeedit.editing import EditMemory
from tests.interrupting import Interrupts, bits, by_exception, by_signal, ends_of_each, last_of_each, modes, spread

# a second interrupt can hit what is undone by the collector of an interrupted generator, which only reports it
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
Choose = Callable[[list[tuple[str, int]]], list[tuple[int, ...]]]
FILES = ("/lit_moeedit/", "/callbacks/")
TAIL = ("edit_making.py", "method.py", "memory.py", "transaction.py", "interrupts.py", "datamodule.py")
"""Files of the lines in which an edit is kept and recorded."""


class ByHand(KnowledgeEditing):
    """Edits when it is told to, and not by a schedule."""

    def due(self, trainer: L.Trainer, moment: str) -> list[Fact]:
        return []


class Interrupting(L.Callback):
    """Makes an edit again and again before an epoch, each time interrupted at other lines.

    Args:
        editing: the callback that edits.
        choose: chooses lines to interrupt at from all places of an edit, as numbers from 1.
        how: interrupts.
    """

    def __init__(self, editing: KnowledgeEditing, choose: Choose, how: Any) -> None:
        self.editing, self.choose, self.how = editing, choose, how
        self.tried, self.found = 0, {"none": 0, "all": 0}

    def state(self, trainer: L.Trainer, module: Any) -> dict[str, Any]:
        memory = self.editing.editor.memory
        assert memory is not None
        (optimizer,) = trainer.optimizers
        return {
            "weights": [bits(parameter) for parameter in module.parameters()],
            "optimizer": [bits(x) for state in optimizer.state.values() for x in state.values() if hasattr(x, "ndim")],
            "callback": {key: value for key, value in self.editing.state_dict().items() if key != "memory"},
            "memory": {layer: memory.size(layer) for layer in self.editing.editor.layers},
            "data module": trainer.datamodule.state_dict(),  # type: ignore[attr-defined]
        }

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        editing, memory = self.editing, self.editing.editor.memory
        assert memory is not None
        weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
        content, own = memory.content, dict(vars(editing))
        none, before = self.state(trainer, pl_module), modes(pl_module)

        def again() -> None:
            for parameter, old in zip(pl_module.parameters(), weights, strict=True):
                parameter.data.copy_(old)
            memory.restore(content)
            vars(editing).update(own)
            trainer.datamodule._excluded.clear()  # type: ignore[attr-defined]

        def edit() -> None:
            editing._edit(trainer, pl_module, editing.facts[:2])

        def run(*at: int) -> Interrupts:
            again()
            interrupts = Interrupts(FILES, *at, interrupt=self.how)
            assert interrupts.run(edit) == (not at)
            return interrupts

        run()  # the first edit does some work that later ones need not do
        places = run().places
        whole = self.state(trainer, pl_module)
        assert all(whole[key] != none[key] for key in whole if key != "optimizer")
        for at in self.choose(places):
            raised = run(*at).raised
            now = self.state(trainer, pl_module)
            kind = "all" if now["weights"] == whole["weights"] else "none"
            expected = whole if kind == "all" else none
            assert {key: now[key] for key in now if now[key] != expected[key]} == {}, raised
            after = modes(pl_module)
            assert {key: after[key] for key in after if after[key] != before[key]} == {}, raised
            self.tried += 1
            self.found[kind] += 1
        again()


def edit_interrupted(
    tiny: Any,
    make_trainer: Any,
    folder: Any,
    how: Any,
    choose: Callable[[list[tuple[str, int]]], list[tuple[int, ...]]],
) -> Interrupting:
    editing = ByHand(tiny.editor(layers=[1], steps=1, memory=EditMemory()), on_failure="keep")
    interrupting = Interrupting(editing, choose, how)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.WARNING)
    try:
        make_trainer(folder, [interrupting, editing], max_epochs=2).fit(tiny.module(), tiny.data())
    finally:
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGINT, before)
    return interrupting


def test_an_interrupted_edit_is_made_wholly_or_not_at_all(tiny, make_trainer, tmp_path) -> None:
    def choose(places: list[tuple[str, int]]) -> list[tuple[int, ...]]:
        tail = [i for i in last_of_each(places) if places[i - 1][0].endswith(TAIL)]
        return [(tail[i - 1], tail[i - 1] + 5) for i in spread(len(tail), 8)]

    found = edit_interrupted(tiny, make_trainer, tmp_path, by_signal, choose)
    assert found.tried == 8
    assert min(found.found.values()) > 0  # some of them came after the edit had been recorded


PARTS = [
    pytest.param(range(part, 10**6, 16), marks=pytest.mark.exhaustive, id=f"part {part} of 16") for part in range(16)
]


@pytest.mark.parametrize("some", [pytest.param(range(0, 10**6, 150), marks=pytest.mark.slow, id="sample"), *PARTS])
def test_an_edit_interrupted_at_every_line(tiny, make_trainer, tmp_path, some: range) -> None:
    def choose(places: list[tuple[str, int]]) -> list[tuple[int, ...]]:
        return [(i,) for i in ends_of_each(places)[some.start :: some.step]]

    found = edit_interrupted(tiny, make_trainer, tmp_path, by_signal if some.start % 2 else by_exception, choose)
    assert found.tried > (5 if some.step > 16 else 50)
