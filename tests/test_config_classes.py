"""Classes in several configs: what of an earlier one stays, is dropped or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lit_moeedit import cli as command_line
from lit_moeedit.cli import run
from tests.parsed_config import parsed

ROOT = Path(__file__).parents[1]

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
    names = ("KnowledgeEditing", "EditReport")
    own = [{"class_path": f"lit_moeedit.callbacks.{name}"} for name in names]
    own[0] |= {"init_args": {"editor": {"class_path": "Editor", "init_args": {"layers": [1]}}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"edit": None, "trainer": {"callbacks": own}}))
    base = yaml.safe_load((ROOT / "configs" / "atlas.yaml").read_text(encoding="utf-8"))
    del base["trainer"]["callbacks"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    configs = (str(tmp_path / name) for name in ("base.yaml", "own.yaml", "more.yaml"))
    args = ["fit", *(f"--config={config}" for config in configs)]
    parse = command_line.EditingCLI.parse_arguments

    class Parsing(command_line.EditingCLI):
        def parse_arguments(self, parser, args):
            parse(self, parser, args)
            raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(command_line, "EditingCLI", Parsing)
        run(args)
    assert ("are replaced by a later list" in caplog.text) == (dropped is not None)
    assert dropped is None or dropped in caplog.text


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
    alone = parsed(capsys, tmp_path / "new.yaml")["trainer"][key]
    args = ["fit", f"--config={tmp_path / 'old.yaml'}"]
    args.append(f"--config={tmp_path / 'new.yaml'}" if by == "config" else f"--trainer.{key}={json.dumps(new)}")
    with pytest.raises(SystemExit):
        run(args=[*args, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"][key] == alone


def test_the_same_class_keeps_its_settings(tmp_path, capsys):
    # by another name: packages export classes of their modules
    again = {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.csv_logs.CSVLogger"}}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again), encoding="utf-8")
    logger = parsed(capsys, "recipe:atlas", tmp_path / "again.yaml")["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == "runs/atlas"


def test_two_callbacks_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = {"class_path": "lit_moeedit.callbacks.RoutingMonitor", "init_args": {"name": "a"}}
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [twice, twice]}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"more than one stateful callback .* give each a 'name' of its own"):
        run(["fit", "--config", "recipe:atlas", "--config", str(tmp_path / "twice.yaml")])
