import math
import pickle
import sys
from itertools import pairwise

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_moeedit.metrics import (
    ExpertLoad,
    RoutingDivergence,
    RoutingSimilarity,
    expert_load,
    routing_divergence,
    routing_similarity,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

LAYERS = (3, 5)
NUM_EXPERTS = 12
few = settings(deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def top_k(tokens: int, k: int, seed: int, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Random distinct expert indices, [tokens, k]."""
    return torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :k]


def distributions(tokens: int, seed: int, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Random sparse routing probabilities, [tokens, num_experts], each row with at least one zero and one non-zero."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, num_experts, generator=generator)
    keep = torch.rand(tokens, num_experts, generator=generator) < 0.7
    keep[:, 0], keep[:, 1] = True, False
    return logits.masked_fill(~keep, -math.inf).softmax(1)


def brute_similarity(before: Tensor, after: Tensor) -> float:
    overlaps = [
        len(set(a) & set(b)) / len(set(a) | set(b)) for a, b in zip(before.tolist(), after.tolist(), strict=True)
    ]
    return sum(overlaps) / len(overlaps)


def brute_kl(before: Tensor, after: Tensor) -> float:
    tiny = torch.finfo(torch.float32).tiny
    total = 0.0
    for p_row, q_row in zip(before.tolist(), after.tolist(), strict=True):
        total += sum(p * math.log(p / max(q, tiny)) for p, q in zip(p_row, q_row, strict=True) if p > 0)
    return total / len(before)


def brute_js(before: Tensor, after: Tensor) -> float:
    before, after = before.double(), after.double()
    middle = (before + after) / 2
    return (brute_kl(before, middle) + brute_kl(after, middle)) / 2


def batch(metric: Metric, tokens: int, seed: int) -> tuple[dict[int, Tensor], ...]:
    """Arguments of one update of ``metric``; k differs between the layers."""
    names = 1 if isinstance(metric, ExpertLoad) else 2
    if isinstance(metric, RoutingDivergence):
        return tuple({i: distributions(tokens, seed * 100 + 10 * n + i) for i in LAYERS} for n in range(names))
    return tuple({i: top_k(tokens, i, seed * 100 + 10 * n + i) for i in LAYERS} for n in range(names))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    torch.testing.assert_close(left, right, equal_nan=True)


METRICS = [
    pytest.param(lambda: RoutingSimilarity(LAYERS), id="similarity"),
    pytest.param(lambda: RoutingDivergence(LAYERS), id="divergence"),
    pytest.param(lambda: ExpertLoad(NUM_EXPERTS, LAYERS), id="load"),
]


class TestSimilarity:
    @few
    @given(tokens=st.integers(1, 20), k=st.integers(1, NUM_EXPERTS), seed=st.integers(0, 999))
    def test_matches_python_sets_and_its_own_symmetries(self, tokens, k, seed):
        before, after = top_k(tokens, k, seed), top_k(tokens, k, seed + 1000)
        value = routing_similarity(before, after)
        assert value.shape == () and value.dtype == torch.float32
        assert float(value) == pytest.approx(brute_similarity(before, after), abs=1e-6)
        assert 0 <= value <= 1
        assert value == routing_similarity(after, before)
        assert value == routing_similarity(before[:, torch.randperm(k)], after)
        assert routing_similarity(before, before.flip(1)) == 1

    def test_disjoint_is_zero(self):
        assert routing_similarity(torch.tensor([[0, 1]]), torch.tensor([[2, 3]])) == 0

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
    def test_any_integer_dtype(self, dtype):
        before, after = top_k(9, 3, 0), top_k(9, 3, 1)
        assert routing_similarity(before.to(dtype), after.to(dtype)) == routing_similarity(before, after)

    def test_no_tokens_is_nan(self):
        assert routing_similarity(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long)).isnan()

    def test_layers_and_their_mean(self):
        metric = RoutingSimilarity(LAYERS)
        before, after = batch(metric, 17, seed=1)
        metric.update(before | {9: None}, after)  # a layer nobody asked for does not matter
        expected = {f"layer_{i}": brute_similarity(before[i], after[i]) for i in LAYERS}
        expected = {"mean": sum(expected.values()) / len(LAYERS)} | expected
        assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("before", "after", "message"),
        [
            (torch.zeros(4, 2), torch.zeros(4, 2).long(), r"`before` to hold integer .* got torch.float32"),
            (torch.zeros(4, 2).long(), torch.zeros(4, 2).bool(), r"`after` to hold integer .* got torch.bool"),
            (torch.zeros(4).long(), torch.zeros(4).long(), r"`before` of shape \[N, k\] .* got \[4\]"),
            (torch.zeros(4, 0).long(), torch.zeros(4, 0).long(), r"`before` of shape \[N, k\] .* got \[4, 0\]"),
            (torch.zeros(4, 2).long(), torch.zeros(4, 3).long(), r"same shape, got \[4, 2\] and \[4, 3\]"),
            (torch.zeros(4, 2).long(), torch.zeros(1, 2).long(), r"same shape, got \[4, 2\] and \[1, 2\]"),
        ],
    )
    def test_errors_say_what_they_got(self, before, after, message):
        with pytest.raises(ValueError, match=message):
            routing_similarity(before, after)
        metric = RoutingSimilarity([7])
        with pytest.raises(ValueError, match="Layer 7: .*" + message):
            metric.update({7: before}, {7: after})


class TestDivergence:
    @few
    @given(tokens=st.integers(1, 20), seed=st.integers(0, 999))
    def test_matches_loops_and_its_own_symmetries(self, tokens, seed):
        before, after = distributions(tokens, seed), distributions(tokens, seed + 1000)
        kl, js = routing_divergence(before, after)
        assert float(kl) == pytest.approx(brute_kl(before, after), rel=1e-5, abs=1e-6)
        assert float(js) == pytest.approx(brute_js(before, after), rel=1e-5, abs=1e-6)
        assert 0 <= kl < math.inf
        assert 0 <= js <= math.log(2) + 1e-6
        assert js == routing_divergence(after, before)[1]
        permutation = torch.randperm(NUM_EXPERTS)
        torch.testing.assert_close(routing_divergence(before[:, permutation], after[:, permutation]), (kl, js))
        assert routing_divergence(before, before) == (0, 0)

    @few
    @given(tokens=st.integers(1, 20), seed=st.integers(0, 999))
    def test_logits_equal_their_softmax(self, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        before, after = (5 * torch.randn(2, tokens, NUM_EXPERTS, generator=generator)).unbind()
        expected = routing_divergence(before.softmax(1), after.softmax(1))
        torch.testing.assert_close(routing_divergence(before, after, logits=True), expected, rtol=1e-4, atol=1e-6)
        shifted = routing_divergence(before + 7, after - 7, logits=True)
        torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("logits", [False, True])
    def test_disjoint_distributions_stay_finite(self, logits):
        before, after = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        kl, js = routing_divergence(*((before.log(), after.log()) if logits else (before, after)), logits=logits)
        assert float(kl) == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))
        assert float(js) == pytest.approx(math.log(2))

    def test_small_changes_keep_their_digits(self):
        logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
        change = 1e-3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
        p, q = logits.double().softmax(1), (logits + change).double().softmax(1)
        _, js = routing_divergence(logits, logits + change, logits=True)
        assert float(js) == pytest.approx(brute_js(p, q), rel=0.1)

    def test_half_precision_and_unnormalised_rows_are_normalised(self):
        before, after = distributions(30, 0), distributions(30, 1)
        expected = routing_divergence(before.bfloat16().float(), after.bfloat16().float())
        assert routing_divergence(before.bfloat16(), after.bfloat16()) == expected
        torch.testing.assert_close(routing_divergence(3 * before, 0.5 * after), routing_divergence(before, after))

    def test_no_tokens_is_nan(self):
        assert all(value.isnan() for value in routing_divergence(torch.zeros(0, 4), torch.zeros(0, 4)))

    @pytest.mark.parametrize("logits", [False, True])
    def test_layers_and_their_mean(self, logits):
        metric = RoutingDivergence(LAYERS, logits=logits)
        before, after = batch(metric, 17, seed=1)
        if logits:
            metric.update(*({i: scores.log() for i, scores in side.items()} for side in (before, after)))
        else:
            metric.update(before, after)
        expected = {}
        for name, brute in (("kl", brute_kl), ("js", brute_js)):
            values = {f"{name}/layer_{i}": brute(before[i], after[i]) for i in LAYERS}
            expected |= {f"{name}/mean": sum(values.values()) / len(LAYERS)} | values
        result = metric.compute()
        assert list(result) == list(expected)
        assert {name: float(value) for name, value in result.items()} == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(
        ("before", "after", "logits", "message"),
        [
            (torch.ones(4, 2).long(), torch.ones(4, 2), False, r"`before` to be floating point, got torch.int64"),
            (torch.ones(4, 2), torch.ones(4), False, r"`after` of shape \[N, E\] .* got \[4\]"),
            (torch.ones(4, 2), torch.ones(4, 3), False, r"same shape, got \[4, 2\] and \[4, 3\]"),
            (torch.ones(4, 2), -torch.ones(4, 2), False, r"`after` to hold probabilities.*logits=True"),
            (torch.zeros(4, 2), torch.ones(4, 2), False, r"`before` to hold probabilities"),
            (torch.ones(4, 2), torch.full((4, 2), math.nan), False, r"`after` to hold probabilities"),
            (torch.ones(4, 2), torch.full((4, 2), math.inf), False, r"`after` to hold probabilities"),
            (torch.ones(4, 2), torch.full((4, 2), -math.inf), True, r"`after` to hold logits"),
            (torch.ones(4, 2), torch.full((4, 2), math.nan), True, r"`after` to hold logits"),
        ],
    )
    def test_errors_say_what_they_got(self, before, after, logits, message):
        with pytest.raises(ValueError, match=message):
            routing_divergence(before, after, logits)
        with pytest.raises(ValueError, match="Layer 7: .*" + message):
            RoutingDivergence([7], logits=logits).update({7: before}, {7: after})


class TestLoad:
    @few
    @given(tokens=st.integers(1, 30), k=st.integers(1, 4), seed=st.integers(0, 999))
    def test_matches_counting(self, tokens, k, seed):
        indices = top_k(tokens, k, seed)
        flat = indices.flatten().tolist()
        shares = [flat.count(j) / len(flat) for j in range(NUM_EXPERTS)]
        torch.testing.assert_close(expert_load(indices, NUM_EXPERTS), torch.tensor(shares))
        assert torch.equal(expert_load(indices.flip(1), NUM_EXPERTS), expert_load(indices, NUM_EXPERTS))

        metric = ExpertLoad(NUM_EXPERTS, [4])
        result = metric({4: indices})
        entropy = -sum(s * math.log(s) for s in shares if s) / math.log(NUM_EXPERTS)
        expected = {"entropy": entropy, "max_share": NUM_EXPERTS * max(shares), "dead": shares.count(0) / NUM_EXPERTS}
        for name, value in expected.items():
            assert float(result[f"{name}/mean"]) == float(result[f"{name}/layer_4"]) == pytest.approx(value, abs=1e-6)
        assert 0 <= result["entropy/mean"] <= 1 <= result["max_share/mean"] <= NUM_EXPERTS
        assert 0 <= result["dead/mean"] < 1

    @pytest.mark.parametrize("num_experts", [2, 3, 7, 64, 128])
    def test_balanced_and_collapsed(self, num_experts):
        metric = ExpertLoad(num_experts, [0, 1])
        metric.update({0: torch.arange(num_experts).view(-1, 1), 1: torch.zeros(5, 1, dtype=torch.long)})
        result = {name: float(value) for name, value in metric.compute().items()}
        assert result["entropy/layer_0"] <= 1
        assert result == pytest.approx(
            {
                "entropy/mean": 0.5,
                "entropy/layer_0": 1,
                "entropy/layer_1": 0,
                "max_share/mean": (1 + num_experts) / 2,
                "max_share/layer_0": 1,
                "max_share/layer_1": num_experts,
                "dead/mean": (1 - 1 / num_experts) / 2,
                "dead/layer_0": 0,
                "dead/layer_1": 1 - 1 / num_experts,
            }
        )

    def test_load_is_shares_per_layer(self):
        metric = ExpertLoad(NUM_EXPERTS, LAYERS)
        (experts,) = batch(metric, 13, seed=0)
        metric.update(experts)
        expected = torch.stack([expert_load(experts[i], NUM_EXPERTS) for i in LAYERS])
        assert torch.equal(metric.load(), expected)
        metric.load().zero_()
        assert torch.equal(metric.load(), expected)

    def test_a_layer_without_tokens_is_nan(self):
        metric = ExpertLoad(4, LAYERS)
        result = metric({3: torch.tensor([[0, 1]]), 5: torch.zeros(0, 2, dtype=torch.long)})
        for name in ("entropy", "max_share", "dead"):
            assert result[f"{name}/layer_3"].isfinite()
            assert result[f"{name}/layer_5"].isnan() and result[f"{name}/mean"].isnan()

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            (torch.zeros(4, 2), r"integer expert indices, got torch.float32"),
            (torch.zeros(4).long(), r"shape \[N, k\] .* got \[4\]"),
            (torch.tensor([[0, 4]]), r"indices in \[0, 4\), got \[0, 4\]"),
            (torch.tensor([[-1, 2]]), r"indices in \[0, 4\), got \[-1, 2\]"),
        ],
    )
    def test_errors_say_what_they_got(self, experts, message):
        with pytest.raises(ValueError, match=message):
            expert_load(experts, 4)
        with pytest.raises(ValueError, match="Layer 7: .*" + message):
            ExpertLoad(4, [7]).update({7: experts})

    @pytest.mark.parametrize("num_experts", [1, 0, -3])
    def test_too_few_experts(self, num_experts):
        for call in (lambda: ExpertLoad(num_experts, [0]), lambda: expert_load(torch.tensor([[0]]), num_experts)):
            with pytest.raises(ValueError, match=f"`num_experts` >= 2, got {num_experts}"):
                call()


@pytest.mark.parametrize("make", METRICS)
class TestEveryMetric:
    @few
    @given(tokens=st.integers(2, 30), cuts=st.lists(st.integers(0, 30), max_size=3), seed=st.integers(0, 99))
    def test_parts_add_up_to_the_whole(self, make, tokens, cuts, seed):
        whole, parts = make(), make()
        arguments = batch(whole, tokens, seed)
        whole.update(*arguments)
        bounds = [0, *sorted(min(cut, tokens) for cut in cuts), tokens]
        for start, stop in pairwise(bounds):
            parts.update(*({i: side[i][start:stop] for i in LAYERS} for side in arguments))
        assert_same(parts.compute(), whole.compute())
        rounds = [make(), make()]
        for seed_offset, metric in enumerate(rounds):
            metric.update(*batch(metric, 5, seed + seed_offset))
        rounds[0].merge_state(rounds[1])
        both = make()
        for seed_offset in range(2):
            both.update(*batch(both, 5, seed + seed_offset))
        assert_same(rounds[0].compute(), both.compute())

    def test_forward_gives_the_batch_and_accumulates(self, make):
        metric, reference = make(), make()
        for seed in range(2):
            fresh = make()
            fresh.update(*batch(fresh, 6, seed))
            reference.update(*batch(reference, 6, seed))
            assert_same(metric(*batch(metric, 6, seed)), fresh.compute())
        assert_same(metric.compute(), reference.compute())

    def test_clone_pickle_state_dict_reset(self, make):
        metric = make()
        metric.persistent(True)
        metric.update(*batch(metric, 6, 0))
        loaded = make()
        loaded.persistent(True)
        loaded.load_state_dict(metric.state_dict())
        loaded._update_count = 1  # only silences the warning about a metric that was never updated
        copies = (metric.clone(), pickle.loads(pickle.dumps(metric)), loaded)
        expected = metric.compute()
        for copy in copies:
            assert_same(copy.compute(), expected)
        metric.reset()
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            result = metric.compute()
        assert list(result) == list(expected)
        assert all(value.isnan() for value in result.values())

    def test_works_in_a_collection(self, make):
        collection = MetricCollection({"routing": make()})
        collection.update(*batch(make(), 6, 0))
        assert any(name.endswith("mean") for name in collection.compute())

    def test_half_precision_training_does_not_make_it_coarse(self, make):
        reference = make()
        arguments = batch(reference, 500, 0)
        reference.update(*arguments)
        torch.set_default_dtype(torch.bfloat16)
        try:
            metric = make()
            metric.update(*arguments)
            result = metric.compute()
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same(result, reference.compute())

    def test_a_failed_update_changes_nothing(self, make):
        metric = make()
        metric.update(*batch(metric, 6, 0))
        states = {name: value.clone() for name, value in metric.metric_state.items()}
        first, *rest = batch(metric, 6, 1)
        with pytest.raises(ValueError, match=r"Layer 5"):
            metric.update(first | {5: first[5][0]}, *rest)
        for name, value in metric.metric_state.items():
            assert torch.equal(value, states[name])

    def test_a_missing_layer_is_named(self, make):
        metric = make()
        *rest, last = batch(metric, 6, 0)
        with pytest.raises(ValueError, match=r"to hold layers \[3, 5\], got \[3\]: no \[5\]"):
            metric.update(*rest, {3: last[3]})

    def test_plot(self, make):
        metric = make()
        metric.update(*batch(metric, 6, 0))
        figure, ax = metric.plot()
        assert isinstance(figure, plt.Figure)
        assert isinstance(ax, plt.Axes)
        _, mine = plt.subplots()
        figure, ax = metric.plot(metric.compute(), mine)
        assert ax is mine
        assert figure is mine.figure
        assert {"3", "5"} == {label.get_text() for label in ax.get_xticklabels()}
        _, mine = plt.subplots()
        figure, ax = metric.plot([metric.compute(), metric.compute()], mine)
        assert ax is mine
        assert figure is mine.figure
        assert len(ax.lines) == len(metric.compute())

    def test_plot_before_any_token(self, make):
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            value = make().compute()
        make().plot(value)

    def test_plot_without_matplotlib(self, make, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        metric = make()
        metric.update(*batch(metric, 6, 0))
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            metric.plot()


def test_load_plot_is_a_heat_map():
    metric = ExpertLoad(NUM_EXPERTS, LAYERS)
    metric.update(*batch(metric, 6, 0))
    _, ax = metric.plot(metric.load())
    assert ax.images[0].get_array().shape == (len(LAYERS), NUM_EXPERTS)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "5"]
    with pytest.raises(ValueError, match=r"shape \[2, 12\] \[L, E\], got \[3\]"):
        metric.plot(torch.zeros(3))


@pytest.mark.parametrize("layers", [[], [1, 1], [-1], ["3"], [1.0]])
@pytest.mark.parametrize("make", [RoutingSimilarity, RoutingDivergence, lambda layers: ExpertLoad(4, layers)])
def test_wrong_layers(make, layers):
    with pytest.raises(ValueError, match="Expected `layers` to hold at least one layer index"):
        make(layers)
