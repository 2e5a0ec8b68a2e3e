"""Tests of the readability of plots, for many layers and for few results."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from lit_moeedit.metrics import EditSuccess, ExpertLoad, RoutingDivergence, RoutingSimilarity


def result(layers: int, *prefixes: str) -> dict[str, torch.Tensor]:
    names = ["mean", *(f"layer_{i}" for i in range(layers))]
    return {f"{prefix}{name}": torch.tensor(0.5) for prefix in prefixes for name in names}


def legend(ax: plt.Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize(("layers", "shown"), [(1, 1), (16, 16), (17, 9), (48, 16), (61, 16)])
def test_layer_names_stay_apart(layers, shown):
    metric, load = RoutingSimilarity(range(layers)), ExpertLoad(8, range(layers))
    _, ax = metric.plot(result(layers, ""))
    _, heat_map = load.plot(torch.rand(layers, 8))
    for axis in (ax.xaxis, heat_map.yaxis):
        names = [label.get_text() for label in axis.get_ticklabels()]
        assert len(names) == shown
        assert names == [str(place) for place in axis.get_ticklocs()]
        assert axis.get_label_text() == "layer"


def test_value_axes_say_what_they_show():
    metric = RoutingDivergence(range(3))
    value = result(3, "kl/", "js/")
    for val in (value, [value, value]):
        _, ax = metric.plot(val)
        assert ax.get_ylabel() == "routing divergence (nats)"
    _, ax = RoutingSimilarity(range(3)).plot(result(3, ""))
    assert ax.get_ylim() == (0, 1)
    _, ax = RoutingSimilarity(range(3)).plot([result(3, "")])
    assert ax.get_ylim() == pytest.approx((-0.03, 1.03))


@pytest.mark.parametrize("layers", [3, 48])
def test_legend_over_time_names_what_can_be_told_apart(layers):
    value = result(layers, "kl/", "js/")
    _, ax = RoutingDivergence(range(layers)).plot([value, value])
    assert len(ax.lines) == len(value)
    assert legend(ax) == (list(value) if layers == 3 else ["kl/mean", "js/mean"])
    styles = [(line.get_color(), line.get_linestyle()) for line in ax.get_legend().get_lines()]
    assert len(set(styles)) == len(styles)


def test_legend_never_hides_data_of_its_own_figure():
    for val in (result(5, "kl/", "js/"), [result(5, "kl/", "js/")] * 3):
        figure, ax = RoutingDivergence(range(5)).plot(val)
        figure.canvas.draw()
        assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())
        _, mine = plt.subplots()
        RoutingDivergence(range(5)).plot(val, mine)
        mine.figure.canvas.draw()
        assert mine.get_window_extent().overlaps(mine.get_legend().get_window_extent())


def test_steps_and_experts_are_whole_numbers():
    for ax in (EditSuccess().plot([{"efficacy": torch.tensor(1.0)}])[1], ExpertLoad(4, [0]).plot(torch.rand(1, 4))[1]):
        assert all(float(place).is_integer() for place in ax.get_xticks())


def test_nan_is_written_and_keeps_its_place():
    _, ax = RoutingSimilarity([3, 5]).plot(
        result(0, "") | {"layer_3": torch.tensor(0.5), "layer_5": torch.tensor(math.nan)}
    )
    assert [text.get_text() for text in ax.texts] == ["", "nan"]
    assert ax.get_xlim()[1] > 1
    _, ax = EditSuccess().plot({"efficacy": torch.tensor(math.nan), "utility": torch.tensor(0.5)})
    assert [text.get_text() for text in ax.texts] == ["nan", "0.500"]
    _, ax = ExpertLoad(4, [0]).plot(torch.full((1, 4), math.nan))
    assert ax.images[0].get_clim() == (0, 1)
