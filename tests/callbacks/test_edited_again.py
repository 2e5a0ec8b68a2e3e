"""A prompt that is edited again, to another target: by the same callback, by another one, and from an edit file.

Whatever keeps the first edit (memory, replay, hold, renewals, survival) is about the second one afterwards, and only
about it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditHold, EditListener, EditReplay, KnowledgeEditing
from lit_moeedit.callbacks.history import History
from lit_moeedit.editing import EditMemory
from lit_moeedit.edits import SavedEdits
from lit_moeedit.interrupts import Undo, held
from lit_moeedit.reports import outcome_of
from tests.callbacks.conftest import CONFIG, _corpus, _data, _editor, _module, _trainer
from tests.callbacks.replaying import Watching, stated

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "Checkpoint directory", "The dirpath has changed")
]

FIRST, *OTHERS = _corpus().edits[:3]
SECOND = replace(FIRST, target_new="Nairobi")
AFTER = {fact.key for fact in (SECOND, *OTHERS)}
WAYS = ("same callback", "another callback", "edit file")


class Seen(EditListener):
    """The events of edits."""

    wants_answers = True

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_edit_end(self, trainer: Any, pl_module: Any, event: Any) -> None:
        self.events.append(event)


def run(folder: Path, facts: dict[str, Any], ckpt: Path | None = None, file: Path | None = None) -> Any:
    """Fit two epochs, or three after a resume, with an edit before the last one.

    Args:
        folder: the run's folder, into which ``two`` writes its edit.
        facts: facts by name of a callback.
        ckpt: the checkpoint.
        file: edits that ``two`` applies.
    """
    memory, editings = EditMemory(), []
    for name, own in facts.items():
        editor: Any = SavedEdits(str(file)) if own is None else _editor(steps=12, memory=memory, contexts=("", "Note:"))
        settings = {"save_edits": str(folder / "edits")} if name == "two" and own is not None else {}
        settings |= {} if own is None else {"renew_below": 0.01}  # which keeps goals
        at = {"every_n_epochs": 1, "batch": 6}
        editings.append(KnowledgeEditing(editor, own, at, name=name, survival_every_n_steps=2, **settings))
    replay, hold, seen = EditReplay(share=0.5), EditHold(), Seen()
    _module()  # the same weights in each run
    module = Watching(config=CONFIG, learning_rate=3e-3)
    kept = [] if ckpt else [ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)]
    trainer = _trainer(folder, [*editings, replay, hold, seen, *kept], max_epochs=3 if ckpt else 2)
    trainer.fit(module, _data(samples_per_epoch=16), **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
    callbacks = {"editings": editings, "replay": replay, "hold": hold, "events": seen.events}
    return SimpleNamespace(**callbacks, memory=memory, module=module, trainer=trainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``runs(way)`` edits a prompt, and resumes with another target for it; ``runs("first")`` is the first run."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[str, Any]()
    # the later edit is that of the callback that comes first
    facts = {"same callback": {"one": [SECOND, *OTHERS]}, "another callback": {"two": [SECOND], "one": OTHERS}}
    facts["edit file"] = {"two": None, "one": OTHERS}

    def get(way: str) -> Any:
        if way == "edit file":
            get("another callback")  # which writes it
        if way not in made and way == "first":
            made[way] = run(folder / way, {"one": [FIRST, *OTHERS]})
        elif way not in made:
            assert get("first").hold.held >= {FIRST.key}
            made[way] = run(folder / way, facts[way], folder / "first/last.ckpt", folder / "another callback/edits")
        return made[way]

    return get


@pytest.mark.parametrize("way", WAYS)
def test_memory_and_replay_have_the_second_edit_only(way: str, runs: Any) -> None:
    found = runs(way)
    (event,) = found.events
    assert event.result.kept and [fact.key for fact in event.result.facts] == [SECOND.key]
    assert event.after.edits_exact.all()
    # each of three facts in two contexts
    for state in found.memory.state_dict().values():
        assert sorted(state["facts"]) == sorted(2 * [fact.prompt_key for fact in (FIRST, *OTHERS)])
    assert {fact.key for fact in found.replay.facts} == AFTER
    tokenizer = found.trainer.datamodule.tokenizer
    texts = [tokenizer.decode(ids) for batch in stated(found.module)[-2:] for ids in batch]
    assert any(SECOND.target_new in text for text in texts) and not any(FIRST.target_new in text for text in texts)


@pytest.mark.parametrize("way", WAYS)
def test_the_second_edit_alone_is_held_renewed_and_counted(way: str, runs: Any) -> None:
    found = runs(way)
    assert SECOND.key in found.hold.held and found.hold.held <= AFTER
    assert {key for facts in found.hold.state_dict()["facts"].values() for key in facts} <= AFTER
    assert sum(editing.survivors.edits for editing in found.editings) == 3
    for editing in found.editings:
        known, curve, kept = {f.key for f in editing.recorded_facts}, editing.survival, editing.state_dict()["kept"]
        assert known <= AFTER and known >= {*curve.right_after, *curve.generated, *curve.margins}
        assert known >= set(kept["facts"] if kept else ())
        assert SECOND.subject not in editing.survivors.lost


def test_what_an_undone_edit_would_have_replaced_is_there_again(runs: Any) -> None:
    (editing,) = runs("first").editings
    before, curve = editing.state_dict(), editing.survival
    assert FIRST.key in before["applied"] and FIRST.key in before["kept"]["facts"] and FIRST.key in curve.right_after
    with held(Undo()) as undo:
        editing.forget_replaced([SECOND], undo)
        state = editing.state_dict()
        assert {*state["applied"], *state["facts"], *state["kept"]["facts"]} == {fact.key for fact in OTHERS}
        assert FIRST.key not in (*editing.survival.right_after, *editing.survival.generated, *editing.survival.margins)
    after = editing.state_dict()
    assert (after["applied"], after["facts"], editing.survival) == (before["applied"], before["facts"], curve)
    assert after["kept"]["facts"] == before["kept"]["facts"]


def test_the_history_of_the_run_tells_which_edit_was_replaced(runs: Any) -> None:
    history = History()
    for way in ("first", "same callback"):
        for event in runs(way).events:
            history = history.with_edit(event)
    places = [(row.key, row.edit, row.replaced_by) for row in history.rows]
    assert places == [(FIRST.key, 1, 2), *((fact.key, 1, None) for fact in OTHERS), (SECOND.key, 2, None)]
    assert [outcome_of(row) for row in history.rows] == ["replaced", "holds", "holds", "holds"]


def test_the_first_edit_is_held_no_more_if_the_second_is_not_generated(runs: Any) -> None:
    found, hold = runs("same callback"), EditHold()
    (editing,), (event,) = found.editings, found.events
    hold._states = {editing.label: {FIRST.key: found.hold._states[editing.label][SECOND.key]}}
    after = replace(event.after, edits_exact=torch.zeros_like(event.after.edits_exact))
    hold.on_edit_end(found.trainer, found.module, replace(event, after=after))
    assert hold.state_dict()["facts"] == {} and hold.result is None
