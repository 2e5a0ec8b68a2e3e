"""Tests of the properties of every metric with one value per layer."""

import pickle
import sys
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from lit_moeedit.metrics import ExpertLoad, RoutingDivergence, RoutingSimilarity
from tests.metrics.tokens import LAYERS, NUM_EXPERTS, batch, few


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    torch.testing.assert_close(left, right, equal_nan=True)


METRICS = [
    pytest.param(lambda: RoutingSimilarity(LAYERS), id="similarity"),
    pytest.param(lambda: RoutingDivergence(LAYERS), id="divergence"),
    pytest.param(lambda: ExpertLoad(NUM_EXPERTS, LAYERS), id="load"),
]


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


@pytest.mark.parametrize("layers", [[], [1, 1], [-1], ["3"], [1.0]])
@pytest.mark.parametrize("make", [RoutingSimilarity, RoutingDivergence, lambda layers: ExpertLoad(4, layers)])
def test_wrong_layers(make, layers):
    with pytest.raises(ValueError, match="Expected `layers` to hold at least one layer index"):
        make(layers)
