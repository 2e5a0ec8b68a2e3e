from __future__ import annotations

import pytest

from lit_moeedit.callbacks import Schedule


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("fit_start", Schedule("fit_start")),
        ("validation", Schedule("validation")),
        ({"epoch": 0}, Schedule("epoch", 0)),
        ({"step": 7}, Schedule("step", 7)),
        ({"batch": 3, "epoch": 2}, Schedule("epoch", 2, 3)),
        ({"every_n_epochs": 2, "batch": 10}, Schedule("every_n_epochs", 2, 10)),
    ],
)
def test_parse(at, expected):
    assert Schedule.parse(at) == expected


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("epoch", "got 'epoch'"),
        (3, "got 3"),
        (None, "got None"),
        ({}, r"got the keys \[\]"),
        ({"batch": 3}, r"got the keys \['batch'\]"),
        ({"epochs": 3}, r"got the keys \['epochs'\]"),
        ({"epoch": 1, "step": 2}, r"got the keys \['epoch', 'step'\]"),
        ({"fit_start": 1}, "got the keys"),
        ({"epoch": -1}, "epoch must be a whole number of at least 0, got -1"),
        ({"step": 1.5}, "step must be a whole number of at least 0, got 1.5"),
        ({"every_n_epochs": 0}, "every_n_epochs must be a whole number of at least 1, got 0"),
        ({"epoch": True}, "got True"),
        ({"epoch": 1, "batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"epoch": 1, "batch": "2"}, "got '2'"),
    ],
)
def test_what_parse_refuses(at, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(at)


def _epochs(at, total, start=0, edits=0):
    """Epochs in which a run edits, if every due epoch makes one edit."""
    schedule, due = Schedule.parse(at), []
    for epoch in range(start, total):
        if schedule.due_at_epoch(epoch, edits):
            due.append(epoch)
            edits += 1
    return due


def test_one_edit_at_an_epoch():
    assert _epochs({"epoch": 2}, 6) == [2]
    assert _epochs({"epoch": 0}, 6) == [0]
    assert _epochs({"epoch": 2}, 6, start=4) == [4]  # a run that starts later still makes it
    assert _epochs({"epoch": 2}, 6, start=3, edits=1) == []


def test_batches_from_an_epoch_on():
    assert _epochs({"epoch": 2, "batch": 3}, 6) == [2, 3, 4, 5]
    assert _epochs({"epoch": 2, "batch": 3}, 6, start=4, edits=2) == [4, 5]


def test_every_n_epochs_leaves_the_first_epoch_alone():
    assert _epochs({"every_n_epochs": 1}, 4) == [1, 2, 3]
    assert _epochs({"every_n_epochs": 2}, 7) == [2, 4, 6]
    assert _epochs({"every_n_epochs": 2}, 7, start=5, edits=2) == [6]


def test_steps_and_epochs_do_not_answer_for_each_other():
    assert [step for step in range(6) if Schedule.parse({"step": 3}).due_at_step(step)] == [3, 4, 5]
    assert not any(Schedule.parse({"epoch": 1}).due_at_step(step) for step in range(5))
    assert _epochs({"step": 1}, 5) == []
    assert _epochs("validation", 5) == []
    assert not Schedule.parse("validation").due_at_step(9)


def test_fit_start_is_before_any_epoch_that_the_run_starts_with():
    assert Schedule.parse("fit_start").due_at_epoch(0, 0)
    assert Schedule.parse("fit_start").due_at_epoch(3, 0)
