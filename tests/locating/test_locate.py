"""Locating: candidates, the rule, trials that leave no trace, ``auto`` in the editor, and the command."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from lit_moeedit import cli
from lit_moeedit.data import neutral_texts
from lit_moeedit.editing import Editor, FineTuning, Location, Place, TargetOptimizer, locate
from lit_moeedit.editing.locating import Trial
from lit_moeedit.editing.locating import search as searching
from lit_moeedit.editing.locating.search import _around_peaks
from lit_moeedit.editing.locating.trials import choose
from tests.processes import run_ranks
from tests.sharding.small_edits import FACTS, TEXTS, prepared
from tests.sharding.small_edits import model as small_model
from tests.sharding.small_edits import tokenizer as small_tokenizer


def auto(**settings: Any) -> Editor:
    usual = {"token": "auto", "targets": TargetOptimizer(steps=3, learning_rate=0.5)}
    return Editor("auto", **{**usual, **settings})


class TestCandidates:
    def test_peaks(self) -> None:
        wide = [0.0, 0.1, 0.2, 0.9, 0.3, 0.1, 0.0, 0.4, 0.0]
        single = [0.0, 0.0, 0.0, 0.0, 0.8, 0.0, 0.0, 0.0, 0.1]
        found = [place.layers for place in _around_peaks(range(10, 19), "last", single, wide, 4)]
        assert found == [(12, 13, 14), (14,), (16, 17, 18), (18,)]

    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_small_models(self, layers: int) -> None:
        found = _around_peaks(range(layers), "last", [0.1] * layers, [0.1] * layers, 4)
        assert len({place.layers for place in found}) == len(found) >= layers
        assert found[0].layers == tuple(range(layers))


def trial(
    efficacy: float | None, general: float = 1.0, kept: float = 1.0, change: float = 1.0, nll: float = 0.1
) -> Trial:
    return Trial(Place((0,), "last"), nll, efficacy, general, kept, change)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        # efficacy comes first: two facts more are worth everything else
        ([trial(0.75, 1.0, 1.0), trial(1.0, 0.5, 0.5)], 1),
        # one fact is no difference
        ([trial(0.875, 1.0, 1.0), trial(1.0, 0.5, 0.5)], 0),
        # the smaller change decides between equals
        ([trial(1.0, change=0.5), trial(1.0, 0.99, change=0.2)], 1),
        # a place that was not edited cannot be best
        ([trial(None, nll=0.0), trial(0.125)], 1),
        ([trial(None, nll=3.0), trial(None, nll=2.0)], 1),
        # unknown shares are left out
        ([trial(1.0, math.nan, 0.5), trial(1.0, math.nan, 0.9)], 1),
    ],
)
def test_the_rule(trials: list[Trial], best: int) -> None:
    assert choose(trials, facts=8) == best


def test_the_table_fits_into_80_columns() -> None:
    place = Place((45, 46, 47), "subject_last")
    found = Location((Trial(place, 10.25, 1.0, 0.5, 1.0, 12.345),), 0, 8, None, {"edits": 1.0})
    console = Console(width=80, record=True, file=StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "…" not in text and "45, 46, 47" in text and "12.345" in text


class TestLocate:
    def test_nothing_of_the_trials_is_left(
        self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any, unchanged: Any
    ) -> None:
        unchanged(model)
        with torch.inference_mode():  # in which Lightning validates
            found = locate(model, tokenizer, facts, texts, editor=auto(), places=2)
        assert {trial.place.token for trial in found.trials} == {"subject_last", "last"}
        # no later token reads the subject's hidden state after the last layer
        assert all(trial.place.layers[-1] < 2 for trial in found.trials if trial.place.token == "subject_last")
        assert found.best is found.trials[choose(found.trials, found.best.facts)] and found.best.score is not None

    def test_a_place_with_a_high_target_loss_is_not_edited(
        self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lit_moeedit.editing.locating.trials.MAX_EXCESS", 0.0)
        found = locate(model, tokenizer, facts, texts, editor=auto(), places=1)
        lowest = min(trial.nll for trial in found.trials)
        assert {trial.efficacy is not None for trial in found.trials if trial.nll > lowest} == {False}
        assert found.best.nll == lowest

    def test_stronger_targets_where_the_default_does_not_reach(
        self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(searching, "PERSISTENT", {"steps": 2, "learning_rate": 0.5})
        monkeypatch.setattr(searching, "FOUND", 0.0)
        found = locate(model, tokenizer, facts, texts, places=1)
        assert found.targets == {"steps": 2, "learning_rate": 0.5} and "steps: 2" in found.yaml()

    def test_without_text_nothing_is_preserved(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        facts: Any,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(searching, "FOUND", math.inf)
        locate(model, tokenizer, facts, places=1, trial_facts=2)
        assert "nothing preserved" in caplog.text
        with pytest.raises(ValueError, match="needs preservation text"):
            locate(model, tokenizer, facts, editor=auto())

    @pytest.mark.parametrize("name", ["trial_facts", "final_facts", "trace_facts", "places"])
    def test_numbers(self, model: PreTrainedModel, tokenizer: Any, facts: Any, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            locate(model, tokenizer, facts, **{name: 0})

    def test_figure(self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any) -> None:
        pytest.importorskip("matplotlib")
        found = locate(model, tokenizer, facts, texts, editor=auto(token="last"), places=1)
        axes = found.figure().axes
        assert [len(ax.patches) for ax in axes[:2]] == [len(found.layers)] * 2
        assert axes[1].get_xlabel().startswith("layer") and axes[0].get_ylabel() == "token"
        assert [text.get_text() for text in axes[0].get_yticklabels()] == ["subject_last", "last"]


def place_on_a_rank(kind: str) -> tuple[Place, bool]:
    model, optimizers, read = prepared(kind)
    before = read()
    found = locate(model, small_tokenizer(), FACTS, TEXTS, editor=auto(), places=1, optimizers=optimizers)
    return found.place, all(torch.equal(a, b) for a, b in zip(before, read(), strict=True))


@pytest.mark.slow
@pytest.mark.deepspeed
def test_ranks_with_sharded_weights_find_the_place_of_one_process() -> None:
    alone = locate(small_model(), small_tokenizer(), FACTS, TEXTS, editor=auto(), places=1).place
    assert run_ranks(place_on_a_rank, 2, "zero 3") == [(alone, True)] * 2


class TestEditor:
    def test_auto(self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any, caplog: Any) -> None:
        caplog.set_level("INFO", "lit_moeedit")
        editor = auto()
        expected = locate(model, tokenizer, facts, texts, editor=auto()).place
        result = editor.edit(model, tokenizer, facts, texts)
        assert editor.place == expected and tuple(result.deltas) == expected.layers == editor.layers
        assert f"{expected} chosen of" in caplog.text

    def test_only_the_token(self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any) -> None:
        editor = Editor([0, 1], token="auto", targets=TargetOptimizer(steps=3))
        editor.edit(model, tokenizer, facts, texts)
        assert editor.layers == (0, 1) and editor.token in ("subject_last", "last")

    def test_only_the_layers(self, model: PreTrainedModel, tokenizer: Any, facts: Any, texts: Any) -> None:
        editor = auto(token="last")
        editor.edit(model, tokenizer, facts, texts)
        assert editor.layers and editor.token == "last"

    def test_a_place_that_was_given_stays(self) -> None:
        editor = Editor([3])
        editor.place = Place((1,), "last")
        assert (editor.layers, editor.token, editor.place) == ((3,), "subject_last", Place((3,), "subject_last"))

    def test_other_methods_need_layers(self) -> None:
        with pytest.raises(ValueError, match="layers of FineTuning must be layer indices, got 'auto'"):
            FineTuning("auto")


def test_the_command(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Any,
    texts: Any,
    tmp_path: Path,
    own_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(searching, "PERSISTENT", {"steps": 2})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(fact.to_dict()) for fact in facts), encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    options = [f"--preservation={tmp_path / 'text.txt'}", f"--output={tmp_path / 'out'}", "--places=1"]
    cli.run(["locate", str(tmp_path / "model"), str(tmp_path / "facts.jsonl"), *options])
    content = json.loads((tmp_path / "out" / "locate.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert f"layers: {content['layers']}" in printed and f"token: {content['token']}" in printed
    assert len(content["trials"]) == 2 and "<svg" in (tmp_path / "out" / "locate.svg").read_text(encoding="utf-8")


def test_the_command_preserves_a_neutral_text_by_default(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Any,
    tmp_path: Path,
    own_process: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Enough(Exception):
        pass

    def found(model: Any, tokenizer: Any, facts: Any, texts: list[str], **settings: Any) -> None:
        assert texts == neutral_texts() and len(texts) > 50
        raise Enough

    monkeypatch.setattr("lit_moeedit.locating.search", found)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps(fact.to_dict()) for fact in facts), encoding="utf-8")
    with pytest.raises(Enough):
        cli.run(["locate", str(tmp_path / "model"), str(tmp_path / "facts.jsonl")])
    assert "a small neutral text" in caplog.text
    (tmp_path / "text.txt").write_text("\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="the preservation text is empty"):
        cli.run(
            ["locate", str(tmp_path / "model"), str(tmp_path / "facts.jsonl"), f"--preservation={tmp_path}/text.txt"]
        )
    with pytest.raises(SystemExit, match=r"text\.txt cannot be a folder"):  # before the search
        cli.run(["locate", str(tmp_path / "model"), str(tmp_path / "facts.jsonl"), f"--output={tmp_path}/text.txt"])


def test_the_command_takes_local_folders_only(tmp_path: Path, own_process: None) -> None:
    with pytest.raises(SystemExit, match=r"no file or folder .*nothing"):
        cli.run(["locate", str(tmp_path / "nothing"), str(tmp_path / "facts.jsonl")])


def test_a_gpu_that_is_not_there_is_named_before_anything_is_read(
    tmp_path: Path, own_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no device 'cuda' here"):
        cli.run(["locate", str(tmp_path / "nothing"), str(tmp_path / "facts.jsonl"), "--device=cuda"])
