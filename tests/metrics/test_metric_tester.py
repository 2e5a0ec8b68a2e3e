"""The checks of torchmetrics' own `MetricTester`, which its wheel does not have, for all metrics.

As there, a metric is compared with a slow reference: in one process and in two, batch by batch and on all batches, with
and without `dist_sync_on_step`. Then its functional form, half precision, gradients, copies, states and attributes.
`torch.jit.script` is left out, as in torchmetrics for other metrics of mappings: it does not compile them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_moeedit.metrics import (
    CopyAccuracy,
    EditSuccess,
    ExpertLoad,
    Fluency,
    GenerationMatch,
    ProbabilityGap,
    ProbeAccuracy,
    RoutingDivergence,
    RoutingSimilarity,
    WeightGrowth,
    copy_accuracy,
    edit_success,
    expert_load,
    generation_match,
    ngram_entropy,
    probability_gap,
    probe_accuracy,
    routing_divergence,
    routing_similarity,
    weight_growth,
)
from tests.metrics.references import (
    BATCHES,
    EXPERTS,
    LAYERS,
    RANKS,
    asked,
    copies,
    distributions,
    experts,
    gaps,
    norms,
    prompts,
    slow_copies,
    slow_divergence,
    slow_fluency,
    slow_gap,
    slow_growth,
    slow_load,
    slow_match,
    slow_probes,
    slow_similarity,
    slow_success,
    tables,
    texts,
)
from tests.metrics.test_edit_success import GROUPS, arrays
from tests.processes import run_ranks


@dataclass(frozen=True)
class Case:
    """A metric with its batches, the arguments of a call for a batch, and what is compared with it."""

    metric: type[Metric]
    arguments: dict[str, Any]
    batches: list[Any]
    call: Callable[[Any], dict[str, Any]]
    reference: Callable[[list[Any]], dict[str, float]]
    functional: Callable[[Any], dict[str, Tensor]]
    float_inputs: tuple[str, ...] = ()

    def make(self, **kwargs: Any) -> Metric:
        return self.metric(**self.arguments, **kwargs)


def _sides(batch: Any) -> dict[str, Any]:
    return dict(zip(("before", "after") if len(batch) == 2 else ("experts",), batch, strict=True))


def _divergences(batch: Any) -> dict[str, Tensor]:
    pairs = {i: routing_divergence(batch[0][i], batch[1][i]) for i in LAYERS}
    return {f"{name}/layer_{i}": pair[n] for i, pair in pairs.items() for n, name in enumerate(("kl", "js"))}


def _success(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return edit_success(**arrays(rows, rows[0]["kind"]))


CASES = {
    "similarity": Case(
        RoutingSimilarity,
        {"layers": LAYERS},
        [experts(seed, 2) for seed in range(BATCHES)],
        _sides,
        slow_similarity,
        lambda batch: {f"layer_{i}": routing_similarity(batch[0][i], batch[1][i]) for i in LAYERS},
    ),
    "divergence": Case(
        RoutingDivergence,
        {"layers": LAYERS},
        [distributions(seed) for seed in range(BATCHES)],
        _sides,
        slow_divergence,
        _divergences,
        ("before", "after"),
    ),
    "load": Case(
        ExpertLoad,
        {"num_experts": EXPERTS, "layers": LAYERS},
        [experts(seed, 1) for seed in range(BATCHES)],
        _sides,
        slow_load,
        lambda batch: {f"max_share/layer_{i}": EXPERTS * expert_load(batch[0][i], EXPERTS).max() for i in LAYERS},
    ),
    "success": Case(
        EditSuccess,
        {"groups": GROUPS},
        [prompts(seed) for seed in range(BATCHES)],
        lambda rows: arrays(rows, rows[0]["kind"]),
        slow_success,
        _success,
        ("log_prob_new", "log_prob_true"),
    ),
}
TEXTS = [texts(seed) for seed in range(BATCHES)]
CASES |= {
    "match": Case(GenerationMatch, {}, TEXTS, dict, slow_match, lambda batch: generation_match(**batch)),
    "fluency": Case(
        Fluency,
        {},
        [{"texts": batch["generated"]} for batch in TEXTS],
        dict,
        slow_fluency,
        lambda batch: ngram_entropy(**batch),
    ),
    "gap": Case(
        ProbabilityGap,
        {},
        [gaps(seed) for seed in range(BATCHES)],
        dict,
        slow_gap,
        lambda batch: probability_gap(**batch),
        ("log_prob_new", "log_prob_true"),
    ),
    "probes": Case(
        ProbeAccuracy,
        {},
        [asked(seed) for seed in range(BATCHES)],
        dict,
        slow_probes,
        lambda batch: {batch["kind"]: probe_accuracy(batch["right"], batch["facts"])},
    ),
    "copies": Case(
        CopyAccuracy,
        {},
        [copies(seed) for seed in range(BATCHES)],
        dict,
        slow_copies,
        lambda batch: copy_accuracy(**batch),
    ),
    "growth": Case(
        WeightGrowth,
        {},
        [norms(seed) for seed in range(BATCHES)],
        dict,
        slow_growth,
        lambda batch: weight_growth(**batch),
        ("before", "after"),
    ),
}
every_metric = pytest.mark.parametrize("name", CASES)


def _same(found: dict[str, Tensor], expected: dict[str, Any], at: object) -> None:
    assert found and found.keys() <= expected.keys(), at
    for name, value in found.items():
        assert isinstance(value, Tensor) and value.shape == () and value.dtype == torch.float32, (at, name)
        # float32 sums of a few dozen terms
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-5, abs=1e-6, nan_ok=True), (at, name)


def _converted(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _converted(inner, change) for key, inner in value.items()}
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def check_class(name: str, rank: int, ranks: int, sync_on_step: bool) -> None:
    case = CASES[name]
    metric = pickle.loads(pickle.dumps(case.make(dist_sync_on_step=sync_on_step)))
    for i in range(rank, BATCHES, ranks):
        found = metric(**case.call(case.batches[i]))
        first = i - rank  # of the batches that the ranks have in this step
        step = case.batches[first : first + ranks] if sync_on_step else [case.batches[i]]
        _same(found, case.reference(step), (name, rank, i))
    expected = case.reference(case.batches)
    assert expected.keys() == metric.compute().keys()
    _same(metric.compute(), expected, (name, rank, "all"))
    assert hash(metric) and metric.state_dict() == {}


def _all_classes() -> None:
    for name in CASES:
        for sync_on_step in (False, True):
            check_class(name, dist.get_rank(), RANKS, sync_on_step)


@pytest.mark.parametrize("sync_on_step", [False, True])
@every_metric
def test_one_process(name: str, sync_on_step: bool) -> None:
    check_class(name, 0, 1, sync_on_step)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes() -> None:
    run_ranks(_all_classes, RANKS)


@every_metric
def test_functional(name: str) -> None:
    case = CASES[name]
    for batch in case.batches:
        _same(case.functional(batch), case.reference([batch]), name)


@every_metric
def test_forward_is_update_and_compute(name: str) -> None:
    case = CASES[name]
    full = type("Full", (case.metric,), {"full_state_update": True})(**case.arguments)
    reduced, updated, merged = (case.make() for _ in range(3))
    for batch in case.batches:
        one, two = full(**case.call(batch)), reduced(**case.call(batch))
        torch.testing.assert_close(one, two, equal_nan=True)
        updated.update(**case.call(batch))
        other = case.make()
        other.update(**case.call(batch))
        merged.merge_state(other)
    for metric in (full, reduced, merged):
        torch.testing.assert_close(metric.compute(), updated.compute(), equal_nan=True)
    assert reduced.full_state_update is False


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    call = _converted(case.call(case.batches[0]), lambda x: x.to(dtype))
    found = case.make().half()(**call)
    rounded = _converted(case.call(case.batches[0]), lambda x: x.to(dtype).float())
    torch.testing.assert_close(found, case.make()(**rounded), equal_nan=True)
    assert all(value.dtype == torch.float32 for value in found.values())


@every_metric
def test_what_forward_returns_has_a_gradient_if_the_metric_says_so(name: str) -> None:
    case = CASES[name]
    call = _converted(case.call(case.batches[0]), lambda x: x.clone().requires_grad_())
    metric = case.make()
    found = metric(**call)
    assert case.metric.is_differentiable is (name == "divergence")
    assert {value.requires_grad for value in found.values()} == {case.metric.is_differentiable}
    # neither what is kept between batches nor its sum holds a graph
    metric.update(**call)
    assert not any(value.requires_grad for value in metric.compute().values())
    assert not any(getattr(metric, state).requires_grad for state in metric._defaults)


@pytest.mark.parametrize("logits", [False, True])
def test_gradients_of_the_divergence(logits: bool) -> None:
    before, after = (side[LAYERS[0]].double().requires_grad_() for side in tables(0, 2))
    if not logits:
        before, after = (side.detach().softmax(1).requires_grad_() for side in (before, after))
    assert torch.autograd.gradcheck(lambda *x: routing_divergence(*x, logits=logits), (before, after))


@pytest.mark.parametrize("logits", [False, True])
def test_gradients_are_finite_where_experts_are_masked(logits: bool) -> None:
    before, after = (side[LAYERS[0]] for side in tables(0, 2))
    before[:, 0], after[:, 1] = -math.inf, -math.inf
    pair = [(x if logits else x.softmax(1)).requires_grad_() for x in (before, after)]
    metric = RoutingDivergence(LAYERS[:1], logits=logits)
    sum(metric({LAYERS[0]: pair[0]}, {LAYERS[0]: pair[1]}).values()).backward()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in pair)


@every_metric
def test_copies_states_and_reset(name: str) -> None:
    case = CASES[name]
    metric = case.make()
    metric.update(**case.call(case.batches[0]))
    expected = metric.compute()
    for copied in (metric.clone(), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
        assert type(copied) is case.metric
        torch.testing.assert_close(copied.compute(), expected, equal_nan=True)
    clone = metric.clone()
    clone.update(**case.call(case.batches[1]))
    torch.testing.assert_close(metric.compute(), expected, equal_nan=True)
    metric.persistent(True)
    loaded = case.make()
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded._update_count = 1  # otherwise torchmetrics warns that nothing was counted
    torch.testing.assert_close(loaded.compute(), expected, equal_nan=True)
    metric.reset()
    assert all(torch.equal(getattr(metric, state), default) for state, default in metric._defaults.items())


@every_metric
def test_attributes_are_constant_and_true(name: str) -> None:
    case = CASES[name]
    metric = case.make()
    for attribute in ("is_differentiable", "higher_is_better", "full_state_update", "plot_lower_bound"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, attribute, None)
    values = [value for batch in case.batches for value in metric(**case.call(batch)).values() if not value.isnan()]
    # a difference of log-probabilities has no bounds
    assert (case.metric.plot_lower_bound is None) is (name == "gap")
    assert case.metric.plot_lower_bound is None or min(values) >= case.metric.plot_lower_bound
    assert case.metric.plot_upper_bound is None or max(values) <= case.metric.plot_upper_bound
    expected = {"divergence": False, "load": None, "fluency": None, "growth": False}
    assert case.metric.higher_is_better is expected.get(name, True)
