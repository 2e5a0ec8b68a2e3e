"""Signals and failures end a run on all ranks, with an exit code that tells that it has not finished."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_moeedit import cli
from lit_moeedit.atomic_files import atomic_file
from lit_moeedit.callbacks import EditListener, EditReport, EndTogether, KnowledgeEditing
from lit_moeedit.data import FactsDataModule
from lit_moeedit.module import LitMoE
from lit_moeedit.sharding import watch
from tests.processes import Outcome, start_ranks

BOUND = 60.0


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers as a process in a terminal begins with them; all of them must be back after a run."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    for number in numbers:
        signal.signal(number, before[number])


class Striking(EditListener):
    """Sends this process a signal once, when an edit starts or in a training batch."""

    def __init__(self, number: int, in_edit: bool, ranks: tuple[int, ...] = (0, 1)) -> None:
        self.number, self.in_edit, self.ranks, self.struck = number, in_edit, ranks, False

    def _strike(self, trainer: L.Trainer) -> None:
        if not self.struck and trainer.global_rank in self.ranks:
            self.struck = True
            signal.raise_signal(self.number)

    def on_edit_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.in_edit:
            self._strike(trainer)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.in_edit and trainer.global_step == 1:
            self._strike(trainer)


@pytest.mark.parametrize("in_edit", [True, False])
def test_sigterm_ends_a_run_with_143_and_without_half_an_edit(
    tiny: Any, make_trainer: Any, tmp_path: Path, in_edit: bool, caplog: Any
) -> None:
    editing = KnowledgeEditing(tiny.editor(), at={"epoch": 0 if in_edit else 1})
    trainer = make_trainer(tmp_path, [editing, Striking(signal.SIGTERM, in_edit)], max_epochs=2)
    module = tiny.module()
    with pytest.raises(SIGTERMException) as ended:
        trainer.fit(module, datamodule=tiny.data())
    assert ended.value.code == 143
    assert "told to end by SIGTERM" in caplog.text
    assert trainer.global_step == (0 if in_edit else 2)
    assert not editing.applied_facts and editing.state_dict()["edits_made"] == 0
    if in_edit:
        fresh = tiny.module()
        fresh.configure_model()
        for name, weight in tiny.weights(fresh).items():
            assert torch.equal(weight, tiny.weights(module)[name])


def test_sigterm_ends_a_prediction(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    """Lightning's own loop does not look for it."""
    done: list[int] = []

    class Predicting(L.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> None:
            done.append(batch_idx)
            if batch_idx == 1:
                signal.raise_signal(signal.SIGTERM)

    trainer = make_trainer(tmp_path, [EndTogether()])
    with pytest.raises(SIGTERMException) as ended:
        trainer.predict(Predicting(), torch.utils.data.DataLoader(range(9)), return_predictions=False)
    assert ended.value.code == 143 and done == [0, 1]


def test_sigterm_in_the_last_batch_leaves_a_run_unfinished(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    class Late(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                signal.raise_signal(signal.SIGTERM)

    trainer = make_trainer(tmp_path, [Late(), EndTogether()])
    with pytest.raises(SIGTERMException) as ended:
        trainer.fit(tiny.module(), datamodule=tiny.data())
    assert ended.value.code == 143 and trainer.global_step == 4


@pytest.mark.parametrize("moment", ["a batch", "parsing"])
def test_the_command_exits_with_130_after_ctrl_c(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if moment == "a batch":  # as Lightning does
                sys.exit(1)
            raise

    monkeypatch.setattr(cli, "run", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_sigterm_outside_of_a_run_leaves_no_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "summary.json") as beside:
            beside.write_text("{", encoding="utf-8")
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "run", write)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_exits_of_the_command_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run", lambda: sys.exit(143))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 143


def test_it_stands_before_checkpoints_once(tiny: Any, make_trainer: Any, tmp_path: Path) -> None:
    made = [KnowledgeEditing(tiny.editor(), name="a"), KnowledgeEditing(tiny.editor(), name="b", at={"epoch": 7})]
    trainer = make_trainer(tmp_path, [*made, ModelCheckpoint(tmp_path)])
    for _ in range(2):
        for _editing in made:
            EndTogether.add_to(trainer)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds.count(EndTogether) == 1 and kinds.index(EndTogether) == kinds.index(ModelCheckpoint) - 1


# -- two ranks --------------------------------------------------------------------------------------------------------


def _two(folder: str, strategy: str, *callbacks: L.Callback, as_command: bool = False) -> str:
    """Fit on this rank; returns how that ended. The command adds the callback before the fit."""
    from tests.callbacks.conftest import _data, _editor, _module, _trainer

    signal.signal(signal.SIGINT, signal.default_int_handler)
    editing = KnowledgeEditing(_editor(), at={"epoch": 0})
    made = [editing, EditReport(console=False), *callbacks]
    trainer = _trainer(folder, made, strategy=strategy, devices=2, max_epochs=2)
    if as_command:
        EndTogether.add_to(trainer)
    try:
        trainer.fit(_module(), _data(batch_size=4))
    except BaseException as ended:
        cause = ended.__context__ if isinstance(ended, SystemExit) and ended.code == 1 else None
        return f"{type(cause or ended).__name__}: {cause or ended}"
    return "finished"


def struck(folder: str, strategy: str, cases: dict[str, tuple[Any, ...]]) -> dict[str, str]:
    return {name: _two(f"{folder}/{name}", strategy, Striking(*case)) for name, case in cases.items()}


EVERY_SIGNAL = [
    (signal.SIGTERM, 0, False),
    (signal.SIGTERM, 1, True),
    (signal.SIGINT, 1, False),
    (signal.SIGINT, 0, True),
]


@pytest.mark.parametrize(
    ("strategy", "signals"),
    [
        ("ddp", EVERY_SIGNAL[1:3]),
        pytest.param("ddp", EVERY_SIGNAL[::3], marks=pytest.mark.slow),
        pytest.param("deepspeed_cpu_stage_3", EVERY_SIGNAL, marks=pytest.mark.slow),
    ],
    ids=["ddp", "ddp, others", "zero 3"],
)
def test_a_signal_to_one_of_two_ranks_ends_both(strategy: str, signals: list[Any], tmp_path: Path) -> None:
    cases = {
        f"{number.name} to {rank} {'in an edit' if in_edit else 'in training'}": (number, in_edit, (rank,))
        for number, rank, in_edit in signals
    }
    found = start_ranks(struck, 2, str(tmp_path), strategy, cases, group=False, seconds=BOUND)
    for rank, outcome in enumerate(found):
        assert outcome.error is None, outcome.error
        for name, (number, _, (hit,)) in cases.items():
            own = "SIGTERMException: 143" if number == signal.SIGTERM else "KeyboardInterrupt: SIGINT"
            other = "RankTerminated: 143" if number == signal.SIGTERM else f"RankError: rank {hit} failed: {own}"
            assert outcome.value[name] == (own if rank == hit else other), name


def failing(folder: str, strategy: str, error: BaseException) -> None:
    """Rank 1 alone fails in the second training step, while the other one waits for its gradients or weights."""
    watch.GRACE, watch.LEAVE = 1.0, 3.0
    step: Callable[..., Any] = LitMoE.training_step

    def fail(module: LitMoE, *args: Any) -> Any:
        if os.environ["RANK"] == "1" and module.global_step == 1:
            raise error
        return step(module, *args)

    with patch.object(LitMoE, "training_step", fail):
        raise RuntimeError(_two(folder, strategy))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_cpu_stage_3", marks=pytest.mark.slow)])
def test_a_rank_that_fails_in_training_leaves_nobody_waiting(strategy: str, tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("no room")
    found: list[Outcome] = start_ranks(failing, 2, str(tmp_path), strategy, error, group=False, seconds=BOUND)
    assert [outcome.exitcode for outcome in found] == [1, 1]
    assert found[1].error is not None and "OutOfMemoryError: no room" in found[1].error


def starting(folder: str, strategy: str) -> list[str]:
    """A signal to rank 0 before Lightning's loops begin; an interrupt of rank 1 while it gets its data."""
    watch.log.addHandler(logging.FileHandler(f"{folder}/{os.environ['RANK']}.log"))
    run = L.Trainer._run_stage

    def late(trainer: L.Trainer) -> Any:
        if trainer.global_rank == 0:
            signal.raise_signal(signal.SIGTERM)
        return run(trainer)

    def interrupted(data: FactsDataModule, stage: str) -> None:
        if os.environ["RANK"] == "1":
            raise KeyboardInterrupt("SIGINT")

    with patch.object(L.Trainer, "_run_stage", late):
        found = [_two(f"{folder}/first", strategy)]
    with patch.object(FactsDataModule, "setup", interrupted):
        return [*found, _two(f"{folder}/second", strategy, as_command=True)]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("deepspeed_cpu_stage_3", marks=pytest.mark.slow)])
def test_ranks_end_together_while_they_start(strategy: str, tmp_path: Path) -> None:
    first, second = start_ranks(starting, 2, str(tmp_path), strategy, group=False, seconds=BOUND)
    assert second.value == ["RankTerminated: 143", "KeyboardInterrupt: SIGINT"], second.error
    assert "rank 1 failed: KeyboardInterrupt: SIGINT" in (tmp_path / "0.log").read_text("utf-8")
    if first.exitcode == 0:  # otherwise it was ended where nothing woke it
        assert first.value[0] == "SIGTERMException: 143" and first.value[1] != "finished", first.error
