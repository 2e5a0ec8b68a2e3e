"""The examples, each run as its first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lit_moeedit.data.facts import Fact

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(scope="module")
def given(
    _taught: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a model and a facts file."""
    folder = tmp_path_factory.mktemp("examples")
    _taught.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps(facts[number].to_dict()) + "\n" for number in (0, 2)]  # which so small a model can take
    (folder / "facts.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(given: Path) -> Callable[..., str]:
    """``run(name, *args)`` runs an example beside the model, and returns what it writes."""

    def start(name: str, *args: str) -> str:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        command = [sys.executable, str(EXAMPLES / name), *args]
        done = subprocess.run(
            command, cwd=given, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return start


@pytest.mark.slow
def test_a_folder_is_edited_and_the_edit_undone(run: Callable[..., str], given: Path) -> None:
    told = run("edit_a_folder.py", "model", "facts.jsonl", "edited")
    assert told.count("yes The city") == 1 and len(told.splitlines()) == 2
    assert (given / "edited" / "report.html").exists()
    assert "equal to the base, bit for bit: True" in run("undo.py", "model", "edited")


@pytest.mark.slow
def test_a_trainer_of_ones_own(run: Callable[..., str]) -> None:
    told = run("own_trainer.py", "model", "facts.jsonl")
    assert "1 of 2 new answers are generated" in told or "2 of 2 new answers" in told  # by so small a model


@pytest.mark.slow
def test_adapters_and_an_edit(run: Callable[..., str], given: Path) -> None:
    assert "bytes in the checkpoint" in run("lora_and_edit.py", "model", "facts.jsonl", "lora")
    assert (given / "lora" / "model" / "model.safetensors").exists()
    assert [path.name for path in (given / "lora" / "edits").iterdir()] == ["edit-0001"]
    assert (given / "lora" / "adapter.ckpt").stat().st_size < (given / "model" / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_sweep_offline(run: Callable[..., str], given: Path) -> None:
    assert run("sweep.py", "model", "facts.jsonl", "sweep").count("2 edits with Woodbury") == 2
    assert len(list((given / "sweep" / "wandb").glob("offline-run-*"))) == 2
