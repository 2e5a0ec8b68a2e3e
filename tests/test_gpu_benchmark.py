"""The benchmark for GPUs, run with tiny models on a CPU: everything it does, what it writes, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_checks, gpu_models, gpu_report
from lit_moeedit.sharding.transaction import Transaction

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture
def one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "FAMILIES", {"qwen3_moe": gpu_checks.FAMILIES["qwen3_moe"]})
    # main() sets it if it is not set
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def run_parts(folder: Path, *parts: str, seconds: str = "360") -> tuple[int, dict[str, Any]]:
    """Exit code of the command and its results, with some parts only."""
    code = gpu.main([*TINY, "--parts", *parts, "--seconds", seconds, "--output", str(folder)])
    return code, json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.deepspeed
def test_the_whole_command_with_tiny_models(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", *TINY, "--output", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert results["tiny"]
    assert {part["status"] for part in results["parts"].values()} <= {"done", "left out"}
    left_out = [name for name, part in results["parts"].items() if part["status"] == "left out"]
    if results["machine"]["deepspeed"]:
        assert left_out == [gpu.GRAPHS]
    checks = list(gpu_report.checks(results))
    assert all(check["passed"] for _, check in checks)
    families = {check["name"].partition(":")[0] for name, check in checks if name == "CPU against GPU"}
    assert families == set(gpu_checks.FAMILIES)
    for part in results["parts"].values():
        if "launches" in part.get("found", {}):
            assert all(count > 0 for count in part["found"]["launches"].values())
            assert part["found"]["steps"] == 25
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for goal in gpu_report.GOALS:
        assert f"| {goal.name} |" in text
    assert "tiny" in text.splitlines()[2]
    assert "not measured (no card)" in text
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_edits_and_layers_are_measured(tmp_path: Path, one_family: None) -> None:
    """The parts that take no training; all of them, in a process of their own, are a slow test."""
    code, results = run_parts(tmp_path, "edit of 50", "layer of GPT-OSS", "moments")
    assert code == 0 and all(check["passed"] for _, check in gpu_report.checks(results))
    done = {name for name, part in results["parts"].items() if part["status"] == "done"}
    assert len(done) == 3 and done >= {"edit of 50", "second moments"}


@pytest.mark.slow
def test_weights_that_stay_changed_fail_the_command(
    tmp_path: Path, one_family: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transaction, "rollback", lambda self: None)
    code, results = run_parts(tmp_path, "CPU against GPU")
    assert code == 1
    failed = [check["name"] for _, check in gpu_report.checks(results) if not check["passed"]]
    assert failed == ["qwen3_moe: tensors changed by an edit that was broken off"]
    assert "FAILED" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_part_that_fails_does_not_lose_the_others(
    tmp_path: Path, one_family: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_checks, "compare_devices", fail)
    code, results = run_parts(tmp_path, "CPU against GPU", "second moments")
    assert code == 1
    assert results["parts"]["CPU against GPU"]["reason"] == "RuntimeError: no such kernel"
    assert results["parts"]["second moments"]["status"] == "done"
    assert "failed: RuntimeError: no such kernel" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_what_the_time_does_not_suffice_for_is_named(tmp_path: Path, one_family: None) -> None:
    code, results = run_parts(tmp_path, "second moments", gpu.MANY, seconds="-1")
    assert code == 0
    assert {part["status"] for part in results["parts"].values()} == {"left out"}
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "not measured (left out: the time was over)" in text
    assert "not measured (left out: not asked for)" in text


@pytest.mark.parametrize("case", [gpu_models.GPT_OSS, gpu_models.QWEN36])
def test_layers_of_several_types_that_have_room(case: gpu_models.Case) -> None:
    assert gpu_models.layers_that_fit(case.config, 2, 1e13, 2) == 2


def test_layers_that_have_room() -> None:
    config = gpu_models.QWEN3.config
    one, two = (gpu_models.parameters_of(config, layers) for layers in (1, 2))
    assert gpu_models.layers_that_fit(config, 48, 2 * one - 1, 2) == 0
    assert gpu_models.layers_that_fit(config, 48, 2 * two, 2) == 2
    assert gpu_models.layers_that_fit(config, 48, 2 * (one + 47 * (two - one)), 2) == 48
    assert gpu_models.layers_that_fit(config, 48, 1e13, 2) == 48


def test_without_a_card_the_models_are_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "--tiny" in capsys.readouterr().err
