"""The configs that come with the package: all parse, compose, and are found by their names."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from lit_moeedit.cli import run
from tests.parsed_config import parsed

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = ("alphaedit", "memit", "moeedit_paper", "moeedit_released", "mote_paper")
"""Overlays that change the editor alone."""
FIRST = [path for path in CONFIGS if path.stem not in ("lora", *METHODS)]
"""Those that others may follow; lora is an overlay of configs with 'pretrained', methods of those with an edit."""
OVERLAYS = ("atlas_fsdp", "atlas_zero3", "lora", "qwen3_30b_a3b_ep", "qwen3_30b_a3b_fsdp", "wandb", *METHODS)
"""Recipes that are given after another one, the demo for instance."""

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(path, capsys):
    base = ["recipe:atlas"] if path.stem in OVERLAYS else []
    printed = parsed(capsys, *base, f"recipe:{path.stem}")
    assert {"trainer", "model", "data"} <= printed.keys()
    assert printed["edit"]["editor"]["init_args"]["layers"]


def _leaves(config, path=()):
    """Every value that is no mapping, with the keys that lead to it."""
    if not isinstance(config, dict):
        return {path: config}
    return {place: value for key in config for place, value in _leaves(config[key], (*path, key)).items()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_what_it_says_and_nothing_else(name, capsys):
    overlay = _leaves(yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")))
    base = _leaves(parsed(capsys, "recipe:atlas"))
    both = _leaves(parsed(capsys, "recipe:atlas", f"recipe:{name}"))
    assert overlay.items() <= both.items()
    classes = {
        "atlas_fsdp": ("trainer", "strategy"),
        "qwen3_30b_a3b_ep": ("trainer", "strategy"),
        "qwen3_30b_a3b_fsdp": ("trainer", "strategy"),
        "wandb": ("trainer", "logger"),
        "lora": ("model", "init_args", "adapter"),
        **dict.fromkeys(METHODS, ("edit", "editor", "init_args")),
    }
    changed = {place for place in base.keys() | both.keys() if base.get(place) != both.get(place)} - overlay.keys()
    # another class has other settings
    where = classes.get(name, ())
    assert all(place[: len(where)] == where for place in changed) if where else not changed


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
    ("first", "seconds"),
    [
        # one that has all that the others have, and a strategy; overlays, and another model
        ("qwen3_30b_a3b_zero3", [*OVERLAYS, "atlas"]),
        *(
            pytest.param(path.stem, [other.stem for other in CONFIGS if other != path], marks=pytest.mark.slow)
            for path in FIRST
        ),
    ],
    ids=["few", *(path.stem for path in FIRST)],
)
def test_every_pair_of_configs_composes_to_what_it_says(first, seconds, tmp_path, capsys):
    for second in seconds:
        if first in {*OVERLAYS} - {"lora", "wandb"}:
            with pytest.raises(SystemExit):
                run(args=["fit", f"--config=recipe:{first}", f"--config=recipe:{second}"])
            assert "It overlays another config: give that one before it." in capsys.readouterr().err
            continue
        texts = ((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8") for name in (first, second))
        together = tmp_path / f"{first} {second}.yaml"
        together.write_text(yaml.safe_dump(_composed(*map(yaml.safe_load, texts))), encoding="utf-8")
        if second in {*OVERLAYS} - {"wandb"} and first == "wandb":
            continue  # no model in either
        assert parsed(capsys, f"recipe:{first}", f"recipe:{second}") == parsed(capsys, together), second


def test_overlays_go_together_in_any_order(capsys):
    for overlays in (("atlas_zero3", "wandb"), ("wandb", "atlas_zero3")):
        printed = parsed(capsys, "recipe:atlas", *(f"recipe:{name}" for name in overlays))["trainer"]
        logger = printed["logger"]
        assert printed["strategy"] == "deepspeed_cpu_stage_3" and logger["class_path"].endswith("WandbLogger")
        assert logger["init_args"]["version"] is logger["init_args"]["id"] is logger["init_args"]["name"] is None


def test_an_overlay_alone_says_what_it_is(capsys):
    with pytest.raises(SystemExit):
        run(args=["fit", "--config=recipe:atlas_zero3"])
    assert capsys.readouterr().err.rstrip().endswith("It overlays another config: give that one before it.")
    with pytest.raises(ValueError, match=r"recipe:lora, which overlays another, has neither: give that one"):
        run(args=["fit", "--config=recipe:lora"])


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
    assert f"there is no recipe {name!r}; there are alphaedit, atlas, atlas_fsdp, atlas_zero3, " in said


def test_a_missing_file_is_named_with_its_option():
    with pytest.raises(FileNotFoundError) as caught:
        run(args=["fit", "--config", "recipe:counterfact"])
    place, reason = str(caught.value).splitlines()
    assert place.startswith(str(ROOT / "configs" / "counterfact.yaml, line ")) and place.endswith(": data.corpus.path")
    assert reason == "  there is no facts file counterfact.json; give yours by --data.corpus.path"
