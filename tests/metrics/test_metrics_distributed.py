"""Tests of metrics in two processes with uneven parts of the data: they equal those of one process with all of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics import EditSuccess, ExpertLoad, RoutingDivergence, RoutingSimilarity
from tests.processes import run_ranks

LAYERS, NUM_EXPERTS, TOKENS, CUT = (2, 4), 16, 41, 29

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def metrics() -> dict[str, Metric]:
    return {
        "similarity": RoutingSimilarity(LAYERS),
        "divergence": RoutingDivergence(LAYERS),
        "load": ExpertLoad(NUM_EXPERTS, LAYERS),
        "edits": EditSuccess(("near", "far")),
    }


def update(metric: Metric, start: int, stop: int) -> None:
    """Give ``metric`` the prompts or tokens ``start:stop`` of one fixed data set."""
    generator = torch.Generator().manual_seed(0)

    def rows(make: Callable[..., Tensor], *shape: int) -> Tensor:
        return make(TOKENS, *shape, generator=generator)[start:stop]

    def per_layer(make: Callable[..., Tensor]) -> dict[int, Tensor]:
        return {layer: rows(make, NUM_EXPERTS) for layer in LAYERS}

    if isinstance(metric, EditSuccess):
        for kind in ("edit", "paraphrase", "neighbour"):
            new, true, exact, before = rows(torch.randn), rows(torch.randn), rows(torch.rand) < 0.6, rows(torch.rand)
            more: dict[str, Any] = {}
            if kind == "neighbour":
                names = [("near", "far")[index % 2] for index in range(start, stop)]
                more = {"exact_before": before < 0.8, "groups": names}
            metric.update(kind, new, true, exact, **more)
        return
    arguments = [per_layer(torch.randn) for _ in range(1 if isinstance(metric, ExpertLoad) else 2)]
    for side in arguments:
        for layer, logits in side.items():
            side[layer] = logits.softmax(1) if isinstance(metric, RoutingDivergence) else logits.topk(layer)[1]
    metric.update(*arguments)


def results(parts: list[tuple[int, int]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, metric in metrics().items():
        for start, stop in parts:
            update(metric, start, stop)
        if isinstance(metric, ExpertLoad):
            values["shares"] = metric.load()
        values[name] = metric.compute()
        # The states must be local again, or the next epoch would count the other process twice.
        metric._computed = None
        values[f"{name}_again"] = metric.compute()
    return values


def uneven_and_nothing() -> dict[str, dict[str, Any]]:
    rank = dist.get_rank()
    return {
        "uneven": results([(0, CUT)] if rank == 0 else [(CUT, TOKENS - 1), (TOKENS - 1, TOKENS)]),
        "nothing": results([(0, TOKENS)] if rank == 0 else []),
    }


def test_two_processes_equal_one():
    found = run_ranks(uneven_and_nothing, 2)
    expected = results([(0, TOKENS)])
    assert all(not value.isnan() for name in metrics() for value in expected[name].values())
    for rank, cases in enumerate(found):
        for case, values in cases.items():
            assert list(values) == list(expected)
            torch.testing.assert_close(values, expected, msg=lambda text, at=(rank, case): f"{at}: {text}")
            for exact in ("edits", "shares", "load"):
                torch.testing.assert_close(values[exact], expected[exact], rtol=0, atol=0)
