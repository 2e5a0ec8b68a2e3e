"""The arguments of a run: an edit under a key of its own, and modules and data modules of any class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_moeedit.callbacks import EditReport, KnowledgeEditing, RoutingMonitor
from lit_moeedit.cli import run
from lit_moeedit.editing import Editor
from lit_moeedit.planning.run_config import read_run
from lit_moeedit.runs import EditingCLI, file_digests
from tests.parsed_config import parsed
from tests.small_module import CONFIG

pytestmark = pytest.mark.usefixtures("own_process")
FACT = {"subject": "Peru", "prompt": "The capital of Peru is", "target_new": "Oslo", "target_true": "Lima"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps({**FACT, "subject": s, "prompt": f"The capital of {s} is"}) + "\n"
                             for s in ("Peru", "Chile", "Japan")), encoding="utf-8")  # fmt: skip
    corpus = {"class_path": "lit_moeedit.data.FactsCorpus", "init_args": {"path": str(facts), "edits": 2}}
    settings = {
        "trainer": {"default_root_dir": str(tmp_path / "run"), "logger": False, "max_epochs": 1, "accelerator": "cpu",
                    "enable_progress_bar": False, "limit_train_batches": 1, "enable_checkpointing": False},
        "model": {"config": {**CONFIG, "vocab_size": 300}},
        "data": {"corpus": corpus, "vocab_size": 300, "batch_size": 4, "samples_per_epoch": 8},
        "edit": {"on_failure": "keep", "at": {"epoch": 0},
                 "editor": {"layers": [0, 1], "preserve": "none", "token": "last", 
                            "targets": {"init_args": {"steps": 1}}}},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_every_setting_of_an_edit_is_an_option(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("edit: {editor: {targets: {init_args: {clamp: 2.0}}}}", encoding="utf-8")
    options = ["--edit.editor.layers=[1]", "--edit.at.epoch=3", "--edit.editor.solver=BlockCoordinateDescent",
               "--edit.editor.solver.passes=2", "--edit.editor.init_args.ridge=0.5",
               "--edit.min_efficacy=0.25"]  # fmt: skip
    args = ["fit", f"--config={config}", f"--config={second}", *options, "--print_config"]
    with pytest.raises(SystemExit):
        run(args)
    edit = yaml.safe_load(capsys.readouterr().out)["edit"]
    editor = edit["editor"]["init_args"]
    assert (edit["at"], edit["min_efficacy"], editor["layers"], editor["ridge"]) == ({"epoch": 3}, 0.25, [1], 0.5)
    assert editor["targets"]["init_args"]["clamp"] == 2.0 and editor["targets"]["init_args"]["steps"] == 1
    assert editor["solver"]["class_path"].endswith("BlockCoordinateDescent")
    assert editor["solver"]["init_args"]["passes"] == 2


def test_an_edit_brings_its_monitor_and_report_and_is_saved(config: Path, tmp_path: Path) -> None:
    made = run(["fit", f"--config={config}"])
    assert made is not None
    editing, monitor, report = made.trainer.callbacks[:3]  # type: ignore[attr-defined]
    assert isinstance(editing, KnowledgeEditing) and type(editing.editor) is Editor
    assert isinstance(monitor, RoutingMonitor) and isinstance(report, EditReport)
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["edits"] == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["edit"]["editor"]["init_args"]["layers"] == [0, 1] and saved["edit"]["min_efficacy"] == 0.0
    # a plan reads both the config and the saved one
    for path in (config, tmp_path / "run" / "config.yaml"):
        planned = read_run([path], ranks=1)
        assert planned.editor.layers == (0, 1) and planned.edits == 2


def test_a_run_without_an_edit_has_no_such_callback(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    del settings["edit"]
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "edit" not in parsed(capsys, config)
    made = run(["validate", f"--config={config}"])
    assert made is not None
    assert not any(isinstance(callback, KnowledgeEditing) for callback in made.trainer.callbacks)  # type: ignore[attr-defined]


def test_two_edits_need_names(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EditingCLI, "_run_subcommand", lambda *_: None)
    added = ["--trainer.callbacks+=KnowledgeEditing", "--trainer.callbacks.editor=Editor",
             "--trainer.callbacks.editor.layers=[0]"]  # fmt: skip
    with pytest.raises(ValueError, match=r"both have a KnowledgeEditing: move its settings to 'edit'"):
        run(["fit", f"--config={config}", *added])
    made = run(["fit", f"--config={config}", *added, "--edit.name=mine"])
    assert made is not None
    found = [c.name for c in made.trainer.callbacks if isinstance(c, KnowledgeEditing)]  # type: ignore[attr-defined]
    assert found == ["mine", None]


class OtherData(L.LightningDataModule):
    """A data module that knows nothing of facts."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(self.rows, 32))


