"""The command on hostile input: one line that says what is wrong, no traceback, nothing run, nothing half-written."""

from __future__ import annotations

import errno
import json
import logging
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_moeedit import cli
from lit_moeedit.checkpoint_fields import CheckpointError
from lit_moeedit.checkpoints.read import check_harmless
from lit_moeedit.module import LitMoE
from tests.checkpoints.zero_files import write_checkpoint
from tests.payload import Payload

pytestmark = [pytest.mark.usefixtures("own_process"), pytest.mark.filterwarnings("ignore:.*ckpt_path")]
CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 420, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A config of a run of two batches."""
    path = tmp_path / "facts.jsonl"
    rows = [
        {"subject": f"A{i}", "prompt": f"The B of A{i} is", "target_new": f"C{(i + 1) % 3}", "target_true": f"C{i % 3}",
         "paraphrases": [f"In A{i}, the B is"]}
        for i in range(5)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = {"class_path": "lit_moeedit.data.FactsCorpus", "init_args": {"path": str(path), "edits": 2}}
    targets = {"class_path": "lit_moeedit.editing.TargetOptimizer", "init_args": {"steps": 1}}
    editor = {
        "class_path": "lit_moeedit.editing.Editor",
        "init_args": {"layers": [0], "token": "last", "preserve": "none", "targets": targets},
    }
    return {
        "trainer": {
            "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "max_epochs": 1, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lit_moeedit.callbacks.KnowledgeEditing",
                    "init_args": {"editor": editor, "on_failure": "keep"},
                },
                {"class_path": "lit_moeedit.callbacks.EditReport"},
            ],
        },
        "model": {"class_path": "lit_moeedit.module.LitMoE", "init_args": {"config": dict(CONFIG)}},
        "data": {"class_path": "lit_moeedit.data.FactsDataModule",
                 "init_args": {"corpus": corpus, "vocab_size": 400, "batch_size": 4, "samples_per_epoch": 8}},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(how, *options)``: the command in this process; returns what it exits with."""

    def call(how: str = "fit", *options: str) -> Any:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["lit-moeedit", how, f"--config={path}", *options])
        try:
            return cli.main()
        except SystemExit as error:
            return error.code

    return call


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*")]


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fit", "validate"])
def test_a_checkpoint_with_code_in_it_is_refused(run: Any, tmp_path: Path, how: str) -> None:
    path, mark = tmp_path / "evil.ckpt", tmp_path / "was-run"
    torch.save({"state_dict": {}, "callbacks": Payload(mark)}, path)
    said = run(how, f"--ckpt_path={path}")
    assert said.startswith(f"lit-moeedit {how}: {path} holds objects of io.open, whose code would have to run")
    assert not mark.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [None, True, False])
