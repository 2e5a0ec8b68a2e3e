import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_moeedit.metrics import RoutingDivergence, RoutingSimilarity, routing_divergence, routing_similarity
from tests.metrics.tokens import LAYERS, NUM_EXPERTS, batch, distributions, few, top_k


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
