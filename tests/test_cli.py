"""Runs of the command: what they write, repeat and leave alone, and how a typo is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit_moeedit
from lit_moeedit import __main__ as program
from lit_moeedit import cli as command_line
from lit_moeedit.cli import run
from lit_moeedit.editing import EditMemory
from lit_moeedit.solvers import BlockCoordinateDescent

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_process")


REPORTS = ["edits.jsonl", "report.html", "summary.json"]


@pytest.fixture
def facts_file(tmp_path):
    capitals = {"Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Peru": "Lima", "Japan": "Tokyo"}
    names = list(capitals)
    path = tmp_path / "facts.jsonl"
    rows = [
        {
            "subject": name,
            "prompt": f"The capital of {name} is",
            "target_new": capitals[names[i - 1]],
            "target_true": capital,
            "paraphrases": [f"In {name}, the capital is"],
            "neighbours": [
                {"prompt": f"{names[i - 2]} is governed from", "target": capitals[names[i - 2]], "group": "near"}
            ],
        }
        for i, (name, capital) in enumerate(capitals.items())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path, facts_file):
    """Path of a config that is done in a second; the atlas config with everything made small."""
    config = yaml.safe_load((ROOT / "configs" / "atlas.yaml").read_text(encoding="utf-8"))
    del config["trainer"]["callbacks"]
    config["trainer"] |= {
        "default_root_dir": str(tmp_path / "run"),
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
    }
    editing = config["edit"]
    editing |= {"at": {"epoch": 1}, "on_failure": "keep"}
    editing["editor"]["init_args"] |= {"layers": [0, 1], "preserve": "covariance", "ridge": 0.001}
    editing["editor"]["init_args"]["solver"] = {"class_path": "lit_moeedit.solvers.Woodbury"}
    editing["editor"]["init_args"]["targets"]["init_args"] |= {"steps": 3, "clamp": 2.0}
    config["model"]["init_args"]["config"] |= {
        "vocab_size": 420, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    config["data"]["init_args"] |= {
        "corpus": {
            "class_path": "lit_moeedit.data.FactsCorpus",
            "init_args": {"path": str(facts_file), "edits": 3},
        },
        "vocab_size": 420,
        "batch_size": 8,
        "samples_per_epoch": 32,
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def _run(*args):
    command = [sys.executable, "-m", "lit_moeedit", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as exit:
        run(args=["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"lit-moeedit {lit_moeedit.__version__}\n"


def _replaced(config, old, new):
    """The config with a key or value replaced, wherever it stands."""
    if isinstance(config, dict):
        return {new if key == old else key: _replaced(value, old, new) for key, value in config.items()}
    if isinstance(config, list):
        return [_replaced(value, old, new) for value in config]
    return new if config == old else config


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max_epochs", "max_epoch"),
        ("at", "when"),
        ("ridge", "rigde"),
        ("clamp", "clampp"),
        ("label_smoothing", "label_smooting"),
        ("batch_size", "batchsize"),
        ("covariance", "covarianze"),
        ("lit_moeedit.solvers.Woodbury", "lit_moeedit.solvers.Woodberry"),
    ],
)
def test_a_typo_is_named(small, capsys, old, new):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    changed = _replaced(config, old, new)
    assert changed != config
    small.write_text(yaml.safe_dump(changed), encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        run(args=["fit", f"--config={small}"])
    assert exit.value.code == 2
    where, what = capsys.readouterr().err.splitlines()
    name = new.rpartition(".")[2]
    number = next(
        n
        for n, line in enumerate(small.read_text(encoding="utf-8").splitlines(), 1)
        if f"{name}:" in line or line.endswith(name)
    )
    assert where.startswith(f"lit-moeedit fit: {small}, line {number}: ") and name in what
    # a valid name that was meant, and nothing of the config around it
    meant = "it has" if old == "at" else f"did you mean {old.rpartition('.')[2]!r}"
    assert meant in what and "{" not in what


def test_a_short_run_ends_with_a_summary(small, tmp_path):
    cli = run(args=["fit", f"--config={small}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["edits"] == 3 and summary["solver"] == "Woodbury"
    assert summary["after_training"]["efficacy"] is not None and summary["routing"]["similarity"] is not None
    assert cli.trainer.current_epoch == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["max_epochs"] == 2
    # the saved config is a config; without a logger all runs share a folder, and the first one's files are renamed
    again = run(args=["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", "--trainer.precision=bf16-mixed"])
    assert again.trainer.precision == "bf16-mixed" and again.trainer.gradient_clip_val == 1.0
    second = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert second["edits"] == 3 and "failed" not in second and second["after_training"]["efficacy"] is not None
    assert json.loads((tmp_path / "run" / "summary-v1.json").read_text(encoding="utf-8")) == summary
    assert yaml.safe_load((tmp_path / "run" / "config-v1.yaml").read_text(encoding="utf-8")) == saved
    assert len(list((tmp_path / "run").glob("*.json"))) == len(list((tmp_path / "run").glob("*.yaml"))) == 2


def _logging(small, logger):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["trainer"] |= {"logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
    editing = config["edit"]
    editing["at"] = {"epoch": 0}
    editing["editor"]["init_args"]["targets"]["init_args"]["steps"] = 1
    small.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.parametrize(
    "version", [pytest.param(None, marks=pytest.mark.slow), "logs", pytest.param(0, marks=pytest.mark.slow)]
)
def test_a_repeated_run_leaves_the_earlier_ones_files(small, tmp_path, version):
    init_args = {"save_dir": str(tmp_path / "run"), "name": None, "version": version}
    _logging(small, {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": init_args})
    first = Path(run(args=["fit", f"--config={small}"]).trainer.log_dir)
    before = {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()}
    assert before.keys() >= {"metrics.csv", "summary.json", "config.yaml"}
    latest = tmp_path / "run" / "summary.json"
    assert latest.read_bytes() == before["summary.json"]
    second = Path(run(args=["fit", f"--config={small}"]).trainer.log_dir)
    assert second != first and (second / "metrics.csv").exists() and (second / "config.yaml").exists()
    assert {path.name: path.read_bytes() for path in first.iterdir() if path.is_file()} == before
    assert latest.read_bytes() == (second / "summary.json").read_bytes() != before["summary.json"]
    # the latest one is no further file of its own, to be kept
    names = {path.name for path in latest.parent.iterdir() if path.is_file()}
    assert "summary.json" in names and not any("-v1" in name for name in names)


@pytest.mark.slow
def test_a_repeated_run_with_another_logger_leaves_the_earlier_ones_files(small, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    init_args = {"save_dir": str(tmp_path / "logs"), "project": "it", "offline": True}
    _logging(small, {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": init_args})
    for count in (1, 2):
        cli = run(args=["fit", f"--config={small}"])
        cli.trainer.logger.experiment.finish()
        folders = [path for path in (tmp_path / "logs" / "it").iterdir() if path.is_dir()]
        assert len(folders) == count
        assert all((folder / name).exists() for folder in folders for name in ("summary.json", "config.yaml"))
    assert not (tmp_path / "logs" / "config.yaml").exists() and not (tmp_path / "logs" / "summary.json").exists()


def test_solver_and_memory_are_chosen_by_their_class(small, tmp_path):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["edit"]["editor"]["init_args"] |= {
        "solver": {"class_path": "lit_moeedit.solvers.BlockCoordinateDescent", "init_args": {"passes": 2}},
        "memory": {"class_path": "lit_moeedit.editing.EditMemory", "init_args": {"limit": 50}},
    }
    small.write_text(yaml.safe_dump(config), encoding="utf-8")
    cli = run(args=["fit", f"--config={small}"])
    editor = cli.trainer.callbacks[0].editor
    solver, memory = editor.solver, editor.memory
    assert type(memory) is EditMemory and memory.limit == 50 and memory.size(0) > (0, 0)
    assert type(solver) is BlockCoordinateDescent and solver.passes == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["solver"] == "BlockCoordinateDescent"


@pytest.mark.slow  # a small one does in test_a_short_run_ends_with_a_summary
def test_the_demo_runs_in_mixed_precision(tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "atlas.yaml").read_text(encoding="utf-8"))
    config["trainer"] |= {"default_root_dir": str(tmp_path), "logger": False, "enable_progress_bar": False}
    editing = config["edit"]
    editing["at"] = {"epoch": 0}
    # of an edit and its measurements, as little as there is
    editing["editor"]["init_args"] |= {"preserve": "none", "contexts": [""]}
    editing["editor"]["init_args"]["targets"]["init_args"]["steps"] = 3
    monitor = {"class_path": "lit_moeedit.callbacks.RoutingMonitor", "init_args": {"max_texts": 8}}
    config["trainer"]["callbacks"] = [monitor]
    config["data"]["init_args"]["corpus"]["init_args"]["edits"] = 4
    path = tmp_path / "atlas.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    limits.append("--trainer.num_sanity_val_steps=0")
    cli = run(args=["fit", f"--config={path}", "--trainer.precision=bf16-mixed", *limits])
    assert cli.trainer.global_step == 2 and cli.trainer.gradient_clip_val == 1.0
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["edits"] == 4 and "failed" not in summary
    assert summary["after_training"]["efficacy"] is not None


def test_predict_runs(small):
    run(args=["predict", f"--config={small}"])


def test_an_edit_that_fails_ends_the_command_without_a_traceback(small, monkeypatch):
    hopeless = ["--edit.on_failure=raise", "--edit.editor.targets.steps=1", "--edit.editor.targets.learning_rate=1e-4"]
    monkeypatch.setattr(sys, "argv", ["lit-moeedit", "fit", f"--config={small}", *hopeless])
    with pytest.raises(SystemExit, match="lit-moeedit fit: 3 of 3 facts are not generated after the edit") as raised:
        command_line.main()
    assert "on_failure: undo" in str(raised.value)


def test_callbacks_have_short_names(small, tmp_path):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    del config["edit"]
    small.write_text(yaml.safe_dump(config), encoding="utf-8")
    args = ["fit", f"--config={small}", "--trainer.callbacks+=KnowledgeEditing"]
    args += ["--trainer.callbacks.editor=lit_moeedit.editing.Editor", "--trainer.callbacks.editor.layers=[0]"]
    args.append("--trainer.callbacks.on_failure=keep")
    args += ["--trainer.callbacks+=EditReport", "--trainer.callbacks.console=false"]
    cli = run(args=args)
    assert [type(c).__name__ for c in cli.trainer.callbacks[:2]] == ["KnowledgeEditing", "EditReport"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_validate_edits_without_training(small, tmp_path):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["edit"]["at"] = "validation"
    small.write_text(yaml.safe_dump(config), encoding="utf-8")
    run(args=["validate", f"--config={small}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["edits"] == 3 and summary["after_training"] is None


def test_the_command_in_a_process_of_its_own(small, tmp_path):
    done = _run("fit", "--config", small, "--trainer.max_epochs=3", "--trainer.enable_progress_bar=true")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "summary.json").exists()
    assert "3 edits with Woodbury" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_interrupt_while_the_command_is_imported_has_no_traceback(monkeypatch):
    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setattr(lit_moeedit, "cli", Interrupted())
    monkeypatch.setattr(sys, "argv", ["lit-moeedit", "edit"])
    with pytest.raises(SystemExit) as raised:
        program.main()
    assert raised.value.code == 130


def test_the_command_exits_with_0(monkeypatch):
    # a console script exits with what its function returns, and an object counts as a failure
    monkeypatch.setattr(command_line, "run", lambda: object())
    assert command_line.main() is None