def test_a_checkpoint_is_read_as_data_unless_it_is_trusted(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool | None
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(cli.EditingCLI, "instantiate_classes", lambda self: seen.append(self.config.fit.weights_only))
    monkeypatch.setattr(cli.EditingCLI, "_run_subcommand", lambda *_: None)
    monkeypatch.setattr(cli.EditingCLI, "_parse_ckpt_path", lambda *_: None)
    # of another host: Lightning by itself would run whatever is in it
    options = ["--ckpt_path=http://localhost/evil.ckpt"] + (
        [] if given is None else [f"--weights_only={given}".lower()]
    )
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    cli.run(["fit", f"--config={tmp_path / 'it.yaml'}", *options])
    assert seen == [given is not False]


@pytest.fixture
def kept(config: dict[str, Any], tmp_path: Path) -> Path:
    """A run that keeps checkpoints, and where it looks for the last one."""
    settings = {"dirpath": str(tmp_path / "kept"), "save_last": True}
    config["trainer"]["callbacks"].append(
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": settings}
    )
    config["trainer"]["enable_checkpointing"] = True
    return tmp_path / "kept" / "last.ckpt"


def forge(path: Path, mark: Path) -> Path:
    """Put code into a file of a checkpoint of DeepSpeed; returns the file."""
    write_checkpoint(path, {"a": torch.ones(3)}, 1, ranks=1)
    file = next(path.rglob("*_model_states.pt"))
    torch.save({"module": Payload(mark)}, file)
    return file


def test_a_checkpoint_that_lightning_finds_is_looked_at_too(
    run: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Any, path: Path, weights_only: bool | None = None) -> Any:
        """As DeepSpeed does, whatever it was told."""
        return [torch.load(file, weights_only=False) for file in Path(path).rglob("*.pt")]

    monkeypatch.setattr(SingleDeviceStrategy, "load_checkpoint", load)
    mark = tmp_path / "was-run"
    file = forge(kept, mark)
    said = run("fit", "--ckpt_path=last")
    assert said.startswith(f"lit-moeedit fit: {file} holds objects of io.open, whose code would have to run")
    assert "--weights_only=false reads it all the same" in said and not mark.exists()
    with suppress(Exception):  # what was read is no checkpoint
        run("fit", "--ckpt_path=last", "--weights_only=false")
    assert mark.exists()


@pytest.mark.slow
@pytest.mark.deepspeed
def test_deepspeed_runs_nothing_of_the_last_checkpoint(config: Any, kept: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    mark = tmp_path / "was-run"
    file = forge(kept, mark)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "lit_moeedit", "fit", f"--config={tmp_path / 'run.yaml'}", "--ckpt_path=last"]
    command.append("--trainer.strategy=deepspeed_cpu_stage_1")

    def ends_with(*more: str) -> str:
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 1
        return done.stderr.replace("\n", "")

    assert f"{file} holds objects of io.open" in ends_with()
    assert not mark.exists()
    ends_with("--weights_only=false")
    assert mark.exists()


def test_a_strategy_that_looks_at_checkpoints_goes_to_other_processes(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.EditingCLI, "_run_subcommand", lambda *_: None)
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    made = cli.run(["fit", f"--config={tmp_path / 'it.yaml'}"])
    assert made is not None
    copied = pickle.loads(pickle.dumps(made.trainer.strategy))
    file = forge(tmp_path / "it", tmp_path / "was-run")
    with pytest.raises(CheckpointError, match=f"{file.name} holds objects of"):
        copied.load_checkpoint(tmp_path / "it")


def test_a_folder_of_deepspeed_is_harmless_or_refused(tmp_path: Path) -> None:
    for stage in (1, 3):
        path = tmp_path / str(stage)
        write_checkpoint(path, {"a": torch.ones(3), "b": torch.ones(2)}, stage, ranks=2)
        check_harmless(path)
    for file in sorted(path.rglob("*.pt")):
        whole = file.read_bytes()
        torch.save({"module": Payload(tmp_path / "was-run")}, file)
        with pytest.raises(CheckpointError, match=rf"{file.name} holds objects of io\.open"):
            check_harmless(path)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=f"{file.name} cannot be read"):
            check_harmless(path)
        file.write_bytes(whole)
    check_harmless(path)
    for name in ("latest", "latest_universal"):
        (path / name).write_text("../1")
        with pytest.raises(CheckpointError, match=f"{name} should name a folder beside it, but holds"):
            check_harmless(path)
        (path / name).unlink()
    assert not (tmp_path / "was-run").exists()


def test_a_folder_of_deepspeed_with_a_link_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "it.ckpt", tmp_path / "was-run"
    write_checkpoint(path, {"a": torch.ones(3)}, 1, ranks=1)
    folder = path / (path / "latest").read_text().strip()
    for inner in (folder, next(folder.glob("*.pt")), path / "latest"):
        away = inner.rename(tmp_path / "away")
        inner.symlink_to(away)
        with pytest.raises(CheckpointError, match=rf"{inner.name} is a link; expected a checkpoint with all its files"):
            check_harmless(path)
        inner.unlink()
        away.rename(inner)
    (folder / "deep").mkdir()
    torch.save(Payload(mark), folder / "deep" / "it.pt")
    with pytest.raises(CheckpointError, match=r"it\.pt holds objects of io\.open"):
        check_harmless(path)
    (folder / "deep" / "it.pt").unlink()
    # ModelCheckpoint makes such a link to the last checkpoint
    (tmp_path / "last.ckpt").symlink_to(path)
    check_harmless(tmp_path / "last.ckpt")
    assert not mark.exists()


def test_a_hostile_folder_of_fsdp_is_refused(tmp_path: Path) -> None:
    path, mark = tmp_path / "it.ckpt", tmp_path / "was-run"
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read \(it names io\.open"):
        check_harmless(path)
    assert not mark.exists()


def test_a_file_of_another_module_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "it.ckpt"
    torch.save({"state_dict": {}, "tokenizer": "gpt2", "hyper_parameters": ["a"]}, path)
    check_harmless(path)
    for contents, what in (([1, 2], "should hold a dict, but holds a list"), ({"a": 1}, "'state_dict' .* is missing")):
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match=what):
            check_harmless(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"it\.ckpt cannot be read"):
        check_harmless(path)
    with pytest.raises(CheckpointError, match=r"none\.ckpt is missing"):
        check_harmless(tmp_path / "none.ckpt")


