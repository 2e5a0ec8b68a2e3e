"""Mistakes in configs and options, each told in a few lines: file and line, key, reason, and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_moeedit.cli import run
from lit_moeedit.module import LitMoE
from lit_moeedit.pretrained import check_path

pytestmark = pytest.mark.usefixtures("own_process")

CONFIG = """\
trainer:
  max_epochs: 6
model:
  label_smoothing: 0.1
data:
  corpus:
    class_path: lit_moeedit.data.Atlas
    init_args:
      edits: 4
edit:
  at: fit_start
  editor:
    layers: [0]
    token: last
    solver:
      class_path: lit_moeedit.solvers.Woodbury
    targets:
      init_args:
        steps: 3
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "reason"),
    [
        ("max_epochs", "max_epoks", 2, "trainer.max_epoks", "did you mean 'max_epochs'?"),
        ("max_epochs: 6", "max_epochs: six", 2, "trainer.max_epochs", "expected int or null, got 'six'"),
        ("\nmodel:", "\nmodell:", 3, "modell", "did you mean 'model'?"),
        ("label_smoothing", "label_smooting", 4, "model.label_smooting", "LitMoE has no setting"),
        ("edits: 4", "edis: 4", 9, "data.corpus.edis", "did you mean 'edits'?"),
        ("  at:", "  att:", 11, "edit.att", "edit has no setting 'att' (did you mean 'at'?)"),
        ("token: last", "token: lst", 14, "edit.editor.token", "did you mean 'last'?"),
        ("Woodbury", "Woodberry", 16, "edit.editor.solver", "no class 'Woodberry' (did you mean 'Woodbury'?)"),
        ("lit_moeedit.solvers", "lit_moedit.solvers", 16, "edit.editor.solver", "did you mean 'lit_moeedit'?"),
        ("steps: 3", "stepps: 3", 19, "edit.editor.targets.stepps", "did you mean 'steps'?"),
        ("steps: 3", "steps: many", 19, "edit.editor.targets.steps", "expected int, got 'many'"),
        ("[0]", "[0", 14, "", "this is not YAML"),
    ],
)
def test_a_mistake_in_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, key: str, reason: str
) -> None:
    assert old in CONFIG and yaml.safe_load(CONFIG)
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.replace(old, new), encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        run(["fit", f"--config={path}"])
    where, what = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and where == f"lit-moeedit fit: {path}, line {line}{f': {key}' if key else ''}"
    assert reason in what


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["fti"], "there is no 'fti' (did you mean 'fit'?)"),
        ([], "a command is missing; there are fit, validate,"),
        (["edits", "aply"], "lit-moeedit edits: there is no 'aply' (did you mean 'apply'?)"),
        (["fit", "--edit.editor.layrs=[1]"], "--edit.editor.layrs\n  Editor has no setting 'layrs' (did you mean"),
        (
            ["fit", "--edit.editor=Editer"],
            "--edit.editor\n  'Editer' is no class that this setting takes",
        ),
        (["fit", "--trainer.max_epoks=3"], "--trainer.max_epoks\n  trainer has no setting 'max_epoks' (did you mean"),
        (["fit", "--config=nowhere.yaml"], "--config\n  there is no file "),
        (["fit"], "lit-moeedit fit: model is missing"),
        (
            ["export"],
            "lit-moeedit export: checkpoint, output are missing\n  usage: lit-moeedit export CHECKPOINT OUTPUT",
        ),
        (
            ["edit"],
            "lit-moeedit edit: model, facts, output are missing\n  usage: lit-moeedit edit MODEL FACTS OUTPUT [",
        ),
        (
            ["edits", "undo", "x"],
            "names, output are missing\n  usage: lit-moeedit edits undo MODEL NAMES --output OUTPUT [",
        ),
        (
            ["edit", "a", "b", "c", "--layer", "auto"],
            "there is no option --layer (did you mean '--layers'?)\n  usage: ",
        ),
        (
            ["fit", "--model.class_path=torch.nn.Linear"],
            "--model.class_path\n  torch.nn.Linear is no LightningModule: ",
        ),
    ],
)
def test_a_mistake_in_an_option(capsys: pytest.CaptureFixture[str], args: list[str], told: str) -> None:
    with pytest.raises(SystemExit) as exit:
        run(args)
    text = capsys.readouterr().err
    assert exit.value.code == 2 and told in text and len(text.splitlines()) <= 2


def test_a_wrong_value_of_a_command_comes_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["edit", "a", "b", "c", "--layers=three"])
    where, what, about = capsys.readouterr().err.splitlines()
    assert where == "lit-moeedit edit: --layers" and what == "  expected 'auto' or a list, got 'three'"
    assert about.startswith("  layers: layers to edit, for example [3,4,5]")


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "reason"),
    [
        ("token: last", "ridge: -1", 14, "edit.editor.ridge", "ridge must be at least 0 and finite, got -1.0"),
        ("steps: 3", "steps: 0", 19, "edit.editor.targets.steps", "steps must be at least 1, got 0"),
        ("at: fit_start", "min_efficacy: 3", 11, "edit.min_efficacy", "min_efficacy is a fraction in [0, 1], got 3.0"),
        ("  corpus:", "  batch_size: 0\n  corpus:", 6, "data.batch_size", "batch_size must be at least 1, got 0"),
        (
            "at: fit_start",
            "facts: fcats.jsonl",
            11,
            "edit.facts",
            "no facts file fcats.jsonl (did you mean 'facts.jsonl'",
        ),
        (
            "at: fit_start",
            "facts: facts.jsonl",
            11,
            "edit.facts",
            "has no 'prompt', but 'promt' (did you mean 'prompt'?)",
        ),
        ("at: fit_start", "preservation: txt", 11, "edit.preservation", "there is no preservation text txt"),
    ],
)
def test_a_value_that_a_class_or_file_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    line: int,
    key: str,
    reason: str,
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr(LitMoE, "configure_model", never)
    monkeypatch.chdir(tmp_path)
    Path("facts.jsonl").write_text('{"subject": "Rome", "promt": "Rome lies in", "target_new": "Spain"}\n')
    text = CONFIG.replace("label_smoothing: 0.1", "{label_smoothing: 0.1, pretrained: here}").replace(old, new)
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("model:\n  {", "model: {"), encoding="utf-8")
    command = "validate" if key == "edit.preservation" else "fit"
    with pytest.raises((OSError, ValueError)) as raised:
        run([command, f"--config={path}"])
    where, what = str(raised.value).splitlines()
    assert where.endswith(f"mine.yaml, line {line - (line > 4)}: {key}") and reason in what, raised.value


def test_an_option_that_a_class_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG + "        clamp: 1.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^--edit.editor.targets.steps\n  steps must be at least 1, got 0$"):
        run(["fit", f"--config={path}", "--model.pretrained=here", "--edit.editor.targets.steps=0"])


def test_a_mistyped_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path, meant in (("./runz/base", "runs"), ("runs/bas", "runs/base"), ("runz/base/last", "runs")):
        with pytest.raises(FileNotFoundError, match=f"there is no file or folder {path} .did you mean '{meant}'"):
            check_path(path)
    check_path("Qwen/Qwen3-30B-A3B")
    check_path("gpt2")
    check_path("runs/base")
