"""Several callbacks of a kind in one trainer: names, states in checkpoints, metrics, and one report of all of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditEvent, EditListener, EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.data import Fact
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.solvers import BlockCoordinateDescent

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}") for text in ("callbacks used to create the checkpoint", "logs dir")
]

PROBES = (["The capital of Peru is Lima."], ["Norway"])


# -- states in checkpoints --------------------------------------------------------------------------------------------


def editing(facts: str | None = "a.jsonl", layers: tuple[int, ...] = (0,), **settings: Any) -> KnowledgeEditing:
    return KnowledgeEditing(Editor(layers), facts, **settings)


def state(number: int) -> dict[str, Any]:
    """The state of a callback that has made so many edits."""
    return {"applied": {}, "undone": [], "edits_made": number, "last_step": 0, "renewals": 0}


def restore(callbacks: list[Any], states: dict[str, Any]) -> list[int]:
    """Restore callbacks as a trainer does; returns the number of edits that each believes to have made."""
    checkpoint: dict[str, Any] = {"callbacks": dict(states)}
    for callback in callbacks:
        callback.on_load_checkpoint(SimpleNamespace(callbacks=callbacks), None, checkpoint)
    for callback in callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    return [callback.state_dict()["edits_made"] for callback in callbacks]


def test_settings_or_a_name_tell_callbacks_apart() -> None:
    makers: list[Callable[[], L.Callback]] = [
        lambda: editing(),
        lambda: editing("b.jsonl"),
        lambda: editing(None),
        lambda: editing(at={"epoch": 1}),
        lambda: editing(layers=(0, 1)),
        lambda: editing(name="late"),
        lambda: RoutingMonitor(),
        lambda: RoutingMonitor(max_texts=3),
        lambda: RoutingMonitor(PROBES[0]),
        lambda: RoutingMonitor(PROBES[1]),
        lambda: RoutingMonitor(name="late"),
        lambda: EditReport(),
        lambda: EditReport("other.json"),
    ]
    keys = [make().state_key for make in makers]
    assert len(set(keys)) == len(keys)
    assert keys == [make().state_key for make in makers]
    # a name is enough: whatever else changes, the state stays with it
    assert editing("b.jsonl", name="late", min_efficacy=0.5).state_key == keys[5]


def test_a_state_belongs_to_the_callback_of_its_name() -> None:
    states = {editing(name=name).state_key: state(number) for number, name in enumerate("ab", 1)}
    assert restore([editing("x", name="b"), editing("y", name="a")], states) == [2, 1]
    # one more callback starts anew, and one less leaves the others their states
    assert restore([editing(name="c"), editing(name="b"), editing(name="a")], states) == [0, 2, 1]
    assert restore([editing(name="b")], states) == [2]


@pytest.mark.parametrize(
    "key", ["KnowledgeEditing", editing("moved.jsonl").state_key, editing(name="other").state_key], ids=str
)
def test_the_only_callback_has_the_only_state(key: str) -> None:
    """Whatever the settings are, and in a checkpoint of a version that knew no keys of settings."""
    assert restore([editing()], {key: state(3)}) == [3]
    if "other" not in key:
        assert restore([editing(name="late")], {key: state(3)}) == [3]


@pytest.mark.parametrize("key", ["KnowledgeEditing", editing("moved.jsonl").state_key], ids=str)
def test_the_callback_without_a_name_has_the_state_without_one(key: str) -> None:
    named = {editing(name="a").state_key: state(1)}
    for callbacks, found in (
        ([editing(), editing(name="a")], [3, 1]),
        ([editing(name="a"), editing()], [1, 3]),
        ([editing(name="b"), editing(), editing(name="a")], [0, 3, 1]),
    ):
        assert restore(callbacks, {**named, key: state(3)}) == found


@pytest.mark.parametrize(
    ("names", "states"),
    [
        (["a", "b"], [None]),
        (["a", "c"], ["a", "b"]),
        (["a", None], ["a", "b"]),
        (["c"], ["a", "b"]),
        # one of each, but two names are a statement
        (["a"], ["b"]),
    ],
    ids=str,
)
def test_a_state_that_may_be_of_another_callback_is_refused(names: list[Any], states: list[Any]) -> None:
    keys = [editing("before.jsonl", name=name).state_key for name in states]
    callbacks = [editing(name=name) for name in names]
    with pytest.raises(MisconfigurationException, match="give each KnowledgeEditing the 'name' that it had") as caught:
        restore(callbacks, {key: state(1) for key in keys})
    lost = [key for key in keys if key not in [callback.state_key for callback in callbacks]]
    waiting = [callback.state_key for callback in callbacks if callback.state_key not in keys]
    assert all(key in str(caught.value) for key in (*lost, *waiting))


def test_a_report_with_another_file_goes_on() -> None:
    report, edit = EditReport("other.json"), {"perplexity": {"before": 2.0}, "edits": [], "answers": {}}
    checkpoint: dict[str, Any] = {"callbacks": {EditReport().state_key: edit, editing().state_key: state(1)}}
    report.on_load_checkpoint(SimpleNamespace(callbacks=[report]), None, checkpoint)  # type: ignore[arg-type]
    assert checkpoint["callbacks"] == {report.state_key: edit, editing().state_key: state(1)}


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a\n"])
def test_a_name_is_part_of_metrics(name: str) -> None:
    for make in (editing, RoutingMonitor):
        with pytest.raises(ValueError, match="name must be made of letters, digits"):
            make(name=name)


@pytest.mark.parametrize(
    ("callbacks", "group"),
    [
        (lambda: [editing(), editing("b.jsonl")], "edit"),
        (lambda: [editing(), editing(name="after")], "edit_after"),
        (lambda: [editing(name="a"), editing(name="a_before")], "edit_a_before"),
        (lambda: [RoutingMonitor(PROBES[0]), RoutingMonitor(PROBES[1])], "routing"),
        (lambda: [RoutingMonitor(name="edit"), RoutingMonitor()], "routing_edit"),
    ],
)
def test_metrics_of_the_same_name_are_refused(
    callbacks: Any, group: str, tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, callbacks())
    with pytest.raises(MisconfigurationException, match=f"would both log {group}/…; give each a 'name' of its own"):
        trainer.fit(tiny.module(), tiny.data())


def test_facts_that_contradict_each_other_are_refused_before_any_edit(
    tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    facts = tiny.corpus().edits
    other = [replace(facts[2], target_new="Accra")]
    first, second = (
        KnowledgeEditing(tiny.editor(), own, at="validation", name=name)
        for own, name in ((facts[:3], "first"), (other, "second"))
    )
    message = f"first and second would undo each other's edit: for the prompt {facts[2].prompt!r} the one has"
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, [first, second]).validate(tiny.module(), tiny.data(), verbose=False)
    assert first.editor.calls == []


def test_texts_that_measure_facts_of_one_editor_are_no_further_prompts_of_another(
    tiny: Any, make_trainer: Any, tmp_path: Path, asked: list[str]
) -> None:
    norway = tiny.corpus().edits[2]
    words = [
        Fact("Italy", "The capital of Italy is", "Accra", "Rome"),
        Fact("Spain", "The language of Spain is", "Latin", "Spanish"),
    ]
    texts = {"The language of Italy is", "The capital of Spain is"}
    for paraphrases in ((), tuple(texts)):
        asked.clear()
        first = KnowledgeEditing(tiny.editor(steps=1, phrasings=1), words, at="validation", name="first")
        other = [replace(norway, paraphrases=paraphrases)]
        second = KnowledgeEditing(tiny.editor(steps=1), other, at="validation", name="second")
        make_trainer(tmp_path, [first, second]).validate(tiny.module(), tiny.data(), verbose=False)
        assert [len(editing.editor.calls) for editing in (first, second)] == [1, 1]
        assert set(asked) == (set() if paraphrases else texts)


# -- two editors in one run -------------------------------------------------------------------------------------------


class Heard(EditListener):
    """Remembers whose edits there were."""

    def __init__(self) -> None:
        self.events: list[EditEvent] = []

    def on_edit_end(self, trainer: L.Trainer, pl_module: L.LightningModule, event: EditEvent) -> None:
        self.events.append(event)


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Four facts before the fit and two before epoch 2, by two editors, watched by two monitors."""

    def fit(folder: str, *more: L.Callback, ckpt: Path | None = None, **late: Any) -> SimpleNamespace:
        facts, solver = tiny.corpus().edits, BlockCoordinateDescent()
        early = KnowledgeEditing(tiny.editor(), facts[:4], name="early")
        late = {"editor": tiny.editor(layers=[0], solver=solver), "at": {"epoch": 2}, "name": "late", **late}
        second, heard = KnowledgeEditing(facts=facts[4:], **late), Heard()
        monitors = [RoutingMonitor(PROBES[0]), RoutingMonitor(PROBES[1], name="north")]
        callbacks = [early, second, *monitors, heard, EditReport(), *more]
        trainer, module, data = make_trainer(tmp_path / folder, callbacks, max_epochs=4), tiny.module(), tiny.data()
        asked: list[int] = []
        texts = data.preservation_texts
        data.preservation_texts = lambda: asked.append(trainer.global_step) or texts()
        trainer.fit(module, data, **({"ckpt_path": ckpt, "weights_only": True} if ckpt else {}))
        summary = json.loads((tmp_path / folder / "summary.json").read_text(encoding="utf-8"))
        return SimpleNamespace(
            trainer=trainer, module=module, early=early, late=second, monitors=monitors, heard=heard, asked=asked,
            summary=summary, facts=facts,
        )  # fmt: skip

    return fit