def test_a_checkpoint_of_another_model(run: Any, tmp_path: Path) -> None:
    module = LitMoE(config={**CONFIG, "hidden_size": 32})
    module.configure_model()
    torch.save(
        {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0", "loops": {}}, tmp_path / "it.ckpt"
    )
    said = run("validate", f"--ckpt_path={tmp_path / 'it.ckpt'}")
    assert "the checkpoint is not one of this model: Error(s) in loading state_dict for LitMoE: size mismatch" in said


# -- what a run is made of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model.config.vocab_size", 50, "the tokenizer has .* tokens, but the model embeds only 50"),
        ("model.config.model_type", "evil_moe", "Unrecognized model identifier: evil_moe"),
        ("model.config.model_type", "\x1b[31mevil", r"model_type '\\x1b\[31mevil'"),
        ("data.tokenizer", "/none/at/all", "there is no file or folder /none/at/all"),
        ("callback.preservation", "/none/at/all", "there is no preservation text /none/at/all"),
    ],
)
def test_one_line_says_what_is_wrong(
    run: Any, config: Any, tmp_path: Path, caplog: Any, monkeypatch: Any, where: str, value: Any, message: str
) -> None:
    editing = config["trainer"]["callbacks"][0]["init_args"]
    editing["editor"]["init_args"]["preserve"] = "covariance" if "preservation" in where else "none"
    at: Any = {"model": config["model"]["init_args"], "data": config["data"]["init_args"], "callback": editing}
    *path, last = where.split(".")
    for part in path:
        at = at[part]
    at[last] = value
    monkeypatch.setenv("LIT_MOEEDIT_LOG", "debug")
    first, *others, hint = run().split("\n")
    assert first.startswith("lit-moeedit fit: ") and hint == "(LIT_MOEEDIT_LOG=debug shows where it was raised)"
    said = " ".join((first, *others))
    assert re.search(message, said), said
    assert any(record.exc_info for record in caplog.records if record.name == "lit_moeedit.cli")
    assert not (tmp_path / "run" / "summary.json").exists()


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_a_summary_that_cannot_be_written_is_known_at_the_start(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "summary.json").mkdir(parents=True)
    monkeypatch.setattr(LitMoE, "training_step", lambda *_: pytest.fail("it has trained"))
    assert "summary.json is a folder; expected the path of a file" in run()
    assert leftovers(tmp_path) == []


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_summary_and_not_what_it_says(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run()
    path = tmp_path / "run" / "summary.json"
    before, write_bytes = path.read_bytes(), Path.write_bytes
    capsys.readouterr()

    def half(path: Path, content: bytes) -> Any:
        if "summary" not in path.name:
            return write_bytes(path, content)
        write_bytes(path, content[:20])
        return _full()

    monkeypatch.setattr(Path, "write_bytes", half)
    assert f"No space left on device: '{path}'" in run()
    assert path.read_bytes() == before and leftovers(tmp_path) == []
    assert "2 edits with Woodbury" in capsys.readouterr().out


@pytest.mark.parametrize("full", ["config.yaml", "checkpoint"])
def test_a_full_disk_leaves_no_half_files(
    run: Any, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    config["trainer"]["enable_checkpointing"] = full == "checkpoint"
    if full == "checkpoint":
        monkeypatch.setattr(torch, "save", _full)
    else:
        monkeypatch.setattr(LightningArgumentParser, "save", lambda _, __, path, **___: (path.write_text("x"), _full()))
    assert "No space left on device" in run()
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert files == (set() if full == "config.yaml" else {"config.yaml", "edits.jsonl", "report.html"})


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, as it does in a terminal; a process in the background begins with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_it_trains(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LitMoE, "training_step", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run() == 130
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "edits.jsonl", "report.html"}


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_there_is_a_trainer(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.safe_yaml, "check", lambda _: signal.raise_signal(signal.SIGINT))
    assert run() == 130


# -- messages ---------------------------------------------------------------------------------------------------------


def test_log_lines_spell_out_what_a_terminal_would_obey() -> None:
    record = logging.LogRecord("it", logging.INFO, "", 0, "%s is [bold]here[/bold]", ("\x1b[2JRome\u202e\r\b",), None)
    assert cli.PrintableFormatter("%(message)s").format(record) == r"\x1b[2JRome\u202e\r\x08 is [bold]here[/bold]"
