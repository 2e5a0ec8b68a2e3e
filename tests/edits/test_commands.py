"""The commands: a model, edits, and what comes out of them, as a user would see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from lit_moeedit import cli
from lit_moeedit.edits import Edit
from lit_moeedit.edits.folders import load_model
from tests.checkpoints.full_disk import full_disk
from tests.conftest import _build
from tests.edits.making import chain, equal, siblings

Made = tuple[Path, list[Edit], list[nn.Module]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Made:
    """A folder with a model in bfloat16 (``base``), three edits of it (``edits``), and code that must not run."""
    root = tmp_path_factory.mktemp("made")
    _build("qwen3_moe").bfloat16().save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    (root / "base" / "modeling.py").write_text("raise SystemExit('code of the model has run')")
    edits, models = chain(load_model(root / "base"))
    for edit in edits:
        edit.save(root / "edits")
    return root, edits, models


def run(*args: object) -> None:
    cli.run(["edits", *map(str, args)])


@pytest.fixture
def edited(made: Made, tmp_path: Path, own_process: None) -> Path:
    """The model with the first two edits."""
    root = made[0]
    run("apply", root / "base", root / "edits" / "edit-1", root / "edits" / "edit-2", "--output", tmp_path / "edited")
    return tmp_path / "edited"


def test_apply_verify_undo(made: Made, edited: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, _, models = made
    assert equal(load_model(edited), models[1])
    names = {path.name for path in edited.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "edits"} <= names
    assert (edited / "modeling.py").read_bytes() == (root / "base" / "modeling.py").read_bytes()  # and it was not run
    run("list", edited)
    run("verify", edited)
    shown = capsys.readouterr().out
    assert "edit-2" in shown and "edit-3" not in shown and shown.count("applied") == 4
    run("apply", edited, root / "edits", "--base", root / "base", "--output", tmp_path / "all")
    assert equal(load_model(tmp_path / "all"), models[2])
    run("undo", tmp_path / "all", "edit-2", "edit-3", "--base", root / "base", "--output", tmp_path / "one")
    assert equal(load_model(tmp_path / "one"), models[0])
    assert [path.name for path in (tmp_path / "one" / "edits").iterdir()] == ["edit-1"]
    with pytest.raises(SystemExit, match="2 of 3 edits are not in the weights: edit-2, edit-3"):
        run("verify", tmp_path / "one", "--edits", root / "edits")
    run("undo", tmp_path / "one", "edit-1", "--base", root / "base", "--output", tmp_path / "none")
    assert equal(load_model(tmp_path / "none"), load_model(root / "base"))
    assert not (tmp_path / "none" / "edits").exists()


def test_approximate_undo(made: Made, edited: Path, tmp_path: Path) -> None:
    run("undo", edited, "edit-2", "--approximate", "--output", tmp_path / "other")
    run("verify", tmp_path / "other")


def test_show(made: Made, own_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    run("show", made[0] / "edits", "edit-2")
    shown = capsys.readouterr().out
    assert "Rome lies in → Spain (was: Italy)" in shown and "made on: edit-1" in shown and "efficacy: ? → 1" in shown
    assert "FineTuning" in shown and "edit-3" not in shown
    run("show", made[0] / "edits" / "edit-2" / "edit.json")
    assert capsys.readouterr().out == shown
    with pytest.raises(SystemExit, match="has no edit 'x'; its edits are edit-1, edit-2, edit-3"):
        run("show", made[0] / "edits", "x")


def test_an_adapter(made: Made, tmp_path: Path, own_process: None) -> None:
    pytest.importorskip("peft", reason="needs peft (the extra 'peft')")
    root = made[0]
    run("apply", root / "base", root / "edits", "--format", "peft", "--rank", "2", "--output", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_refusals_leave_no_output(made: Made, edited: Path, tmp_path: Path) -> None:
    root = made[0]
    out = ("--output", tmp_path / "out")
    cases = {
        "'edit-3' was made on top of 'edit-1', 'edit-2', so apply that first": (
            "apply",
            root / "base",
            root / "edits" / "edit-3",
            *out,
        ),
        "give the base, too": ("apply", edited, root / "edits", *out),
        "--rank is of an adapter: give --format peft": ("apply", root / "base", root / "edits", "--rank", "2", *out),
        "edits is a folder of edits, and .*base a model: give the model first": (
            "apply",
            root / "edits",
            root / "base",
            *out,
        ),
        "base has no edits: it is a model": ("apply", root / "base", root / "base", *out),
        "already in .*: edit-1; nothing is written": ("apply", edited, root / "edits" / "edit-1", *out),
        "there is no folder": ("apply", root / "base", root / "nothing", *out),
        "has no config.json": ("apply", root / "edits", root / "edits", *out),
        "give the base, from which": ("undo", edited, "edit-2", *out),
        "'edit-2' was built on 'edit-1'": ("undo", edited, "edit-1", "--base", root / "base", *out),
        "the base is edited itself, its weights have 'edit-1', 'edit-2': give the model before all edits": (
            "undo",
            edited,
            "edit-2",
            "--base",
            edited,
            *out,
        ),
        "base has no edits": ("undo", root / "base", "edit-1", *out),
        "is not empty; --overwrite": ("apply", root / "base", root / "edits", "--output", edited),
        "which is read, is in it": ("apply", edited, root / "edits", "--overwrite", "--output", edited),
    }
    for message, args in cases.items():
        with pytest.raises(SystemExit, match=message):
            run(*args)
        assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_whole_or_not_safetensors(made: Made, tmp_path: Path, own_process: None) -> None:
    root = made[0]
    model = load_model(root / "base")
    state = model.state_dict()
    del state["model.norm.weight"]
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(SystemExit, match=r"cannot be loaded: weights are missing: model\.norm\.weight"):
        run("verify", tmp_path / "part", "--edits", root / "edits")
    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(state, tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="has no weights in safetensors"):
        run("verify", tmp_path / "pickle", "--edits", root / "edits")


@pytest.mark.slow
def test_siblings(made: Made, tmp_path: Path, own_process: None) -> None:
    root = made[0]
    both, _ = siblings(load_model(root / "base"), 2)
    for edit in both:
        edit.save(tmp_path / "edits")
    with pytest.raises(SystemExit, match="not solved jointly"):
        run("apply", root / "base", tmp_path / "edits", "--output", tmp_path / "both")
    run("apply", root / "base", tmp_path / "edits", "--allow_siblings", "--output", tmp_path / "both")
    run("verify", tmp_path / "both")
    run("undo", tmp_path / "both", "sibling-1", "--base", root / "base", "--output", tmp_path / "second")
    run("verify", tmp_path / "second")


def test_a_full_disk(made: Made, tmp_path: Path, own_process: None) -> None:
    root = made[0]
    with pytest.raises(SystemExit, match=r"apply: .*File too large"), full_disk(20_000):
        run("apply", root / "base", root / "edits", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())
