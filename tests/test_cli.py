from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lit_moeedit
from lit_moeedit import cli as command_line
from lit_moeedit.cli import run
from lit_moeedit.editing import EditMemory
from lit_moeedit.solvers import BlockCoordinateDescent

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = ("atlas_zero3", "wandb")
"""Recipes that are given after another one, the demo for instance."""


pytestmark = pytest.mark.usefixtures("own_process")


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
    config["trainer"] |= {
        "default_root_dir": str(tmp_path / "run"),
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
    }
    editing = config["trainer"]["callbacks"][0]["init_args"]
    editing["at"] = {"epoch": 1}
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


def _parsed(capsys, *configs):
    """The config that ``fit`` would run with."""
    with pytest.raises(SystemExit) as exit:
        run(args=["fit", *(f"--config={config}" for config in configs), "--print_config"])
    assert exit.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(path, capsys):
    base = ["recipe:atlas"] if path.stem in OVERLAYS else []
    printed = _parsed(capsys, *base, f"recipe:{path.stem}")
    assert {"trainer", "model", "data"} <= printed.keys()
    callbacks = printed["trainer"]["callbacks"] or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    assert any(callback["class_path"].endswith("KnowledgeEditing") for callback in callbacks)


def _leaves(config, path=()):
    """Every value that is no mapping, with the keys that lead to it."""
    if not isinstance(config, dict):
        return {path: config}
    return {place: value for key in config for place, value in _leaves(config[key], (*path, key)).items()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_what_it_says_and_nothing_else(name, capsys):
    overlay = _leaves(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")))
    base = _leaves(_parsed(capsys, "recipe:atlas"))
    both = _leaves(_parsed(capsys, "recipe:atlas", f"recipe:{name}"))
    assert overlay.items() <= both.items()
    logger = ("trainer", "logger")
    changed = {place for place in base.keys() | both.keys() if base.get(place) != both.get(place)} - overlay.keys()
    # another class has other settings
    assert all(place[:2] == logger for place in changed) if name == "wandb" else not changed


def test_overlays_go_together(capsys):
    printed = _parsed(capsys, "recipe:atlas", "recipe:atlas_zero3", "recipe:wandb")["trainer"]
    logger = printed["logger"]
    assert printed["strategy"] == "deepspeed_cpu_stage_3" and logger["class_path"].endswith("WandbLogger")
    # jsonargparse keeps settings that two classes share; W&B would take a version for the id of a run
    assert logger["init_args"]["version"] is logger["init_args"]["name"] is None


def test_an_overlay_alone_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        run(args=["fit", "--config=recipe:atlas_zero3"])
    assert capsys.readouterr().err.rstrip().endswith("It overlays another config: give that one before it.")


def test_recipes_are_listed_and_printed(capsys):
    run(args=["recipes"])
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(listed) == [path.stem for path in CONFIGS] and "atlas" in listed
    assert all(text.endswith(".") and len(text) <= 110 for text in listed.values())
    assert {name for name, text in listed.items() if text.startswith("Overlay: ")} == set(OVERLAYS)
    run(args=["recipes", "atlas"])
    assert capsys.readouterr().out == (ROOT / "configs" / "atlas.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_a_config_is_about_it(path):
    (line,) = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#   lit-moeedit ")]
    words = shlex.split(line.removeprefix("#   lit-moeedit "))
    assert words[0] in ("fit", "validate") and f"recipe:{path.stem}" in words


@pytest.mark.parametrize("name", ["atlsa", "../configs/atlas", "/etc/passwd", "atlas.yaml", "", "*"])
@pytest.mark.parametrize("args", [["fit", "--config"], ["plan", "--config"], ["recipes"]], ids=lambda args: args[0])
def test_only_recipes_are_recipes(name, args, capsys):
    with pytest.raises(SystemExit) as exit:
        run(args=[*args, f"recipe:{name}"])
    said = f"{exit.value.code} {capsys.readouterr().err}"
    assert f"there is no recipe {name!r}; there are atlas, atlas_zero3, " in said


def test_a_missing_file_is_named_with_its_option():
    with pytest.raises(FileNotFoundError) as caught:
        run(args=["fit", "--config", "recipe:counterfact"])
    option = "--data.init_args.corpus.init_args.path"
    assert str(caught.value) == f"No such file or directory: 'counterfact.json'; give the path of yours by {option}"


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
    usage, *lines = capsys.readouterr().err.splitlines()
    # the last line is the cause; the lines before it say where, and nothing prints the config around it
    assert new.rpartition(".")[2] in lines[-1] and len(lines) <= 12
    assert usage == "usage: lit-moeedit fit [--config CONFIG] [OPTIONS]" and "{" not in "".join(lines)


def test_a_short_run_ends_with_a_summary(small, tmp_path):
    cli = run(args=["fit", f"--config={small}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["edits"] == 3 and summary["solver"] == "Woodbury"
    assert summary["after_training"]["efficacy"] is not None and summary["routing"]["similarity"] is not None
    assert cli.trainer.current_epoch == 2
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert saved["trainer"]["max_epochs"] == 2
    # the saved config is a config, and a second run may write over the first
    run(args=["fit", f"--config={tmp_path / 'run' / 'config.yaml'}"])


def test_solver_and_memory_are_chosen_by_their_class(small, tmp_path):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["trainer"]["callbacks"][0]["init_args"]["editor"]["init_args"] |= {
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


def test_the_demo_runs_in_mixed_precision(tmp_path):
    config = yaml.safe_load((ROOT / "configs" / "atlas.yaml").read_text(encoding="utf-8"))
    config["trainer"] |= {"default_root_dir": str(tmp_path), "logger": False, "enable_progress_bar": False}
    editing = config["trainer"]["callbacks"][0]["init_args"]
    editing["at"] = {"epoch": 0}
    # of an edit and its measurements, as little as there is
    editing["editor"]["init_args"] |= {"preserve": "none", "contexts": [""]}
    editing["editor"]["init_args"]["targets"]["init_args"]["steps"] = 3
    config["trainer"]["callbacks"][1]["init_args"] = {"max_texts": 8}
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


def test_callbacks_have_short_names(small, tmp_path):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["trainer"]["callbacks"] = []
    small.write_text(yaml.safe_dump(config), encoding="utf-8")
    args = ["fit", f"--config={small}", "--trainer.callbacks+=KnowledgeEditing"]
    args += ["--trainer.callbacks.editor=lit_moeedit.editing.Editor", "--trainer.callbacks.editor.layers=[0]"]
    args += ["--trainer.callbacks+=EditReport", "--trainer.callbacks.console=false"]
    cli = run(args=args)
    assert [type(c).__name__ for c in cli.trainer.callbacks[:2]] == ["KnowledgeEditing", "EditReport"]
    assert (tmp_path / "run" / "summary.json").exists()


def test_validate_edits_without_training(small, tmp_path):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["trainer"]["callbacks"][0]["init_args"]["at"] = "validation"
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


def test_the_command_exits_with_0(monkeypatch):
    # a console script exits with what its function returns, and an object counts as a failure
    monkeypatch.setattr(command_line, "run", lambda: object())
    assert command_line.main() is None


def test_two_callbacks_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = {"class_path": "lit_moeedit.callbacks.RoutingMonitor", "init_args": {"name": "a"}}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [twice, twice]}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"more than one stateful callback .* give each a 'name' of its own"):
        run(["fit", "--config", str(ROOT / "configs" / "atlas.yaml"), "--config", str(tmp_path / "twice.yaml")])
