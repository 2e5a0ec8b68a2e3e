"""Parts that benchmarks share: what they write, and a memory of a form that only a benchmark has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    atlas,
    editing,
    further_facts,
    long_targets,
    moment_tokens,
    preservation,
    sequential,
    strength,
    tucker,
)
from benchmarks.lifelong import PerExpert
from benchmarks.survival_report import table
from benchmarks.training import RESULTS, WEAK, finish, interval, mean_of, only
from lit_moeedit.editing import EditMemory
from lit_moeedit.editing.memory import GatedKeys


def test_a_benchmark_ends_with_its_files_and_prints_its_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Any] = []
    finish("some", "`command`", "a table\n", lambda *given: drawn.append(given), {"value": 1}, tmp_path / "out")
    assert (tmp_path / "out" / "some.md").read_text(encoding="utf-8") == "`command`\n\na table\n"
    assert json.loads((tmp_path / "out" / "some.json").read_text(encoding="utf-8")) == {"value": 1}
    assert drawn == [({"value": 1}, tmp_path / "out" / "some.png")] and capsys.readouterr().out == "a table\n"


def test_a_memory_per_expert_keeps_the_second_moments_of_each() -> None:
    generator, limit, edits = torch.Generator().manual_seed(0), 10**6, 3
    memories = [EditMemory(limit), PerExpert(limit)]
    for edit in range(edits):
        row, expert = torch.arange(20), torch.randint(3, (20,), generator=generator)
        keys = GatedKeys(row, expert, torch.randn(20, 5, generator=generator))
        for memory in memories:
            memory.remember({4: keys}, [f"{edit} {number}" for number in range(20)])
    rows, sketch = (memory.state_dict()[4] for memory in memories)
    assert memories[1].size(4) == (3 * 5, 3 * 5)  # as many vectors as dimensions, of each expert
    assert sketch["facts"] == [] and sketch["sketched"] == sorted(rows["facts"])
    for j in range(3):
        whole, kept = (state["key"][state["expert"] == j].double() for state in (rows, sketch))
        # decompositions in float32, one after each edit
        torch.testing.assert_close(kept.T @ kept, whole.T @ whole, rtol=0, atol=1e-4)


def test_facts_without_further_paraphrases_have_a_row_of_survival() -> None:
    metrics = {"efficacy_accuracy": 1.0, "generalization": 0.5, "specificity_retained": 1.0}
    run = {
        "model": "counterfact", "seed": 0, "edits": 100, "continuation": "1x", "weights": "x",
        "condition": "replay 5 % with paraphrases", "after": metrics, "end": metrics, "contradicted": None,
        "unstated": {"after": None, "end": None}, "train_loss": 1.0, "perplexity": 1.0, "seconds": 1.0, "processor": "",
    }  # fmt: skip
    assert "0.50 to 0.50" in table([run])


def test_a_fact_that_two_seeds_edit_is_one_fact_of_an_interval() -> None:
    """The same facts again make no interval narrower, and other facts do."""
    one = {"by_fact": {"keys": "a b c d", "efficacy": "1/1 0/1 1/1 0/1"}}
    other = {"by_fact": {"keys": "e f g h", "efficacy": "1/1 0/1 1/1 0/1"}}
    (low, high), (again_low, again_high), (wide_low, wide_high) = (
        interval(found, "efficacy") or (0.0, 0.0) for found in ([one], [one, one], [one, other])
    )
    assert (low, high) == (again_low, again_high) == (0.0, 1.0)
    assert wide_high - wide_low < high - low
    assert interval([one], "routing") is None and interval([{}], "efficacy") is None


def test_a_cell_has_the_interval_over_facts_and_the_range_of_seeds() -> None:
    facts = {"keys": "a b c d", "efficacy": "1/1 0/1 1/1 0/1", "generalization": "2/2 2/2 2/2 2/2"}
    one, other = (
        {"efficacy": 0.5, "generalization": 1.0, "routing": routing, "by_fact": facts} for routing in (0.5, 1)
    )
    assert mean_of([one, {**other, "efficacy": 0.25}], "efficacy") == "0.375 (0.000–1.000) [0.250–0.500]"
    assert mean_of([one, other], "routing") == "0.750 [0.500–1.000]" and mean_of([one], "routing") == "0.500"
    assert mean_of([{"routing": None}, one], "routing") == "0.500"
    assert mean_of([{"routing": None}, {"routing": None}], "routing") == "–"
    # of results that do not tell their facts nothing is taken for an interval
    assert mean_of([one, {"efficacy": 0.25}], "efficacy") == "0.375 [0.250–0.500]"
    kept = only(one, ["efficacy", "routing"])
    assert kept == {"efficacy": 0.5, "routing": 0.5, "by_fact": {name: facts[name] for name in ("keys", "efficacy")}}
    assert mean_of([kept], "efficacy") == "0.500 (0.000–1.000)"


def test_rows_of_some_seeds_name_them() -> None:
    point = {"form": "output", "strength": 0.3, "ridge": 1e-3, "gated": True, "by_fact": {}}
    known = point | dict.fromkeys(preservation.SHOWN, 0.5)
    text = preservation.table({"atlas": {"0": [known, {**known, "strength": 1.0}], "1": [known]}})
    assert "| output | 0.3 |" in text and "| output (seed 0) | 1 |" in text
    tuned = {**vars(strength.AUTO), **dict.fromkeys(strength.SHOWN, 0.5), "chosen": "layer 2"}
    given = {**tuned, **vars(strength.GIVEN)}
    cases = {"atlas, seed 0": [given], "atlas, seed 1": [given, tuned], f"{WEAK}, seed 1": [given, tuned]}
    text = strength.table(cases)
    assert "Means over the 3 models" in text and text.count("layer 2 (seed 1)") == 2 and "layer 2 (seed 0)" not in text
    assert text.count("**tune: true** (seed 1)") == 1  # of the other model there is no other seed


def test_a_picture_of_some_settings_is_drawn(tmp_path: Path) -> None:
    given = {**vars(strength.GIVEN), **dict.fromkeys(strength.SHOWN, 0.5)}
    strength.picture({"atlas, seed 0": [given]}, tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("editing", editing.tables),
        ("long_targets", lambda results: f"{long_targets.table(results)}\n\n{long_targets.NOTES}"),
        ("preservation", preservation.table),
        ("strength", strength.table),
        ("tucker", tucker.table),
        ("moment_tokens", moment_tokens.table),
        ("sequential", sequential.table),
        ("further_facts", further_facts.table),
        ("atlas", atlas.table),
    ],
)
def test_a_table_is_of_the_results_beside_it(name: str, text: Callable[[Any], str]) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8").split("\n\n", 1)[1] == f"{text(results).rstrip()}\n"
