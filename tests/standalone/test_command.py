"""The command ``edit``: exit codes, and what is checked before the work."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.cli import run
from lit_moeedit.editing import Editor, TargetOptimizer
from lit_moeedit.sharding.ranks import RankError
from lit_moeedit.standalone import command, edit
from lit_moeedit.standalone import run as standalone_run

WEAK = Editor([0], targets=TargetOptimizer(steps=1, learning_rate=1e-4), token="last")


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with an editor that finds nothing."""
    monkeypatch.setattr(command, "edit", lambda *args, **settings: edit(*args, **settings | {"editor": WEAK}))


@pytest.mark.usefixtures("weak")
def test_too_few_facts_is_exit_code_3(
    base: Path,
    facts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lit_moeedit")
    arguments = ["edit", str(base), str(facts_file), str(tmp_path / "out")]
    with pytest.raises(SystemExit) as raised:
        run(arguments)
    assert raised.value.code == command.TOO_FEW == 3
    assert "None of 2 facts hold" in capsys.readouterr().out
    assert "nothing is changed" in caplog.text
    monkeypatch.setenv("RANK", "1")
    run(arguments)  # the others leave it to the first rank
    assert not capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "facts.jsonl"]


def test_what_is_wrong_is_said_before_the_work(
    base: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(*args: object, **settings: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(standalone_run, "edit_with_attempts", never)
    good: dict[str, Any] = {"model": base, "facts": facts_file, "output": tmp_path / "out"}
    for message, wrong in {
        "is a file; expected the local folder": {"model": facts_file, "facts": base},
        "name may have letters": {"name": "a/b"},
        "distinct layer indices": {"layers": [1, 1]},
        r"layer 9 of .* has no routed experts": {"layers": [9], "token": "last"},
        r"there is no facts file .*fatcs.jsonl \(did you mean '.*facts.jsonl'": {"facts": tmp_path / "fatcs.jsonl"},
        "did you mean 'cuda:1'": {"device": "gpu:1"},
        "no device 'meta' here: expected auto": {"device": "meta"},
    }.items():
        with pytest.raises((OSError, ValueError), match=f"(?i){message}"):
            edit(**good | wrong)
    caplog.clear()
    with pytest.raises(FileNotFoundError):
        edit(**good | {"facts": tmp_path / "fatcs.jsonl"})
    assert "neutral text" not in caplog.text


def test_a_name_that_is_taken(
    base: Path, facts_file: Path, texts: Sequence[str], editor: Editor, tmp_path: Path
) -> None:
    again = partial(edit, editor=editor, preservation=texts, name="one")
    again(base, facts_file, tmp_path / "one")
    with pytest.raises(FileExistsError, match="has an edit 'one' already"):
        again(tmp_path / "one", facts_file, tmp_path / "two")


def test_a_rank_that_another_one_has_ended(
    base: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*args: object, **settings: object) -> None:
        raise RankError("rank 0 failed: OSError: no space")

    monkeypatch.setattr(command, "edit", ended)
    with pytest.raises(SystemExit, match="lit-moeedit edit: rank 0 failed: OSError: no space"):
        run(["edit", str(base), str(facts_file), str(tmp_path / "out")])
