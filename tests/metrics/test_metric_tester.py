"""The checks of torchmetrics' own `MetricTester`, which its wheel does not have, for all metrics.

As there, a metric is compared with a slow reference: in one process and in two, batch by batch and on all batches, with
and without `dist_sync_on_step`. Then its functional form, half precision, gradients, copies, states and attributes.
`torch.jit.script` is left out, as in torchmetrics for other metrics of mappings: it does not compile them.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
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
from tests.metrics.test_edit_success import GROUPS, arrays, brute
from tests.processes import run_ranks

LAYERS, EXPERTS, TOKENS, BATCHES = (3, 5), 6, 8, 6
KINDS = ("edit", "paraphrase", "neighbour")
RANKS = 2


def _tables(seed: int, sides: int) -> list[dict[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{i: torch.randn(TOKENS, EXPERTS, generator=generator) for i in LAYERS} for _ in range(sides)]


def _experts(seed: int, sides: int) -> list[Any]:
    return [{i: table.topk(2).indices for i, table in side.items()} for side in _tables(seed, sides)]


def _distributions(seed: int) -> list[Any]:
    return [{i: table.softmax(1) for i, table in side.items()} for side in _tables(seed, 2)]


def _prompts(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    new, true, exact, before = torch.randint(0, 4, (4, TOKENS), generator=generator).tolist()
    return [
        {
            "kind": KINDS[seed % 3],
            "new": -float(new[n]),
            "true": math.nan if n == seed else -float(true[n]),
            "exact": exact[n] > 1,
            "exact_before": before[n] > 0,
            "group": GROUPS[n % 2],
        }
        for n in range(TOKENS)
    ]


def _texts(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    words = ["Rome", "Oslo", "New York", "in", "the", "York"]
    picked = torch.randint(len(words), (TOKENS, 4), generator=generator).tolist()
    return {
        "generated": [" ".join(words[i] for i in row[:length]) for length, row in enumerate(picked, start=-3)],
        "targets": [words[row[-1] % 3] for row in picked],
    }


def _gaps(seed: int) -> dict[str, Any]:
    new, true = -torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(seed)) * 5
    true[seed] = math.nan
    return {"log_prob_new": new, "log_prob_true": true}


def _asked(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    facts = torch.randint(3, (TOKENS,), generator=generator)
    right = torch.rand(TOKENS, generator=generator) < 0.4
    return {"kind": ("portability", "multi_hop", "reversed")[seed % 3], "right": right, "facts": facts}


def _copies(seed: int) -> dict[str, Any]:
    predicted, expected = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(seed))
    return {"predicted": predicted, "expected": expected}


def _norms(seed: int) -> dict[str, Any]:
    before, after = 1 + torch.rand(2, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return {"before": before, "after": after}


# --- references ------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _by_layer(values: dict[int, float], prefix: str = "") -> dict[str, float]:
    named = {f"{prefix}layer_{i}": value for i, value in values.items()}
    return {f"{prefix}mean": _mean(list(values.values())), **named}


def _slow_similarity(batches: list[Any]) -> dict[str, float]:
    def overlap(layer: int) -> float:
        rows = [
            (set(a), set(b))
            for one, two in batches
            for a, b in zip(one[layer].tolist(), two[layer].tolist(), strict=True)
        ]
        return _mean([len(a & b) / len(a | b) for a, b in rows])

    return _by_layer({i: overlap(i) for i in LAYERS})


def _kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def _slow_divergence(batches: list[Any]) -> dict[str, float]:
    def rows(layer: int) -> list[tuple[list[float], list[float]]]:
        return [(a, b) for one, two in batches for a, b in zip(one[layer].tolist(), two[layer].tolist(), strict=True)]

    def js(p: list[float], q: list[float]) -> float:
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        return (_kl(p, middle) + _kl(q, middle)) / 2

    kl = {i: _mean([_kl(p, q) for p, q in rows(i)]) for i in LAYERS}
    return _by_layer(kl, "kl/") | _by_layer({i: _mean([js(p, q) for p, q in rows(i)]) for i in LAYERS}, "js/")


def _slow_load(batches: list[Any]) -> dict[str, float]:
    found: dict[str, dict[int, float]] = {"entropy/": {}, "max_share/": {}, "dead/": {}}
    for layer in LAYERS:
        counts = Counter(expert for (table,) in batches for row in table[layer].tolist() for expert in row)
        shares = [counts[expert] / counts.total() for expert in range(EXPERTS)]
        found["entropy/"][layer] = -sum(s * math.log(s) for s in shares if s) / math.log(EXPERTS)
        found["max_share/"][layer] = EXPERTS * max(shares)
        found["dead/"][layer] = shares.count(0) / EXPERTS
    return {name: value for prefix, values in found.items() for name, value in _by_layer(values, prefix).items()}


def _slow_success(batches: list[Any]) -> dict[str, float]:
    return brute([row for rows in batches for row in rows])


def _slow_match(batches: list[Any]) -> dict[str, float]:
    pairs = [pair for batch in batches for pair in zip(batch["generated"], batch["targets"], strict=True)]

    def contains(text: str, target: str) -> bool:
        # the words are separated by single spaces, and the longest target has two
        return f" {target} " in f" {text} "

    exact, contained = ([text == target for text, target in pairs], [contains(*pair) for pair in pairs])
    return {"generation_exact": _mean(exact), "generation_contained": _mean(contained)}


def _slow_fluency(batches: list[Any]) -> dict[str, float]:
    def entropy(items: list[Any]) -> float:
        return sum(-items.count(x) / len(items) * math.log2(items.count(x) / len(items)) for x in set(items))

    def of_text(text: str) -> float:
        words = text.split()
        bigrams, trigrams = ([tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for n in (2, 3))
        return _mean([2 / 3 * entropy(bigrams), 4 / 3 * entropy(trigrams)])

    return {"fluency": _mean([of_text(text) for batch in batches for text in batch["texts"]])}


def _slow_gap(batches: list[Any]) -> dict[str, float]:
    pairs = [
        (new, true)
        for batch in batches
        for new, true in zip(batch["log_prob_new"].tolist(), batch["log_prob_true"].tolist(), strict=True)
        if not math.isnan(true)
    ]
    gaps = [math.exp(new) - math.exp(true) for new, true in pairs]
    return {"probability_gap": _mean(gaps), "log_probability_gap": _mean([new - true for new, true in pairs])}


def _slow_probes(batches: list[Any]) -> dict[str, float]:
    by_kind: dict[str, list[float]] = {"portability": [], "multi_hop": [], "reversed": []}
    for batch in batches:
        rows = list(zip(batch["facts"].tolist(), batch["right"].tolist(), strict=True))
        for fact in {fact for fact, _ in rows}:
            by_kind[batch["kind"]].append(_mean([right for other, right in rows if other == fact]))
    return {kind: _mean(values) if values else math.nan for kind, values in by_kind.items()}


def _slow_copies(batches: list[Any]) -> dict[str, float]:
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch["predicted"].flatten().tolist(), batch["expected"].flatten().tolist(), strict=True)
    ]
    return {"copy_accuracy": _mean([a == b for a, b in pairs])}


def _slow_growth(batches: list[Any]) -> dict[str, float]:
    pairs = [pair for batch in batches for pair in zip(batch["before"].tolist(), batch["after"].tolist(), strict=True)]
    growth = [(b - a) / a for a, b in pairs]
    return {"weight_growth_max": max(growth), "weight_growth_mean": _mean(growth)}


# --- cases -----------------------------------------------------------------------------------------------------------


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
        [_experts(seed, 2) for seed in range(BATCHES)],
        _sides,
        _slow_similarity,
        lambda batch: {f"layer_{i}": routing_similarity(batch[0][i], batch[1][i]) for i in LAYERS},
    ),
    "divergence": Case(
        RoutingDivergence,
        {"layers": LAYERS},
        [_distributions(seed) for seed in range(BATCHES)],
        _sides,
        _slow_divergence,
        _divergences,
        ("before", "after"),
    ),
    "load": Case(
        ExpertLoad,
        {"num_experts": EXPERTS, "layers": LAYERS},
        [_experts(seed, 1) for seed in range(BATCHES)],
        _sides,
        _slow_load,
        lambda batch: {f"max_share/layer_{i}": EXPERTS * expert_load(batch[0][i], EXPERTS).max() for i in LAYERS},
    ),
    "success": Case(
        EditSuccess,
        {"groups": GROUPS},
        [_prompts(seed) for seed in range(BATCHES)],
        lambda rows: arrays(rows, rows[0]["kind"]),
        _slow_success,
        _success,
        ("log_prob_new", "log_prob_true"),
    ),
}
TEXTS = [_texts(seed) for seed in range(BATCHES)]
CASES |= {
    "match": Case(GenerationMatch, {}, TEXTS, dict, _slow_match, lambda batch: generation_match(**batch)),
    "fluency": Case(
        Fluency,
        {},
        [{"texts": batch["generated"]} for batch in TEXTS],
        dict,
        _slow_fluency,
        lambda batch: ngram_entropy(**batch),
    ),
    "gap": Case(
        ProbabilityGap,
        {},
        [_gaps(seed) for seed in range(BATCHES)],
        dict,
        _slow_gap,
        lambda batch: probability_gap(**batch),
        ("log_prob_new", "log_prob_true"),
    ),
    "probes": Case(
        ProbeAccuracy,
        {},
        [_asked(seed) for seed in range(BATCHES)],
        dict,
        _slow_probes,
        lambda batch: {batch["kind"]: probe_accuracy(batch["right"], batch["facts"])},
    ),
    "copies": Case(
        CopyAccuracy,
        {},
        [_copies(seed) for seed in range(BATCHES)],
        dict,
        _slow_copies,
        lambda batch: copy_accuracy(**batch),
    ),
    "growth": Case(
        WeightGrowth,
        {},
        [_norms(seed) for seed in range(BATCHES)],
        dict,
        _slow_growth,
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
    before, after = (side[LAYERS[0]].double().requires_grad_() for side in _tables(0, 2))
    if not logits:
        before, after = (side.detach().softmax(1).requires_grad_() for side in (before, after))
    assert torch.autograd.gradcheck(lambda *x: routing_divergence(*x, logits=logits), (before, after))


@pytest.mark.parametrize("logits", [False, True])
def test_gradients_are_finite_where_experts_are_masked(logits: bool) -> None:
    before, after = (side[LAYERS[0]] for side in _tables(0, 2))
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
