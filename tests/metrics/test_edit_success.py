import math
import pickle
import sys
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_moeedit.metrics import EditSuccess, edit_success

GROUPS = ("near", "far")
KEYS = [
    "efficacy",
    "efficacy_accuracy",
    "generalization",
    "generalization_accuracy",
    "specificity",
    "specificity_accuracy",
    "specificity_retained",
    "specificity_retained_near",
    "specificity_retained_far",
    "score",
    "utility",
]
few = settings(max_examples=60)
log_prob = st.sampled_from([-3.0, -2.0, -1.0, 0.0])  # few values, so that ties are common
prompt = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["edit", "paraphrase", "neighbour"]),
        "new": log_prob,
        "true": log_prob | st.just(math.nan),
        "exact": st.booleans(),
        "exact_before": st.booleans(),
        "group": st.sampled_from(GROUPS),
    }
)
prompts = st.lists(prompt, max_size=25)


def arrays(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Arguments of ``update`` and ``edit_success`` for the rows of one kind."""
    rows = [row for row in rows if row["kind"] == kind]
    arguments: dict[str, Any] = {
        "kind": kind,
        "log_prob_new": torch.tensor([row["new"] for row in rows]),
        "log_prob_true": torch.tensor([row["true"] for row in rows]),
        "exact": torch.tensor([row["exact"] for row in rows], dtype=torch.bool),
    }
    if kind == "neighbour":
        arguments["exact_before"] = torch.tensor([row["exact_before"] for row in rows], dtype=torch.bool)
        arguments["groups"] = [row["group"] for row in rows]
    return arguments


def fill(metric: EditSuccess, rows: list[dict[str, Any]]) -> EditSuccess:
    for kind in ("edit", "paraphrase", "neighbour"):
        metric.update(**arrays(rows, kind))
    return metric


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else math.nan


def brute(rows: list[dict[str, Any]]) -> dict[str, float]:
    rates: dict[str, float] = {}
    kinds = {"edit": "efficacy", "paraphrase": "generalization", "neighbour": "specificity"}
    for kind, name in kinds.items():
        mine = [row for row in rows if row["kind"] == kind]
        sign = -1 if kind == "neighbour" else 1
        rates[name] = share([sign * row["new"] > sign * row["true"] for row in mine if not math.isnan(row["true"])])
        rates[f"{name}_accuracy"] = share([row["exact"] for row in mine])
    right = [row for row in rows if row["kind"] == "neighbour" and row["exact_before"]]
    rates["specificity_retained"] = share([row["exact"] for row in right])
    for group in GROUPS:
        rates[f"specificity_retained_{group}"] = share([row["exact"] for row in right if row["group"] == group])
    three = [rates[name] for name in kinds.values()]
    if any(math.isnan(rate) for rate in three):
        rates["score"] = rates["utility"] = math.nan
    else:
        rates["score"] = 0.0 if 0 in three else 3 / sum(1 / rate for rate in three)
        rates["utility"] = sum(three) / 3
    return rates


def floats(rates: dict[str, Tensor]) -> dict[str, float]:
    assert all(rate.shape == () and rate.dtype == torch.float32 for rate in rates.values())
    return {name: float(rate) for name, rate in rates.items()}


EVERYTHING = [
    {"kind": kind, "new": new, "true": true, "exact": exact, "exact_before": before, "group": group}
    for kind in ("edit", "paraphrase", "neighbour")
    for new, true, exact, before, group in [
        (-1.0, -2.0, True, True, "near"),
        (-2.0, -1.0, False, True, "near"),
        (-1.0, -1.0, True, False, "far"),
        (-1.0, math.nan, True, True, "far"),
    ]
]


@few
@given(rows=prompts)
def test_matches_loops(rows):
    result = fill(EditSuccess(GROUPS), rows).compute()
    assert list(result) == KEYS
    assert floats(result) == pytest.approx(brute(rows), nan_ok=True)
    assert all(math.isnan(rate) or 0 <= rate <= 1 for rate in floats(result).values())


@few
@given(rows=prompts, order=st.randoms(use_true_random=False), cut=st.integers(0, 25))
def test_order_and_batches_do_not_matter(rows, order, cut):
    whole = fill(EditSuccess(GROUPS), rows)
    shuffled = rows.copy()
    order.shuffle(shuffled)
    parts = fill(fill(EditSuccess(GROUPS), shuffled[:cut]), shuffled[cut:])
    merged = fill(EditSuccess(GROUPS), shuffled[:cut])
    merged.merge_state(fill(EditSuccess(GROUPS), shuffled[cut:]))
    for metric in (parts, merged):
        assert floats(metric.compute()) == pytest.approx(floats(whole.compute()), nan_ok=True, abs=0, rel=0)


@few
@given(rows=prompts)
def test_function_gives_the_rates_of_one_kind(rows):
    expected = brute(rows)
    for kind, name in {"edit": "efficacy", "paraphrase": "generalization", "neighbour": "specificity"}.items():
        arguments = arrays(rows, kind)
        rates = floats(edit_success(**arguments))
        groups = sorted(set(arguments.get("groups", ())))
        retained = ["specificity_retained", *(f"specificity_retained_{group}" for group in groups)]
        assert list(rates) == [name, f"{name}_accuracy", *(retained if kind == "neighbour" else [])]
        assert rates == pytest.approx({key: expected[key] for key in rates}, nan_ok=True)


def test_ties_are_not_preferred():
    same = torch.tensor([-1.0, -1.0])
    for kind, name in (("edit", "efficacy"), ("paraphrase", "generalization"), ("neighbour", "specificity")):
        assert edit_success(kind, same, same, torch.tensor([True, True]))[name] == 0


def test_rows_without_target_true_count_for_accuracy_only():
    new, true = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-2.0, math.nan, -2.0])
    rates = edit_success("edit", new, true, torch.tensor([False, True, False]))
    assert floats(rates) == pytest.approx({"efficacy": 1 / 2, "efficacy_accuracy": 1 / 3})
    none = edit_success("paraphrase", new, torch.full((3,), math.nan), torch.tensor([False, True, False]))
    assert none["generalization"].isnan()
    assert float(none["generalization_accuracy"]) == pytest.approx(1 / 3)


def test_a_broken_model_is_not_a_success():
    nan, some = torch.tensor([math.nan]), torch.tensor([-1.0])
    assert edit_success("edit", nan, some, torch.tensor([False]))["efficacy"] == 0
    assert edit_success("neighbour", nan, some, torch.tensor([False]))["specificity"] == 0


def test_retained_counts_only_measured_neighbours():
    metric = EditSuccess(GROUPS)
    arguments = ("neighbour", torch.tensor([-2.0, -2.0]), torch.tensor([-1.0, -1.0]), torch.tensor([True, False]))
    metric.update(*arguments)
    assert metric.compute()["specificity_retained"].isnan()
    metric.update(*arguments, groups=["near", "far"])
    assert metric.compute()["specificity_retained_near"].isnan()
    metric.update(*arguments, exact_before=torch.tensor([True, True]))
    assert float(metric.compute()["specificity_retained"]) == 0.5
    assert metric.compute()["specificity_retained_near"].isnan()
    metric.update(*arguments, exact_before=torch.tensor([True, True]), groups=["near", "far"])
    result = floats(metric.compute())
    names = ("specificity_retained", "specificity_retained_near", "specificity_retained_far")
    assert [result[name] for name in names] == [0.5, 1, 0]
    assert result["specificity"] == 1
    assert result["specificity_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("rates", "score", "utility"),
    [((1, 1, 1), 1, 1), ((1, 1, 0), 0, 2 / 3), ((1, 0.5, 0.5), 0.6, 2 / 3), ((0, 0, 0), 0, 0)],
)
def test_score_and_utility(rates, score, utility):
    metric = EditSuccess()
    for kind, rate in zip(("edit", "paraphrase", "neighbour"), rates, strict=True):
        better = torch.tensor([-1.0, -1.0] if rate == 1 else [-1.0, -3.0] if rate else [-3.0, -3.0])
        worse = torch.full((2,), -2.0)
        new, true = (worse, better) if kind == "neighbour" else (better, worse)
        metric.update(kind, new, true, torch.tensor([True, True]))
    result = floats(metric.compute())
    assert (result["score"], result["utility"]) == pytest.approx((score, utility))


def test_score_is_nan_while_a_kind_is_missing():
    metric = EditSuccess()
    for kind in ("edit", "paraphrase"):
        metric.update(kind, torch.tensor([-3.0]), torch.tensor([-1.0]), torch.tensor([True]))
    result = metric.compute()
    assert result["efficacy"] == 0
    assert result["score"].isnan() and result["utility"].isnan()


VALID = {"log_prob_new": torch.zeros(3), "log_prob_true": torch.zeros(3), "exact": torch.zeros(3, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "neighbor"}, r"`kind` to be one of .* got 'neighbor'"),
        ({"log_prob_new": torch.zeros(3, 1)}, r"`log_prob_new` to be floating point \[N\], got torch.float32 \[3, 1\]"),
        ({"log_prob_true": torch.zeros(3).long()}, r"`log_prob_true` .* got torch.int64 \[3\]"),
        ({"exact": torch.zeros(3)}, r"`exact` to be bool \[N\], got torch.float32 \[3\]"),
        ({"exact": torch.zeros(2, dtype=torch.bool)}, r"same length, got 3, 3 and 2"),
        ({"exact_before": torch.zeros(3)}, r"`exact_before` to be bool \[N\], got torch.float32 \[3\]"),
        ({"exact_before": torch.zeros(1, dtype=torch.bool)}, r"`exact_before` to hold 3 values .* got 1"),
        ({"groups": ["near"]}, r"`groups` to hold 3 values .* got 1"),
        ({"kind": "edit", "groups": ["near"] * 3}, r"`groups` only for kind 'neighbour', got it for 'edit'"),
        ({"kind": "paraphrase", "exact_before": VALID["exact"]}, r"`exact_before` only for .* got it for 'paraphrase'"),
    ],
)
def test_errors_say_what_they_got(changes, message):
    arguments = {"kind": "neighbour"} | VALID | changes
    metric = EditSuccess(GROUPS)
    for call in (edit_success, metric.update):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    assert not metric.counts.any()


def test_unknown_group_names_the_known_ones():
    for known, shown in ((GROUPS, r"\['near', 'far'\]"), ((), r"\[\]")):
        with pytest.raises(ValueError, match=rf"names of {shown}, got \['wide'\]"):
            EditSuccess(known).update("neighbour", **VALID, groups=["wide"] * 3)


@pytest.mark.parametrize("groups", ["near", ["near", "near"]])
def test_wrong_groups(groups):
    with pytest.raises(ValueError, match="sequence of distinct names"):
        EditSuccess(groups)


def test_clone_pickle_state_dict_reset_forward():
    metric = EditSuccess(GROUPS)
    metric.persistent(True)
    fill(metric, EVERYTHING)
    loaded = EditSuccess(GROUPS)
    loaded.persistent(True)
    loaded.load_state_dict(metric.state_dict())
    loaded._update_count = 1  # only silences the warning about a metric that was never updated
    copies = (metric.clone(), pickle.loads(pickle.dumps(metric)), loaded)
    expected = floats(metric.compute())
    assert expected == pytest.approx(brute(EVERYTHING))
    for copy in copies:
        assert floats(copy.compute()) == expected
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        result = metric.compute()
    assert all(value.isnan() for value in result.values())
    metric.reset()
    for kind in ("edit", "paraphrase", "neighbour"):
        batch = metric(**arrays(EVERYTHING, kind))
        alone = edit_success(**arrays(EVERYTHING, kind))
        assert {name: batch[name] for name in alone} == alone
    assert floats(metric.compute()) == expected


def test_half_precision_training_does_not_make_it_coarse():
    expected = floats(fill(EditSuccess(GROUPS), EVERYTHING * 7).compute())
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = fill(EditSuccess(GROUPS), EVERYTHING * 7).compute()
    finally:
        torch.set_default_dtype(torch.float32)
    assert floats(result) == expected


def test_plot(monkeypatch):
    metric = fill(EditSuccess(GROUPS), EVERYTHING)
    figure, ax = metric.plot()
    assert isinstance(figure, plt.Figure)
    assert [label.get_text() for label in ax.get_yticklabels()] == KEYS
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(list(floats(metric.compute()).values()))
    _, mine = plt.subplots()
    figure, ax = metric.plot([metric.compute(), metric.compute()], mine)
    assert (figure, ax) == (mine.figure, mine)
    assert len(ax.lines) == len(KEYS)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        empty = EditSuccess().compute()
    metric.plot(empty)[0].canvas.draw()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        metric.plot()