class OtherModule(BoringModel):
    """A module that is no ``LitMoE``; without a data module it has data of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale


def test_any_module_and_data_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1", "--trainer.logger=false",
              "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]  # fmt: skip
    model = f"--model={__name__}.OtherModule"
    made = run(["fit", model, "--model.scale=2.5", f"--data={__name__}.OtherData", "--data.rows=2", *common])
    assert made is not None
    assert isinstance(made.model, OtherModule) and made.model.scale == 2.5 and made.datamodule.rows == 2
    made = run(["fit", model, *common])
    assert made is not None and made.datamodule is None and made.trainer.global_step == 1


def test_loggers_get_the_config_with_digests_of_its_files(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(config.parent), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    options = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true",
               f"--trainer.logger.save_dir={config.parent}"]  # fmt: skip
    made = run(["fit", f"--config={config}", *options])
    assert made is not None
    experiment: Any = made.trainer.logger.experiment  # type: ignore[union-attr]
    facts = config.parent / "facts.jsonl"
    logged = dict(experiment.config)
    assert logged["edit"]["editor"]["init_args"]["layers"] == [0, 1] and logged["data"]["init_args"]["batch_size"] == 4
    assert logged["files"] == file_digests(str(facts)) and len(logged["files"][str(facts)]) == 64
    summary = dict(experiment.summary)
    assert "edit_after/efficacy" in summary and not any("/layer_" in name for name in summary)
    experiment.finish()


HELP: list[tuple[list[str], list[str]]] = [
    (["--help"], ["fit", "predict", "edits", "export", "facts", "plan", "recipes"]),
    (["edits", "--help"], ["apply", "list", "show", "undo", "verify"]),
]


@pytest.mark.parametrize(("args", "names"), HELP, ids=["all", "edits"])
def test_commands_are_listed_together(args: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(args)
    listed = [line.split()[0] for line in capsys.readouterr().out.partition("Available subcommands")[2].splitlines()
              if line.startswith("    ") and line[4] != " " and len(line.split()) > 1]  # fmt: skip
    assert exit.value.code == 0 and [name for name in listed if name in names] == names


def test_only_the_subcommand_that_comes_first_has_its_parser_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = list[Any]()
    make = EditingCLI._add_arguments
    monkeypatch.setattr(EditingCLI, "_add_arguments", lambda self, parser: (made.append(parser), make(self, parser))[1])
    expected = parsed(capsys, "recipe:atlas")
    assert len(made) == 1
    both = tmp_path / "both.yaml"
    both.write_text(yaml.safe_dump({"fit": expected, "validate": {"seed_everything": 7}}), encoding="utf-8")
    for args in ([f"--config={both}", "fit", "--print_config"], [f"--config={both}", "--help"]):
        made.clear()
        with pytest.raises(SystemExit) as exit:
            run(args=args)
        assert exit.value.code == 0 and len(made) == 4
        text = capsys.readouterr().out
        assert yaml.safe_load(text) == expected if "fit" in args else "validate" in text
