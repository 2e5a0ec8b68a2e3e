"""Runs that get a signal end soon and say so, and a resume ends like an undisturbed run. All 60: the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.acceptance.random_signals import Bench, Case, cases, differing

pytestmark = [pytest.mark.usefixtures("own_process")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("signals"))


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("case", cases(12, seed=1)[::3], ids=lambda case: case.name)
def test_a_signal_costs_no_more_than_a_resume(bench: Bench, case: Case) -> None:
    pytest.importorskip("deepspeed", reason="needs DeepSpeed (the extra 'deepspeed')")
    assert bench.try_out(case).faults == []


def test_differences_are_found(tmp_path: Path) -> None:
    one = {"a": [torch.ones(2), 1], "b": {"c": None}}
    assert list(differing(one, {"a": [torch.ones(2), 1], "b": {"c": None}})) == []
    for other in (
        {"a": [torch.ones(2) + 1e-7, 1], "b": {"c": None}},
        {"a": [torch.ones(2), 2], "b": {"c": None}},
        {"a": [torch.ones(2), 1]},
        {"a": [torch.ones(2)], "b": {"c": None}},
    ):
        assert list(differing(one, other))
