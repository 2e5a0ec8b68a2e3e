"""A folder and some facts: edited, copied, reported; or nothing is changed."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.facts import Fact, FactsError, Probe
from lit_moeedit.editing import PHASES, Editor, TargetOptimizer, evaluate
from lit_moeedit.editing.phases import Meter
from lit_moeedit.edits import SavedEdits, apply, read_edits, undo, verify
from lit_moeedit.edits.commands import undo_edits
from lit_moeedit.edits.folders import load_model, save_model
from lit_moeedit.edits.stored import StoredModel
from lit_moeedit.reports import read_rows
from lit_moeedit.reports.outcomes import outcome_of
from lit_moeedit.standalone import TooFewFactsError, attempts, edit
from tests.edits.making import equal, make

WEAK = Editor([0], targets=TargetOptimizer(steps=1, learning_rate=1e-4), token="last")


def test_a_folder_is_edited(
    base: Path,
    facts_file: Path,
    easy: Sequence[Fact],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    editor: Editor,
    tmp_path: Path,
) -> None:
    report = edit(base, facts_file, tmp_path / "out", editor=editor, preservation=texts, name="two")
    assert [row.measured["after"].holds for row in report.rows] == [True] * 2
    assert not any(row.measured["before"].holds or row.reason for row in report.rows)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(evaluate(plain, tokenizer, easy).edits_exact.all())
    edits = read_edits(tmp_path / "out")
    assert [own.name for own in edits] == ["two"]
    assert {presence.status for presence in verify(plain, edits)} == {"applied"}
    undo(plain, edits, ["two"], base=base)
    assert equal(plain, load_model(base))
    rows = read_rows(tmp_path / "out" / "edits.jsonl")
    assert [(row.prompt, row.measured["after"].holds) for row in rows] == [(fact.prompt, True) for fact in easy]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in base.iterdir()} | {"README.md", "edits", "edits.jsonl", "report.html"}
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_question_is_reported_as_it_was_given(
    base: Path,
    easy: Sequence[Fact],
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    editor: Editor,
    tmp_path: Path,
) -> None:
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    own.chat_template = "{% for m in messages %}{{ 'The ' + m['content'] + ' ' }}{% endfor %}"
    own.save_pretrained(base)
    (base / "README.md").write_text("# Base\n", encoding="utf-8")
    out = tmp_path / "out"
    report = edit(base, easy, out, editor=editor, preservation=texts, chat=True, min_efficacy=0, name="asked")
    questions = [(fact.prompt, True) for fact in easy]
    assert [(row.prompt, row.chat) for row in report.rows] == questions
    assert [(row.prompt, row.chat) for row in read_rows(out / "edits.jsonl")] == questions
    (made,) = read_edits(out)
    assert [fact.prompt for fact in made.facts] == [f"The {fact.prompt} The" for fact in easy]
    for file in ("README.md", "report.html"):
        text = (out / file).read_text(encoding="utf-8")
        assert "The " + easy[0].prompt not in text and easy[0].prompt in text and "chat template" in text
    undo_edits(out, ["asked"], output=tmp_path / "none", base=base)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "none").iterdir()} == names
    assert (tmp_path / "none" / "README.md").read_text(encoding="utf-8") == "# Base\n"


def test_a_second_edit_is_made_on_the_first(
    base: Path, easy: Sequence[Fact], texts: Sequence[str], editor: Editor, tmp_path: Path
) -> None:
    edit(base, easy[:1], tmp_path / "one", editor=editor, preservation=texts)
    edit(tmp_path / "one", easy[1:], tmp_path / "two", editor=editor, preservation=texts)
    first, second = read_edits(tmp_path / "two")
    assert (first.name, second.name, second.order) == ("edit-0001", "edit-0002", 2)
    assert second.made_on == {first.id: first.name}
    assert {presence.status for presence in verify(load_model(tmp_path / "two"), [first, second])} == {"applied"}


def test_an_edit_of_a_model_with_siblings_is_made_on_both(
    base: Path, easy: Sequence[Fact], texts: Sequence[str], editor: Editor, tmp_path: Path
) -> None:
    for number, name in enumerate("ab"):
        edit(base, easy[number : number + 1], tmp_path / name, editor=editor, preservation=texts, name=name)
    stored = StoredModel(base)
    both = load_model(stored)
    siblings = [own for name in "ab" for own in read_edits(tmp_path / name)]
    placed = apply(both, siblings, allow_siblings=True)
    (tmp_path / "both").mkdir()
    save_model(stored, both, siblings[0].changes, placed, tmp_path / "both")
    edit(tmp_path / "both", easy, tmp_path / "out", editor=editor, preservation=texts, min_efficacy=0)
    edits = read_edits(tmp_path / "out")
    assert [own.name for own in edits] == ["a", "b", "edit-0003"]
    model = load_model(tmp_path / "out")
    assert {presence.status for presence in verify(model, edits)} == {"applied"}
    undo(model, edits, ["edit-0003"], base=base)
    assert equal(model, both)


def test_a_name_is_checked_before_the_work(
    base: Path, easy: Sequence[Fact], texts: Sequence[str], editor: Editor, tmp_path: Path
) -> None:
    (base / "edits").mkdir()  # an empty one is none
    edit(base, easy[:1], tmp_path / "one", editor=editor, preservation=texts, name="a")
    for name, message in {"a": "has an edit 'a' already", "x/y": "may have letters", "": "may have letters"}.items():
        with pytest.raises((FileExistsError, ValueError), match=message):
            edit(tmp_path / "one", easy[1:], tmp_path / "two", editor=WEAK, preservation=texts, name=name)
    assert not list(tmp_path.glob("two*"))


def test_too_few_facts(base: Path, facts_file: Path, texts: Sequence[str], tmp_path: Path) -> None:
    with pytest.raises(TooFewFactsError, match=r"nothing is changed(?s:.*)no target vector was found") as raised:
        edit(base, facts_file, tmp_path / "out", editor=WEAK, preservation=texts)
    rows = raised.value.report.rows
    assert not any(row.kept or row.measured["after"].holds for row in rows)
    assert all(row.reason for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "facts.jsonl"]


def test_the_costs_add_up_to_all_that_the_attempts_took(
    base: Path, easy: Sequence[Fact], texts: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals: list[float] = []

    class Noting(Meter):
        def seconds(self) -> dict[str, float]:
            found = super().seconds()
            totals.append(sum(found.values()))
            return found

    monkeypatch.setattr(attempts, "Meter", Noting)
    # the settings of the papers do not find target vectors in this model: the first attempt is undone
    monkeypatch.setattr(attempts, "PERSISTENT", {"steps": 6, "learning_rate": 0.5, "clamp": 2.0})
    report = edit(base, easy, tmp_path / "out", layers=[0], token="last", preservation=texts, min_efficacy=0)
    costs = {cost.phase: cost.seconds for cost in report.costs}
    assert list(costs) == ["evaluation", *PHASES, "undone attempts", "other"]
    assert sum(costs.values()) == pytest.approx(totals[0]) and all(seconds > 0 for seconds in costs.values())
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "in all" in page and "GPU memory" not in page  # which is measured on GPUs only


def test_a_dry_run_writes_nothing(
    base: Path, facts_file: Path, texts: Sequence[str], editor: Editor, tmp_path: Path
) -> None:
    report = edit(base, facts_file, editor=editor, preservation=texts, dry_run=True)
    assert all(outcome_of(row) == "holds" for row in report.rows)
    with pytest.raises(TooFewFactsError):
        edit(base, facts_file, tmp_path / "out", editor=WEAK, preservation=texts, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "facts.jsonl"]


def test_a_model_in_memory(
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    easy: Sequence[Fact],
    texts: Sequence[str],
    editor: Editor,
) -> None:
    before = {name: value.clone() for name, value in taught.state_dict().items()}
    with pytest.raises(TooFewFactsError):
        edit(taught, [fact.to_dict() for fact in easy], tokenizer=tokenizer, editor=WEAK, preservation=texts)
    assert all(torch.equal(value, before[name]) for name, value in taught.state_dict().items())
    report = edit(taught, [fact.to_dict() for fact in easy], tokenizer=tokenizer, editor=editor, preservation=texts)
    assert report.state == "finished"
    assert bool(evaluate(taught, tokenizer, easy).edits_exact.all())


def test_stronger_settings_where_the_first_do_not_suffice(
    taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, easy: Sequence[Fact], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lit_moeedit")
    report = edit(taught, easy, tokenizer=tokenizer, layers=[0, 1], token="last", min_efficacy=0.25)
    assert "optimised for longer" in caplog.text
    assert "a small neutral text" in caplog.text
    assert sum(row.measured["after"].holds for row in report.rows) >= 1
    assert report.settings["editor"]["targets"]["steps"] == 60


def test_further_measures_are_in_the_report(
    taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    easy: Sequence[Fact],
    texts: Sequence[str],
    editor: Editor,
) -> None:
    probed = [replace(fact, probes=(Probe("portability", fact.prompt, (fact.target_new,)),)) for fact in easy]
    names = ["generation", "portability", "weight_growth", "general_ability", "template_routing"]
    report = edit(taught, probed, tokenizer=tokenizer, editor=editor, preservation=texts, measure=names)
    before, after = report.metrics["before"], report.metrics["after"]
    assert before["portability"] == 0.0 and after["portability"] == after["efficacy_accuracy"] == 1.0
    assert after["generation_contained"] == 1.0 and after["weight_growth_max"] > 0
    assert {"copy_accuracy", "other_style_perplexity"} <= before.keys() & after.keys()
    assert 0 <= after["template_routing_similarity"] <= 1 and "template_routing_similarity" not in before
    assert report.intervals["after"]["portability"] == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"measure has 'flucency' \(did you mean 'fluency'"):
        edit(taught, probed, tokenizer=tokenizer, measure=["flucency"])


def test_a_killed_run_leaves_edit_and_report(
    base: Path, facts_file: Path, texts: Sequence[str], editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        monkeypatch.setattr(StoredModel, "copy", killed)
        try:
            edit(base, facts_file, tmp_path / "out", editor=editor, preservation=texts)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = tmp_path / "out.unfinished"
    assert not (tmp_path / "out").exists()
    assert all(row.measured["after"].holds for row in read_rows(left / "edits.jsonl"))
    assert (left / "report.html").stat().st_size > 1000
    assert [own.name for own in read_edits(left)] == ["edit-0001"]
    with pytest.raises(FileExistsError, match=r"was killed: lit-moeedit edits apply .*out\.unfinished/edits"):
        edit(base, facts_file, tmp_path / "out", editor=editor)
    edit(base, facts_file, tmp_path / "out", editor=editor, preservation=texts, overwrite=True)
    assert not left.exists()
    assert (tmp_path / "out" / "config.json").exists()


def test_a_disk_that_is_full_keeps_the_edit(
    base: Path,
    facts_file: Path,
    texts: Sequence[str],
    editor: Editor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoredModel, "copy", full)
    with pytest.raises(OSError, match="No space left"):
        edit(base, facts_file, tmp_path / "out", editor=editor, preservation=texts)
    assert "out.unfinished has the edit file and the report" in caplog.text
    assert read_edits(tmp_path / "out.unfinished")


def test_what_is_there_is_not_replaced(base: Path, facts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        edit(base, facts_file, tmp_path / "out")
    with pytest.raises(FileExistsError, match="it has no config"):
        edit(base, facts_file, tmp_path / "out", overwrite=True)
    for inside in (base, base / "edited"):
        with pytest.raises(ValueError, match="is in the folder of the model"):
            edit(base, facts_file, inside, overwrite=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    for given in ({"facts": tmp_path / "out" / "diary.txt"}, {"preservation": tmp_path / "out" / "diary.txt"}):
        with pytest.raises(FileExistsError, match=r"out is not replaced: .*diary\.txt, which is read, is in it"):
            edit(base, **{"facts": facts_file, **given}, output=tmp_path / "out", overwrite=True)  # type: ignore[arg-type]
    unfinished = tmp_path / "new.unfinished"
    unfinished.mkdir()
    (unfinished / "diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not what a run has left"):
        edit(base, facts_file, tmp_path / "new", overwrite=True)
    (unfinished / "edits").mkdir()
    with pytest.raises(FileExistsError, match=r"unfinished is not replaced: .*diary\.txt, which is read"):
        edit(base, unfinished / "diary.txt", tmp_path / "new", overwrite=True)
    unfinished = tmp_path / "other.unfinished"
    unfinished.write_text("mine")
    with pytest.raises(FileExistsError, match="is no folder"):
        edit(base, facts_file, tmp_path / "other", overwrite=True)


def test_wrong_arguments(
    base: Path, facts_file: Path, taught: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = make("one", taught)
    for message, arguments in {
        "needs an output folder": (base, facts_file),
        "output is for a model in a folder": (taught, facts_file, tmp_path / "out"),
        "needs its tokenizer": (taught, facts_file),
        "model is Linear; expected a local folder, or a model of transformers": (torch.nn.Linear(2, 2), facts_file),
    }.items():
        with pytest.raises(ValueError, match=message):
            edit(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_efficacy is a fraction"):
        edit(base, facts_file, tmp_path / "out", min_efficacy=50)
    with pytest.raises(ValueError, match="not both"):
        edit(base, facts_file, tmp_path / "out", editor=WEAK, layers=[0])
    with pytest.raises(ValueError, match="by lit-moeedit edits apply"):
        edit(base, facts_file, tmp_path / "out", editor=SavedEdits([made[0]]))
    with pytest.raises(ValueError, match="the preservation text is empty"):
        edit(taught, facts_file, tokenizer=tokenizer, preservation=[" "])
    with pytest.raises(ValueError, match="no chat template"):
        edit(taught, facts_file, tokenizer=tokenizer, chat=True)
    (tmp_path / "bad.jsonl").write_text(json.dumps({"subject": "Rome", "prompt": "It lies in", "target_new": "Spain"}))
    with pytest.raises(FactsError, match="subject"):
        edit(base, tmp_path / "bad.jsonl", tmp_path / "out")
    rows = {"subject": "Rome", "prompt": "Rome lies in", "target_new": tokenizer.unk_token or tokenizer.eos_token}
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows))
    with pytest.raises(FactsError, match=r"bad\.jsonl, row 1, field 'target_new'"):  # what the tokenizer refuses, too
        edit(base, tmp_path / "bad.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
