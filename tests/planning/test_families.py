"""The table of families: what it finds out by trying, against what configs and papers say."""

from __future__ import annotations

import pytest
import transformers

from lit_moeedit.cli import run
from lit_moeedit.planning import families as module
from lit_moeedit.planning.families import TESTED_WITH, finding
from lit_moeedit.planning.family_catalog import Family

pytestmark = pytest.mark.families


def test_the_tested_version_is_the_one_that_is_installed() -> None:
    assert transformers.__version__ == TESTED_WITH


@pytest.mark.parametrize(
    ("model_type", "layout", "router", "note"),
    [
        ("qwen3_moe", "default", "softmax", ""),
        ("mixtral", "default", "softmax, normalised", ""),
        ("minimax_m2", "default", "sigmoid, normalised", ""),
        ("deepseek_v3", "default", "sigmoid, normalised × a factor, in groups", ""),
        ("phimoe", "default", "other", ""),
        ("nemotron_h", "no gate", "sigmoid, normalised × a factor, in groups", ""),
        ("aria_text", "transposed", "softmax, normalised", ""),
        (
            "gpt_oss",
            "transposed, gate and up interleaved, biases, own activation",
            "softmax, normalised",
            "",
        ),
        ("granitemoe", "default", "softmax, normalised", "a factor after the experts is accounted for"),
    ],
)
def test_a_family_that_can_be_edited(model_type: str, layout: str, router: str, note: str) -> None:
    found = finding(Family(model_type, True))
    assert (found.family, found.refusal) == (model_type, "")
    assert (found.layout, found.router, found.note) == (layout, router, note)


def test_a_family_that_cannot() -> None:
    found = finding(Family("deepseek_v4", True))
    assert found.router == "sqrt softplus, normalised × a factor"
    assert found.refusal.endswith(
        "a model whose layers return several streams, or project the output of the experts, cannot be edited"
    )
    assert "do not declare transformers' experts interface" in finding(Family("dbrx", False)).refusal


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_a_family_of_which_no_small_model_can_be_made(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(model_type: str) -> None:
        raise error("hidden_size must be 7")

    monkeypatch.setattr(module, "small_model", fail)
    refusal = finding(Family("qwen3_moe", True)).refusal
    assert refusal.startswith("not known, as no small model of it runs")
    assert "hidden_size must be 7" in refusal


@pytest.mark.usefixtures("own_process")
def test_the_command_prints_a_row_for_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [Family("afmoe", True), Family("dbrx", False), Family("qwen3_next", True)]
    monkeypatch.setattr(module, "moe_families", lambda: found)
    run(["families"])
    lines = capsys.readouterr().out.splitlines()
    assert "transformers 5.23.0: 1 of 3 families can be edited" in lines[0]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [row[0] for row in rows if row[0]] == ["qwen3_next", "afmoe", "dbrx"]
    assert rows[0] == ["qwen3_next", "default", "softmax, normalised", "yes", "5.23.0"]
    assert "no: layer 1 of AfmoeForCausalLM normalises the output of its experts" in " ".join(row[3] for row in rows)


@pytest.mark.slow
@pytest.mark.usefixtures("own_process")
def test_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    run(["families"])
    assert "41 of 58 families can be edited" in capsys.readouterr().out
