"""An edit that cannot happen is refused, or named, when the run starts."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.callbacks.limits import FitLimits
from lit_moeedit.callbacks.schedule import Schedule

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "in eval mode", "logs directory", "not resumable")
]

MOMENTS: list[Any] = [
    "fit_start",
    {"epoch": 0},
    {"epoch": 3},
    {"epoch": 2, "batch": 2},
    {"every_n_epochs": 2},
    {"every_n_epochs": 2, "batch": 3},
    {"step": 0},
    {"step": 7},
    {"step": 7, "batch": 2},
]


@pytest.mark.parametrize("at", MOMENTS, ids=str)
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("made", [0, 1, 3])
def test_missed_facts_are_those_that_a_run_does_not_edit(at: Any, start: int, made: int) -> None:
    schedule, per_epoch = Schedule.parse(at), 3
    for epochs in range(start, 9):
        pending, edits = 5, made
        for epoch in range(start, epochs):
            moments = [schedule.due_at_epoch(epoch, edits) or (epoch == 0 and schedule.due_at_step(0))]
            for is_due in moments:
                if is_due and pending:
                    pending, edits = max(0, pending - (schedule.batch or pending)), edits + 1
            for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1):
                if schedule.due_at_step(step) and pending:
                    pending, edits = max(0, pending - (schedule.batch or pending)), edits + 1
        limits = FitLimits(start, epochs, start * per_epoch, epochs * per_epoch, per_epoch)
        assert schedule.missed(limits, 5, made) == pending
    assert schedule.missed(FitLimits(start), 5, 0) == 0


@pytest.fixture
def fit(tiny: Any, make_trainer: Any, tmp_path: Any) -> Any:
    """``fit(at, …)`` with four batches an epoch; returns the callback, which notes the steps of its edits."""

    class Noting(KnowledgeEditing):
        def _edit(self, trainer: L.Trainer, pl_module: Any, facts: Any) -> None:
            if facts:
                self.steps.append((trainer.global_step, len(facts)))
                for fact in facts:
                    self._applied[fact.key] = [False] * len(fact.neighbours)
                self._edits_made += 1
                self._last_step = trainer.global_step

        def _renew(self, trainer: L.Trainer, pl_module: Any) -> None:
            self._last_step = trainer.global_step
            self.renewed.append((trainer.global_step, trainer.fit_loop.batch_idx))

    # the schedule is that of the class above
    Noting.due = KnowledgeEditing.due  # type: ignore[method-assign]

    def start(at: Any, *callbacks: Any, module: Any = None, renew: int | None = None, **keys: Any) -> Any:
        editing = Noting(tiny.editor(preserve="none"), at=at, renew_every_n_steps=renew)
        editing.steps, editing.renewed = [], []
        trainer = make_trainer(tmp_path, [editing, *callbacks], **{"limit_val_batches": 0, **keys})
        trainer.fit(module or tiny.module(), tiny.data())
        return editing

    return start


@pytest.mark.parametrize(
    ("at", "keys", "message"),
    [
        ({"epoch": 4}, {}, r"at: \{epoch: 4\} comes too late for 6 of 6 facts: .*no epoch after epoch 0.*max_epochs=1"),
        ({"every_n_epochs": 1}, {}, "no epoch after epoch 0"),
        ("fit_start", {"max_epochs": 0}, "the run has no epoch; .*max_epochs=0"),
        ("fit_start", {"max_steps": 0}, "the run has no epoch"),
        ("fit_start", {"limit_train_batches": 0}, "the run has no epoch"),
        ({"step": 9}, {"max_steps": 5, "max_epochs": -1}, "ends after 5 optimizer steps.*max_steps=5"),
        ({"step": 5}, {}, "ends after 4 optimizer steps"),
        ({"step": 3}, {"limit_train_batches": 2}, "ends after 2 optimizer steps.*limit_train_batches=2"),
        ({"step": 3}, {"accumulate_grad_batches": 2}, "ends after 2 optimizer steps.*accumulate_grad_batches=2"),
        ({"epoch": 2}, {"max_steps": 8, "max_epochs": -1}, "no epoch after epoch 1"),
        ("validation", {}, "the run has no validation.*limit_val_batches=0"),
        ("validation", {"limit_val_batches": 1, "check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2"),
        ("validation", {"limit_val_batches": 1, "max_steps": 3}, "no validation"),
    ],
    ids=str,
)
def test_an_edit_that_never_comes_is_refused(fit: Any, at: Any, keys: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(at, **keys)


@pytest.mark.parametrize(
    ("at", "keys", "steps"),
    [
        ({"step": 4}, {}, [(4, 6)]),
        ({"step": 0}, {}, [(0, 6)]),
        # steps, not micro-batches: never within an accumulation, and once in a step
        ({"step": 0, "batch": 3}, {"accumulate_grad_batches": 2}, [(0, 3), (1, 3)]),
        ({"step": 2, "batch": 2}, {"accumulate_grad_batches": 2, "max_epochs": 2}, [(2, 2), (3, 2), (4, 2)]),
        ({"epoch": 1}, {"max_epochs": 2}, [(4, 6)]),
        ("validation", {"limit_val_batches": 1, "max_steps": 4}, [(4, 6)]),
        ("validation", {"limit_val_batches": 1, "max_steps": 2, "val_check_interval": 2}, [(2, 6)]),
    ],
    ids=str,
)
def test_an_edit_that_comes_at_the_last_moment_is_not_refused(fit: Any, caplog: Any, at: Any, keys: Any, steps: Any):
    assert fit(at, **keys).steps == steps
    assert "too late" not in caplog.text and "has ended" not in caplog.text


def test_facts_that_are_left_are_named_at_the_start_and_at_the_end(fit: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "lit_moeedit"):
        fit({"every_n_epochs": 1, "batch": 2}, max_epochs=3)
    assert "at: {every_n_epochs: 1, batch: 2} comes too late for 2 of 6 facts" in caplog.text
    assert "the run has ended at epoch 3, step 12, before 2 of 6 facts were edited" in caplog.text


def test_what_stops_a_run_early_is_named_at_its_end(fit: Any, caplog: Any) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    fit({"epoch": 2}, Stop(), max_epochs=3)
    assert "too late" not in caplog.text
    assert "the run has ended at epoch 1, step 4, before 6 of 6 facts were edited (at: {epoch: 2})" in caplog.text


def test_a_fast_dev_run_goes_on(fit: Any, caplog: Any) -> None:
    assert fit({"epoch": 4}, fast_dev_run=True, limit_val_batches=1.0).steps == []
    assert "at: {epoch: 4} comes too late for 6 of 6 facts" in caplog.text


def test_renewals_come_after_optimizer_steps(fit: Any, caplog: Any) -> None:
    editing = fit({"epoch": 0}, renew=1, accumulate_grad_batches=2)
    assert editing.renewed == [(1, 1), (2, 3)]
    assert "no renewal" not in caplog.text
    fit({"step": 2}, renew=3)
    assert "renew_every_n_steps=3: no renewal comes, the run ends after 4 optimizer steps and is edited after 2" in (
        caplog.text
    )


def test_manual_optimization_with_two_optimizers(fit: Any, tiny: Any, caplog: Any) -> None:
    class Manual(type(tiny.module())):  # type: ignore[misc]
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first = super().configure_optimizers()["optimizer"]
            return [first, super().configure_optimizers()["optimizer"]]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self._run(batch).logits.mean())
            if batch_idx % 2:  # gradients of two batches
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()

    editing = fit({"step": 2, "batch": 3}, module=Manual(config=tiny.config), renew=1)
    # two optimizers step after every second batch; trainer.global_step counts both
    assert editing.steps == [(2, 3), (4, 3)]
    assert editing.renewed == [(4, 3)]
    assert "too late" not in caplog.text


@pytest.mark.parametrize(
    ("fn", "at", "message"),
    [
        ("validate", "fit_start", "'validate' edits none of 6 facts: at: fit_start comes in a fit only"),
        ("test", {"epoch": 1}, "'test' edits none of 6 facts"),
        ("validate", "validation", "6 facts are edited for this 'validate' alone: it saves no checkpoint"),
        ("predict", "validation", "'predict' edits no facts"),
    ],
)
def test_evaluation_says_what_becomes_of_edits(
    tiny: Any, make_trainer: Any, tmp_path: Any, caplog: Any, fn: str, at: Any, message: str
) -> None:
    editing = KnowledgeEditing(tiny.editor(steps=1, preserve="none"), at=at, on_failure="keep")
    getattr(make_trainer(tmp_path, [editing]), fn)(tiny.module(), tiny.data())
    assert message in caplog.text


def test_an_edit_that_has_happened_is_no_matter(tiny: Any, make_trainer: Any, tmp_path: Any, caplog: Any) -> None:
    def made(*more: Any) -> Any:
        return [KnowledgeEditing(tiny.editor(steps=1, preserve="none"), at={"epoch": 1}, on_failure="keep"), *more]

    kept = ModelCheckpoint(tmp_path / "kept", filename="it", save_on_train_epoch_end=True)
    make_trainer(tmp_path / "first", made(kept), max_epochs=2).fit(tiny.module(), tiny.data())
    resumed = {"ckpt_path": tmp_path / "kept" / "it.ckpt", "weights_only": True}
    for fn, epochs in (("fit", 1), ("fit", 3), ("validate", 1)):
        trainer = make_trainer(tmp_path / f"{fn}{epochs}", made(), max_epochs=epochs)
        getattr(trainer, fn)(tiny.module(), tiny.data(), **resumed)
    assert "too late" not in caplog.text and "has ended" not in caplog.text and "edits none" not in caplog.text


# -- monitors ---------------------------------------------------------------------------------------------------------


def test_what_a_monitor_names_exists_from_the_first_validation_on(
    tiny: Any, make_trainer: Any, tmp_path: Any, caplog: Any
) -> None:
    seen: list[dict[str, float]] = []

    class Reader(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                metrics = trainer.callback_metrics.items()
                seen.append({name: float(value) for name, value in metrics if name.startswith("edit/")})

    kept = ModelCheckpoint(tmp_path / "kept", monitor="edit/efficacy", mode="max", filename="{epoch}")
    stop = EarlyStopping("edit/specificity_retained", mode="max", patience=9)
    waiting = EarlyStopping("edit/score", mode="max", patience=9, strict=False)
    editing = KnowledgeEditing(tiny.editor(preserve="none"), at={"epoch": 1})
    trainer = make_trainer(tmp_path, [editing, kept, stop, waiting, Reader()], max_epochs=2)
    trainer.fit(tiny.module(), tiny.data())
    assert seen[0].keys() == {"edit/efficacy", "edit/specificity_retained"}
    assert not any(math.isnan(value) for value in seen[0].values())
    assert seen[0]["edit/efficacy"] < seen[1]["edit/efficacy"]
    assert len(seen[1]) > 5 and kept.best_model_path.endswith("epoch=1.ckpt")
