import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_moeedit.metrics import ExpertLoad, expert_load
from tests.metrics.tokens import LAYERS, NUM_EXPERTS, batch, few, top_k


@few
@given(tokens=st.integers(1, 30), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_matches_counting(tokens, k, seed):
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
def test_balanced_and_collapsed(num_experts):
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


def test_load_is_shares_per_layer():
    metric = ExpertLoad(NUM_EXPERTS, LAYERS)
    (experts,) = batch(metric, 13, seed=0)
    metric.update(experts)
    expected = torch.stack([expert_load(experts[i], NUM_EXPERTS) for i in LAYERS])
    assert torch.equal(metric.load(), expected)
    metric.load().zero_()
    assert torch.equal(metric.load(), expected)


def test_a_layer_without_tokens_is_nan():
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
def test_errors_say_what_they_got(experts, message):
    with pytest.raises(ValueError, match=message):
        expert_load(experts, 4)
    with pytest.raises(ValueError, match="Layer 7: .*" + message):
        ExpertLoad(4, [7]).update({7: experts})


@pytest.mark.parametrize("num_experts", [1, 0, -3])
def test_too_few_experts(num_experts):
    for call in (lambda: ExpertLoad(num_experts, [0]), lambda: expert_load(torch.tensor([[0]]), num_experts)):
        with pytest.raises(ValueError, match=f"`num_experts` >= 2, got {num_experts}"):
            call()


def test_load_plot_is_a_heat_map():
    metric = ExpertLoad(NUM_EXPERTS, LAYERS)
    metric.update(*batch(metric, 6, 0))
    _, ax = metric.plot(metric.load())
    assert ax.images[0].get_array().shape == (len(LAYERS), NUM_EXPERTS)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3", "5"]
    with pytest.raises(ValueError, match=r"shape \[2, 12\] \[L, E\], got \[3\]"):
        metric.plot(torch.zeros(3))
