"""What is left on a terminal: progress bars must not erase the report, nor the report what was there before."""

from __future__ import annotations

import io
import logging
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from rich import get_console, reconfigure
from rich.console import Console

from lit_moeedit.callbacks import EditReport
from lit_moeedit.callbacks.progress import edit_progress
from lit_moeedit.callbacks.summary import without_nan
from lit_moeedit.callbacks.summary_table import make_table
from lit_moeedit.editing import PHASES
from lit_moeedit.terminal import progress
from tests.screen import COLUMNS, terminal, visible


class Reporting(EditReport):
    """A report of an edit that was not made."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        metrics = {"efficacy": 0.5, "score": 0.25}
        self.measured.totals_of(None).add(2, True, metrics, metrics, dict.fromkeys((*PHASES, "edit"), 1.0))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


class Editing(L.Callback):
    """Shows the progress of an edit, and messages before, in and after it, as the command's logger prints them."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        get_console().print(f"before edit {step}")
        with edit_progress(trainer) as show:
            for done in range(3 if show else 0):
                show("targets", done + 1, 3)
                show("solve", done + 1, 3)
                get_console().print(f"part {done} of edit {step}")
        get_console().print(f"after edit {step}")


BARS: dict[str, Any] = {
    "rich": lambda: RichProgressBar(refresh_rate=1),
    "rich that leaves its bars": lambda: RichProgressBar(leave=True),
    "tqdm": lambda: TQDMProgressBar(refresh_rate=1),
    "tqdm that leaves its bars": lambda: TQDMProgressBar(leave=True),
    "none": lambda: None,
}


@pytest.fixture(autouse=True)
def _own_console() -> Any:
    yield
    reconfigure()  # the console that rich shares


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
@pytest.mark.parametrize("bar", BARS)
def test_the_whole_report_stays_on_the_screen(tmp_path: Any, bar: str, stage: str) -> None:
    with terminal() as written:
        reconfigure()
        report, progress = Reporting(), BARS[bar]()
        trainer = L.Trainer(
            callbacks=[report, Editing(), *([progress] if progress else [])],
            enable_progress_bar=progress is not None,
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_epochs=2,
            limit_train_batches=2,
            limit_val_batches=2,
            limit_test_batches=2,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        getattr(trainer, stage)(BoringModel())
    text = io.StringIO()
    Console(file=text, width=COLUMNS).print(make_table(without_nan(report.summary(trainer))))
    expected = [line.rstrip() for line in text.getvalue().splitlines()]
    screen = visible(written[0])
    assert len(expected) > 6
    start = screen.index(next(line for line in screen if "2 edits with" in line))
    # all of it, in one piece, and the summary's path below
    assert screen[start : start + len(expected)] == expected
    if stage == "fit" and "rich" not in bar:  # two threads of rich may write over each other's lines
        messages = ["before edit", "after edit", *(f"part {done} of edit" for done in range(3 if progress else 0))]
        for message in (f"{message} {step}" for message in messages for step in (1, 2, 3, 4)):
            assert "".join(screen).count(message) == 1, message
    assert "".join(screen[start + len(expected) :]).startswith(f"Summary: {tmp_path / 'summary.json'}")


def test_the_log_of_a_command_stays_above_its_bars(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lit_moeedit")
    with terminal() as written:
        reconfigure()
        with progress() as show:
            for phase in ("trace", "targets"):
                show(phase, 1, 2)
                get_console().print(f"in {phase}")
                show(phase, 2, 2)
        get_console().print("the end")
    assert [line for line in visible(written[0]) if line] == ["in trace", "in targets", "the end"]
    assert "trace" in written[0].split("in trace")[0]  # the bar was there
