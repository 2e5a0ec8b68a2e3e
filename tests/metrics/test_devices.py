"""Tests of metrics and inputs on the same device and on different devices."""

from __future__ import annotations

import pytest
import torch

from lit_moeedit.metrics import (
    CopyAccuracy,
    EditSuccess,
    ExpertLoad,
    ProbabilityGap,
    ProbeAccuracy,
    RoutingDivergence,
    RoutingSimilarity,
    WeightGrowth,
)


@pytest.mark.parametrize("metric_moves", [False, True])
@pytest.mark.parametrize("input_moves", [False, True])
def test_metrics(cuda, metric_moves: bool, input_moves: bool) -> None:
    cpu = torch.device("cpu")
    where, given = (cuda if moves else cpu for moves in (metric_moves, input_moves))
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 4, generator=generator)
    experts = [torch.rand(9, 5, generator=generator).topk(2).indices for _ in range(2)]
    routed = [torch.rand(9, 5, generator=generator).softmax(-1) for _ in range(2)]

    def results(where: torch.device, given: torch.device) -> list[dict[str, torch.Tensor]]:
        success = EditSuccess(["near"]).to(where)
        similarity, divergence = RoutingSimilarity([1]).to(where), RoutingDivergence([1]).to(where)
        load = ExpertLoad(5, [1]).to(where)
        gap, probes = ProbabilityGap().to(where), ProbeAccuracy().to(where)
        copies, growth = CopyAccuracy().to(where), WeightGrowth().to(where)
        new, true, third = scores.to(given)
        for _ in range(2):
            success.update("edit", new, true, third > 0.5)
            success.update("paraphrase", new, true, third > 0.5)
            success.update("neighbour", new, true, third > 0.5, new > 0.5, ["near"] * 4)
            similarity.update({1: experts[0].to(given)}, {1: experts[1].to(given)})
            divergence.update({1: routed[0].to(given)}, {1: routed[1].to(given)})
            load.update({1: experts[0].to(given)})
            gap.update(new, true)
            probes.update("reversed", third > 0.5, torch.tensor([0, 1, 1, 2], device=given))
            copies.update(experts[0].to(given), experts[1].to(given))
            growth.update(new + 1, true + 1)
        metrics = (success, similarity, divergence, load, gap, probes, copies, growth)
        return [metric.compute() for metric in metrics]

    for there, plain in zip(results(where, given), results(cpu, cpu), strict=True):
        assert there.keys() == plain.keys()
        for name, value in there.items():
            assert value.device == where and torch.equal(value.cpu().nan_to_num(), plain[name].nan_to_num()), name
