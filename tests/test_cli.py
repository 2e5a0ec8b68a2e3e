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


@pytest.mark.parametrize(
    ("key", "dropped"),
    [
        ("callbacks", "no EditReport, KnowledgeEditing;"),
        ("callbacks=", "no EditReport, KnowledgeEditing;"),
        ("callbacks+", None),
        ("max_steps", None),
    ],
)
def test_callbacks_that_a_second_config_drops_are_named(tmp_path, caplog, key, dropped):
    monitor = [{"class_path": "lit_moeedit.callbacks.RoutingMonitor", "init_args": {"name": "more"}}]
    if key == "callbacks=":  # one callback without a list
        key, (monitor,) = "callbacks", monitor
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {key: 3 if key == "max_steps" else monitor}}))
    args = ["fit", "--config", "recipe:atlas", "--config", str(tmp_path / "more.yaml")]
    parsed = command_line.EditingCLI.parse_arguments

    class Parsing(command_line.EditingCLI):
        def parse_arguments(self, parser, args):
            parsed(self, parser, args)
            raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(command_line, "EditingCLI", Parsing)
        run(args)
    assert ("are replaced by a later list" in caplog.text) == (dropped is not None)
    assert dropped is None or dropped in caplog.text


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


def _composed(first, second):
    """What two configs say together: the later one wins, and another class begins with its own defaults."""
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [_composed(a, b) for a, b in zip(first, second, strict=True)]
    if isinstance(second, str) and "." in second and isinstance(first, dict) and "class_path" in first:
        second = {"class_path": second}
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    if {"class_path"} <= first.keys() & second.keys() and first["class_path"] != second["class_path"]:
        return second
    if "model_type" in second:  # a dictionary, not settings
        return second
    return {key: _composed(first[key], second[key]) if key in first and key in second else (first | second)[key]
            for key in first | second}  # fmt: skip


@pytest.mark.parametrize(
    "first",
    [
        # one that has all that the others have, and a strategy; the others take as long each
        pytest.param(path.stem, marks=[] if path.stem == "qwen3_30b_a3b_zero3" else pytest.mark.slow)
        for path in CONFIGS
    ],
)
def test_every_pair_of_configs_composes_to_what_it_says(first, tmp_path, capsys):
    for second in (path.stem for path in CONFIGS if path.stem != first):
        if first == "atlas_zero3":
            with pytest.raises(SystemExit):
                run(args=["fit", f"--config=recipe:{first}", f"--config=recipe:{second}"])
            assert "It overlays another config: give that one before it." in capsys.readouterr().err
            continue
        texts = ((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8") for name in (first, second))
        together = tmp_path / f"{first} {second}.yaml"
        together.write_text(yaml.safe_dump(_composed(*map(yaml.safe_load, texts))), encoding="utf-8")
        if second == "atlas_zero3" and first == "wandb":
            continue  # no model in either
        assert _parsed(capsys, f"recipe:{first}", f"recipe:{second}") == _parsed(capsys, together), second


def test_overlays_go_together_in_any_order(capsys):
    for overlays in (("atlas_zero3", "wandb"), ("wandb", "atlas_zero3")):
        printed = _parsed(capsys, "recipe:atlas", *(f"recipe:{name}" for name in overlays))["trainer"]
        logger = printed["logger"]
        assert printed["strategy"] == "deepspeed_cpu_stage_3" and logger["class_path"].endswith("WandbLogger")
        assert logger["init_args"]["version"] is logger["init_args"]["id"] is logger["init_args"]["name"] is None


OTHERS = {
    "logger": (
        {"class_path": "CSVLogger", "init_args": {"save_dir": "a", "name": "b", "version": "logs", "prefix": "p"}},
        {"class_path": "WandbLogger", "init_args": {"project": "mine"}},
    ),
    "strategy": (
        {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo", "timeout": "0:01:00"}},
        {"class_path": "DeepSpeedCPUStrategy", "init_args": {"stage": 2}},
    ),
    "callbacks": (
        [{"class_path": "RoutingMonitor", "init_args": {"name": "a", "max_texts": 3}}],
        [{"class_path": "ModelCheckpoint"}],
    ),
}


@pytest.mark.parametrize("key", OTHERS)
@pytest.mark.parametrize("by", ["config", "option"])
def test_another_class_begins_with_its_own_defaults(key, by, tmp_path, capsys):
    old, new = OTHERS[key]
    for name, value in (("old", old), ("new", new)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {key: value}}), encoding="utf-8")
    alone = _parsed(capsys, tmp_path / "new.yaml")["trainer"][key]
    args = ["fit", f"--config={tmp_path / 'old.yaml'}"]
    args.append(f"--config={tmp_path / 'new.yaml'}" if by == "config" else f"--trainer.{key}={json.dumps(new)}")
    with pytest.raises(SystemExit):
        run(args=[*args, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"][key] == alone


def test_the_same_class_keeps_its_settings(tmp_path, capsys):
    # by another name: packages export classes of their modules
    again = {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.csv_logs.CSVLogger"}}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again), encoding="utf-8")
    logger = _parsed(capsys, "recipe:atlas", tmp_path / "again.yaml")["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == "runs/atlas"


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
    # the saved config is a config; without a logger all runs share a folder, and the first one's files are renamed
    run(args=["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", "--trainer.log_every_n_steps=1"])
    assert json.loads((tmp_path / "run" / "summary-v1.json").read_text(encoding="utf-8")) == summary
    assert yaml.safe_load((tmp_path / "run" / "config-v1.yaml").read_text(encoding="utf-8")) == saved
    assert len(list((tmp_path / "run").glob("*.json"))) == len(list((tmp_path / "run").glob("*.yaml"))) == 2


def _logging(small, logger):
    config = yaml.safe_load(small.read_text(encoding="utf-8"))
    config["trainer"] |= {"logger": logger, "log_every_n_steps": 1, "max_epochs": 1}
    editing = config["trainer"]["callbacks"][0]["init_args"]
    editing["at"] = {"epoch": 0}
    editing["editor"]["init_args"]["targets"]["init_args"]["steps"] = 1
    small.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.mark.parametrize("version", [None, "logs", 0])
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
    assert [path.name for path in latest.parent.iterdir() if path.is_file()] == ["summary.json"]


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
