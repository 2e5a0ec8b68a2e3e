"""The outputs of replay: its count, the summary, the report and the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moeedit.callbacks import EditReplay, EditReport, KnowledgeEditing
from lit_moeedit.callbacks.replayed import Tally
from lit_moeedit.sharding.ranks import Ranks
from tests.callbacks.replaying import Watching, old_answers, replayed

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")


def test_other_ranks_count_as_this_one_until_they_exchange() -> None:
    tally = Tally()
    tally.add(3, ranks=4)
    assert tally.statements == 12
    resumed = Tally.of_state("here", tally.state())
    resumed.add(1, ranks=2)
    assert resumed.statements == 14
    resumed.exchange(Ranks())  # there is no other
    assert resumed.statements == 13


def test_a_checkpoint_without_a_count_is_read() -> None:
    replay = EditReplay()
    state = replay.state_dict()
    del state["replayed"]
    replay.load_state_dict(state)
    assert replay.replayed is None


@pytest.fixture
def run(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    """Fit with an edit at the start, a replay and a report; returns the replay and the module."""

    def fit(data: Any, *callbacks: Any, ckpt_path: str | None = None) -> Any:
        replay, module = EditReplay(share=0.25, on_conflict="yield"), Watching(config=tiny.config, learning_rate=3e-3)
        editing = KnowledgeEditing(tiny.editor(), on_failure="keep")
        trainer = make_trainer(tmp_path, [editing, replay, EditReport(console=False), *callbacks], max_steps=4)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return replay, module

    return fit


def test_facts_of_edit_files_alone_are_watched_and_measured(
    tiny: Any, make_trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_moeedit.callbacks.needs.MEASURE_EVERY", 2)
    editing = KnowledgeEditing(tiny.editor(), on_failure="keep", save_edits=str(tmp_path / "edits"))
    make_trainer(tmp_path, [editing], max_steps=1).fit(tiny.module(), tiny.data())
    replay, module = EditReplay(share=0.25, edits=str(tmp_path / "edits")), Watching(config=tiny.config)
    make_trainer(tmp_path, [replay], max_steps=4).fit(module, tiny.data(drop_edited=False))
    assert replay.watch.metrics["edit/conflicts"] == len(old_answers(module, tiny)) > 0
    assert replay.state_dict()["needs"]


def test_the_summary_the_report_and_the_log_have_it(
    run: Any, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lit_moeedit")
    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, filename="last")
    data = tiny.data(drop_edited=False)
    contradicted = {f"{fact.subject}|capital" for fact in data.corpus.edits[1:]}
    data.corpus.train = [one for one in data.corpus.train if one.fact not in contradicted]
    replay, module = run(data, saving)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["replay"]
    found = summary[""]
    assert found["statements"] == sum(replayed(module)) > 0
    assert found["conflicts"] == len(old_answers(module, tiny)) > 0
    given_up, facts = data.corpus.edits[0].subject, len(data.corpus.edits) - 1
    assert found == {
        **{"share": 0.25, "of": "rows", "every_n_steps": 1, "statements": found["statements"], "facts": facts},
        **{"on_conflict": "yield", "conflicts": found["conflicts"], "given_up": [given_up]},
    }
    assert caplog.text.count(f"Replay: {replay.replayed}") == 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Replay: <bdi>{replay.replayed}</bdi>" in page and "EditReplay{}.on_conflict" in page
    # resumed after its end, the run has nothing left to train
    run(data, ckpt_path=str(tmp_path / "saved" / "last.ckpt"))
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["replay"] == summary