def logged(folder: Path) -> dict[str, list[float]]:
    with (folder / "logs" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_two_editors_and_two_monitors_in_one_run(run: Any, tmp_path: Path, capsys: Any) -> None:
    whole = run("whole")
    assert [event.name for event in whole.heard.events] == ["early", "late"]
    assert whole.heard.events[1].result.facts == whole.late.applied_facts == whole.facts[4:]
    assert whole.early.applied_facts == whole.facts[:4]
    metrics = logged(tmp_path / "whole")
    groups = {name.rpartition("/")[0] for name in metrics if name.startswith("edit")}
    parts = ("", "_before", "_after", "_seconds", "/survival")
    assert groups == {f"edit_{name}{part}" for name in ("early", "late") for part in parts}
    assert len(metrics["edit_early/efficacy"]) == 4 and len(metrics["edit_late/efficacy"]) == 2
    assert len(metrics["edit_early_after/efficacy"]) == len(metrics["edit_late_after/efficacy"]) == 1
    for group in ("routing", "routing_north"):
        assert len(metrics[f"{group}/similarity/mean"]) == 4 and len(metrics[f"{group}_edit/similarity/mean"]) == 2
    # each asks the data module once
    assert whole.asked == [0, 0]

    summary = whole.summary
    assert summary["edits"] == 6 and summary["solver"] == "Woodbury, BlockCoordinateDescent"
    assert list(summary)[-1] == "editors" and list(summary["editors"]) == ["early", "late"]
    for moment in ("before", "after", "after_training"):
        early, late = (summary["editors"][name][moment]["efficacy"] for name in ("early", "late"))
        assert summary[moment]["efficacy"] == pytest.approx((4 * early + 2 * late) / 6)
    for name, editing in (("early", whole.early), ("late", whole.late)):
        part, last = summary["editors"][name], float(whole.trainer.callback_metrics[f"edit_{name}/efficacy"])
        assert list(part) == ["edits", "solver", "place", "before", "after", "after_training", "renewals", "intervals"]
        assert part["edits"] == len(editing.facts) and part["solver"] == type(editing.editor.solver).__name__
        assert part["after_training"]["efficacy"] == pytest.approx(last)
        assert part["place"]["layers"] == list(editing.editor.layers) and not part["place"]["found"]
    assert summary["seconds"]["edit"] == pytest.approx(
        sum(event.result.seconds["edit"] for event in whole.heard.events)
    )
    assert summary["routing"]["first_edited_layer"] == 0
    first, second = whole.monitors
    assert summary["routing"]["similarity"] == pytest.approx(first.last_edit["similarity/mean"])
    shift = summary["routing"]["monitors"]["north"]
    assert shift["kl"] == pytest.approx(second.last_edit["kl/mean"]) and shift["per_layer"].keys() == {"0", "1"}
    printed = capsys.readouterr().out
    for text in ("6 edits with Woodbury, BlockCoordinateDescent in", "early: 4 edits with Woodbury", "late: 2 edits"):
        assert text in printed


def test_the_end_of_several_editors_is_that_of_all_facts_together(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    facts = tiny.corpus().edits
    # many paraphrases and few neighbours, and the other way round
    asked = tuple(f"Note {i}: {facts[0].prompt}" for i in range(7))
    first = [replace(facts[0], paraphrases=asked), replace(facts[1], neighbours=())]
    second = [replace(fact, paraphrases=()) for fact in facts[2:5]]
    settings: dict[str, Any] = {"on_failure": "keep"}
    editings = [
        KnowledgeEditing(tiny.editor(), own, name=name, **settings) for own, name in ((first, "a"), (second, "b"))
    ]
    report, module = EditReport(console=False), tiny.module()
    trainer = make_trainer(tmp_path, [*editings, report])
    trainer.fit(module, tiny.data())
    before = {key: own for editing in editings for key, own in editing.neighbours_before.items()}
    together = editings[0].evaluate(module, [*first, *second], before)
    found = report.summary(trainer)
    assert together.by_fact.keys() <= found["after_training"].keys()
    values = [(name, found["after_training"][name], together.metrics[name]) for name in together.by_fact]
    assert any(0 < value < 1 for *_, value in values)  # a plain mean would be another
    for name, value, expected in values:
        # products and sums of weights in float64
        assert value == pytest.approx(expected, abs=1e-6, nan_ok=True), name
        if name in found["intervals"]["after_training"]:
            low, high = found["intervals"]["after_training"][name]
            assert low <= value <= high, name


@pytest.mark.slow
def test_a_resume_between_the_edits_of_two_editors(run: Any, tiny: Any, tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run("whole", kept)
    # a setting that does not change the edit: the state is that of the name all the same
    resumed = run("resumed", ckpt=tmp_path / "kept" / "epoch=0.ckpt", min_efficacy=1e-9)
    assert resumed.early.editor.calls == []
    assert resumed.late.editor.calls == [[fact.key for fact in whole.facts[4:]]]
    weights = tiny.weights(whole.module)
    assert all(torch.equal(weights[name], value) for name, value in tiny.weights(resumed.module).items())
    for name in ("early", "late"):
        assert getattr(resumed, name).state_dict() == getattr(whole, name).state_dict()
    for name in ("edits", "before", "after", "after_training", "editors", "renewals"):
        assert resumed.summary[name] == whole.summary[name], name
    assert resumed.summary["routing"] == whole.summary["routing"]


def test_a_guard_is_about_the_facts_of_its_own_editor(run: Any, tiny: Any) -> None:
    hopeless = tiny.editor(targets=TargetOptimizer(steps=1, learning_rate=1e-3))
    found = run("run", editor=hopeless, min_efficacy=1.0)
    assert found.late.applied_facts == [] and found.late.edited_facts == found.facts[4:]
    assert found.early.applied_facts == found.facts[:4]
    assert [event.result.kept for event in found.heard.events] == [True, False]
    summary = found.summary
    assert summary["edits"] == summary["editors"]["early"]["edits"] == 4 and summary["editors"]["late"]["edits"] == 0
    assert summary["after_training"] == summary["editors"]["early"]["after_training"]
    assert summary["editors"]["late"]["after_training"] is None


# -- work that is done once -------------------------------------------------------------------------------------------


def test_preservation_texts_are_read_once_and_kept_while_they_are_needed(
    tiny: Any, make_trainer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("The capital of Italy is Rome.\nIn Spain, people speak Spanish.\n", encoding="utf-8")

    class Deleting(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            path.unlink()

    # one target step: every fact is lost, so that every renewal that is due is made
    editing = KnowledgeEditing(
        tiny.editor(steps=1), at={"step": 1}, preservation=str(path), renew_every_n_steps=1, max_renewals=2
    )
    make_trainer(tmp_path, [editing, Deleting()], max_epochs=2).fit(tiny.module(), tiny.data())
    assert len(editing.editor.calls) == 3 and editing.renewals == 2
